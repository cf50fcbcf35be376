"""The veilpipe handshake, sans-IO: Noise XX with evidence bound to it, and the responder's ACCEPT.

Every phase is an object with one transition, which returns the next phase; it works once. The
messages travel with a two-byte length before them, the ACCEPT record without.

    initiate → AwaitingReply →               AwaitingAccept → Session
    respond  → AwaitingHello → HelloHeard → AwaitingProof  → Session
"""

import hmac
from struct import Struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from transport.attestation.evidence_binding import Attested, Binding, EvidenceKind, is_same
from transport.attestation.interfaces import Attester, Verifier
from transport.cipher import TAG_BYTES
from transport.errors import AttestationError, HandshakeError, MisuseError, RecordError
from transport.frozen import frozen
from transport.link_prologue import PROTOCOL_NAME, VERSION, Link, LinkKind, Role, RoleKind
from transport.noise import DH_BYTES, XX, HandshakeState
from transport.records import OVERHEAD_BYTES, RecordKind, RecordOpener, RecordSealer
from transport.rekey_policy import RekeyPolicy

__all__ = [
    "ACCEPT_BYTES",
    "HELLO_SIZES",
    "LENGTH",
    "PROOF_SIZES",
    "REFUSAL",
    "REPLY_SIZES",
    "VERSION",
    "AwaitingAccept",
    "AwaitingHello",
    "AwaitingProof",
    "AwaitingReply",
    "Credentials",
    "HelloHeard",
    "Link",
    "LinkKind",
    "Peer",
    "Role",
    "RoleKind",
    "Session",
    "Sizes",
    "check_evidence_untrusted",
    "initiate",
    "message_size_untrusted",
    "respond",
    "with_length",
]

# NSM documents have about 5 KiB; the certificate chain may grow, a peer's appetite may not.
MAX_EVIDENCE_BYTES = 16 * 1024

LENGTH = Struct(">H")
# What a responder answers to a hello for another link than its own: a message of no bytes. It is
# not authentic, so it says no more than hanging up would; but it is told apart from a peer not up.
REFUSAL = LENGTH.pack(0)
MARK_BYTES = 16
_MARK_CONTEXT = b"veilpipe-hello/2"

_OTHER_LINK = "the peer holds another manifest, is another stage or role, or is of another session"
_OTHER_PROTOCOL = f"the peer does not speak {VERSION.decode()}"

Sizes = tuple[int, int]
# Under a pre-shared key the mark is encrypted: whoever lacks the key has nothing to say.
_PSK_PATTERN = XX.with_psk(0)
_PSK_PROTOCOL_NAME = PROTOCOL_NAME.replace("_XX_", "_XXpsk0_")
HELLO_SIZES: Sizes = (DH_BYTES + MARK_BYTES, DH_BYTES + MARK_BYTES + TAG_BYTES)
_PROOF_MIN = DH_BYTES + TAG_BYTES + 1 + TAG_BYTES  # encrypted s, evidence kind, tags
PROOF_SIZES: Sizes = (_PROOF_MIN, _PROOF_MIN + MAX_EVIDENCE_BYTES)
REPLY_SIZES: Sizes = (DH_BYTES + _PROOF_MIN, DH_BYTES + _PROOF_MIN + MAX_EVIDENCE_BYTES)
ACCEPT_BYTES = OVERHEAD_BYTES


@frozen
class Credentials:
    """Our identity, and our own policy on what the peer must show; nothing is negotiated."""

    static_key: X25519PrivateKey
    attester: Attester
    verifiers: tuple[Verifier, ...]  # one for each kind of evidence accepted from the peer
    psk: bytes | None = None  # 32 bytes that only the two ends have, mixed in before all else


@frozen
class Peer:
    """Who is at the other end, after every check has passed."""

    role: Role
    static_key: bytes
    attested: Attested


@frozen
class Session:
    """What a finished handshake leaves: both directions' record layers and the peer."""

    peer: Peer
    handshake_hash: bytes
    sealer: RecordSealer
    opener: RecordOpener


def initiate(
    link: Link, credentials: Credentials, rekey: RekeyPolicy | None = None
) -> tuple["AwaitingReply", bytes]:
    """Begin as the link's initiator; returns the next phase and message 1."""
    side = _Side(link, credentials, rekey or RekeyPolicy(), is_initiator=True)
    return AwaitingReply(side), side.write_hello()


