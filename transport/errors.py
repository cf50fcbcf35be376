"""Everything that can go wrong on a channel, under one root."""


class TransportError(Exception):
    """Root of every error this package raises."""


class MisuseError(TransportError):
    """The local caller broke the contract of this package; the peer did nothing wrong."""


class EndpointError(TransportError):
    """An address cannot be parsed, bound or reached."""


class DialRefused(EndpointError):
    """What a name stands for is an address that the caller may not dial: trying again is no use."""


class AttemptsSpent(TransportError):
    """A peer was not up at any of the attempts that its dialer makes."""


class DeviceError(TransportError):
    """This machine's security module is missing, or refuses a request."""


class ConnectionLost(TransportError):
    """The connection ended without an authenticated close: to the receiver, a truncation."""


class NoAnswer(ConnectionLost):
    """The connection ended before the peer said anything, as when a relay cannot reach it yet."""


class ProtocolError(TransportError):
    """The peer, or something between, sent what the protocol forbids. The channel is closed."""


class HandshakeError(ProtocolError):
    """The handshake did not authenticate: altered bytes, or a peer set up for another link."""


class RecordError(ProtocolError):
    """A record is malformed, forged, replayed, reordered or over its limit."""


class FrameError(ProtocolError):
    """An authentic frame declares something this channel does not take."""


class AttestationError(ProtocolError):
    """The peer's evidence was refused; `check` names the check that failed."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(f"{check}: {detail}")
        self.check = check
        self.detail = detail