def respond(
    link: Link, credentials: Credentials, rekey: RekeyPolicy | None = None
) -> "AwaitingHello":
    """Begin as the link's responder."""
    return AwaitingHello(_Side(link, credentials, rekey or RekeyPolicy(), is_initiator=False))


def message_size_untrusted(prefix: bytes, sizes: Sizes, link: Link) -> int:
    """Read a length prefix and hold it to what this phase can take. Raises: HandshakeError."""
    if prefix == REFUSAL:
        raise HandshakeError(f"the peer refuses our {link}: {_OTHER_LINK}, or {_OTHER_PROTOCOL}")
    (size,) = LENGTH.unpack(prefix)
    _check_size(size, sizes)
    return int(size)


def with_length(message: bytes) -> bytes:
    """Return a handshake message as it travels."""
    return LENGTH.pack(len(message)) + message


class _Side:
    """What one side carries from phase to phase."""

    def __init__(
        self, link: Link, credentials: Credentials, rekey: RekeyPolicy, *, is_initiator: bool
    ) -> None:
        psk = credentials.psk
        self.noise = HandshakeState(
            PROTOCOL_NAME if psk is None else _PSK_PROTOCOL_NAME,
            XX if psk is None else _PSK_PATTERN,
            is_initiator=is_initiator,
            prologue=link.prologue(),
            static=credentials.static_key,
            psks=() if psk is None else (psk,),
        )
        self._credentials = credentials
        self._rekey = rekey
        roles = (link.initiator, link.responder)
        self._own_role, self._peer_role = roles if is_initiator else roles[::-1]
        # Whoever comes past the hello holds the same link.
        self._failure_meaning = f"on our {link}: bytes were altered on the way"
        self._refusal = f"a hello for another link than our {link}: {_OTHER_LINK}"

    def write_hello(self) -> bytes:
        """Return message 1: a fresh key, and the mark that we hold the link's prologue."""
        tokens = self.noise.write_tokens()
        return tokens + self.noise.write_payload(self._mark())

    def read_hello(self, message: bytes) -> None:
        """Take message 1: three hashes, no other work for a stranger. Raises: HandshakeError."""
        payload = self.noise.read_tokens(message)
        expected = self._mark()
        try:
            mark = self.noise.read_payload(payload)
        except HandshakeError as error:  # under another pre-shared key
            raise HandshakeError(self._refusal) from error
        if not is_same(mark, expected):
            raise HandshakeError(self._refusal)

    def _mark(self) -> bytes:
        """What only a holder of the prologue can compute for this ephemeral key."""
        return hmac.digest(self.noise.handshake_hash, _MARK_CONTEXT, "sha256")[:MARK_BYTES]

    def write_evidence(self) -> bytes:
        """Return the next message, its evidence bound to the hash of all before its payload."""
        tokens = self.noise.write_tokens()
        attester = self._credentials.attester
        document = attester.attest(
            Binding(
                role=self._own_role.canonical(),
                handshake_hash=self.noise.handshake_hash,
                static_key=self.noise.public_key("s"),
                nonce=self.noise.remote_key("e"),
            )
        )
        if len(document) > MAX_EVIDENCE_BYTES:
            raise MisuseError(f"evidence of {len(document)} bytes is over {MAX_EVIDENCE_BYTES}")
        return tokens + self.noise.write_payload(bytes([attester.kind]) + document)

    def read_evidence(self, message: bytes) -> Peer:
        """Take a message with evidence and check it. Raises: HandshakeError, AttestationError."""
        try:
            payload = self.noise.read_tokens(message)
            handshake_hash = self.noise.handshake_hash
            evidence = self.noise.read_payload(payload)
        except HandshakeError as error:
            raise HandshakeError(f"{error}; {self._failure_meaning}") from error
        binding = Binding(
            role=self._peer_role.canonical(),
            handshake_hash=handshake_hash,
            static_key=self.noise.remote_key("s"),
            nonce=self.noise.public_key("e"),
        )
        for own in ("s", "e"):
            if is_same(self.noise.remote_key(own), self.noise.public_key(own)):
                # Reflection: a peer that shows our own key is ourselves, or plays us to us.
                raise HandshakeError("the peer shows our own key")
        attested = check_evidence_untrusted(evidence, self._credentials.verifiers, binding)
        return Peer(self._peer_role, binding.static_key, attested)

    def session(self, peer: Peer) -> Session:
        """Derive both directions' keys."""
        sending, receiving = self.noise.split()
        return Session(
            peer,
            self.noise.handshake_hash,
            RecordSealer(sending, self._rekey),
            RecordOpener(receiving, self._rekey),
        )


def check_evidence_untrusted(
    payload: bytes, verifiers: tuple[Verifier, ...], binding: Binding
) -> Attested:
    """Check an evidence payload (kind byte, document) by local policy. Raises: AttestationError."""
    kind = payload[0] if payload else None
    for verifier in verifiers:
        if verifier.kind == kind:
            return verifier.verify(payload[1:], binding)
    accepted = ", ".join(verifier.kind.name for verifier in verifiers) or "none"
    names = {member.value: member.name for member in EvidenceKind}
    shown = "nothing" if kind is None else names.get(kind, f"unknown kind {kind}")
    raise AttestationError("kind", f"the peer shows {shown}; accepted here: {accepted}")


class _Phase:
    """A phase hands its state on once, whether its transition succeeds or fails."""

    sizes: Sizes

    def __init__(self, side: _Side) -> None:
        self._side: _Side | None = side

    def _leave(self) -> _Side:
        side, self._side = self._side, None
        if side is None:
            raise MisuseError(f"{type(self).__name__} is over: a phase works once")
        return side

    def _take(self, message: bytes) -> _Side:
        side = self._leave()
        _check_size(len(message), self.sizes)
        return side


class AwaitingReply(_Phase):
    """The initiator has sent message 1."""

    sizes = REPLY_SIZES

    def receive(self, message: bytes) -> tuple["AwaitingAccept", bytes]:
        """Take message 2; returns the next phase and message 3. Raises: ProtocolError."""
        side = self._take(message)
        peer = side.read_evidence(message)
        return AwaitingAccept(side, peer), side.write_evidence()


class AwaitingAccept(_Phase):
    """The initiator has sent message 3 and may send no data yet."""

    sizes = (ACCEPT_BYTES, ACCEPT_BYTES)

    def __init__(self, side: _Side, peer: Peer) -> None:
        super().__init__(side)
        self._peer = peer

    def receive(self, record: bytes) -> Session:
        """Take the ACCEPT record. Raises: ProtocolError."""
        session = self._take(record).session(self._peer)
        kind, _ = session.opener.open(record)
        if kind is not RecordKind.ACCEPT:
            raise RecordError(f"the responder's first record is {kind.name}, not ACCEPT")
        return session


class AwaitingHello(_Phase):
    """The responder waits for message 1."""

    sizes = HELLO_SIZES

    def receive(self, message: bytes) -> "HelloHeard":
        """Take message 1, for a few hashes. Raises: HandshakeError where it is for another link."""
        side = self._take(message)
        side.read_hello(message)
        return HelloHeard(side)


class HelloHeard(_Phase):
    """The initiator holds the link's prologue, or repeats the hello of one that does."""

    def __init__(self, side: _Side) -> None:
        super().__init__(side)
        self.ephemeral_key = side.noise.remote_key("e")

    def answer(self) -> tuple["AwaitingProof", bytes]:
        """Make our evidence; returns the next phase and message 2.

        Raises: ProtocolError; DeviceError or MisuseError where there is no evidence to show.
        """
        side = self._leave()
        return AwaitingProof(side), side.write_evidence()


class AwaitingProof(_Phase):
    """The responder waits for message 3."""

    sizes = PROOF_SIZES

    def receive(self, message: bytes) -> tuple[Session, bytes]:
        """Take message 3; returns the session and the ACCEPT record. Raises: ProtocolError."""
        side = self._take(message)
        session = side.session(side.read_evidence(message))
        return session, session.sealer.seal(RecordKind.ACCEPT)


def _check_size(size: int, sizes: Sizes) -> None:
    least, most = sizes
    if not least <= size <= most:
        raise HandshakeError(
            f"a handshake message of {size} bytes where {least} to {most} are possible: "
            f"{_OTHER_PROTOCOL}"
        )
