"""What a stage measures of itself: the parts of each step's time, and what `health` asks for."""

from time import perf_counter_ns
from typing import NamedTuple

from pipeline.protocol.messages import Health, Healthy, StageFigures
from pipeline.protocol.step_header import StageTiming
from pipeline.stage.step_executor import StageCore
from transport.channel import SecureChannel


class _Traffic(NamedTuple):
    """What channels have cost and carried."""

    crypto_ns: int = 0
    wire_ns: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    num_rekeys: int = 0

    @classmethod
    def of(cls, channel: SecureChannel) -> "_Traffic":
        stats = channel.stats
        return cls(
            stats.encrypt_ns + stats.decrypt_ns,
            stats.send_ns + stats.recv_ns,
            stats.bytes_sent,
            stats.bytes_received,
            stats.rekeys,
        )

    @classmethod
    def total(cls, *parts: "_Traffic") -> "_Traffic":
        return cls(*map(sum, zip(*parts, strict=True)))


class StageMeter:
    """Counts over all sessions of one worker."""

    def __init__(self) -> None:
        self._started_ns = perf_counter_ns()
        self._channels: list[SecureChannel] = []
        self._past = _Traffic()
        # What the times of all channels were when the last step was counted, and are now.
        self._last = self._now = (0, 0)
        self._num_handshakes = 0
        self._num_steps = 0
        self._num_tokens = 0
        self._last_batch = 0
        self._compute_ns = 0

    def count_handshake(self) -> None:
        """A peer has been authenticated."""
        self._num_handshakes += 1

    def open(self, channel: SecureChannel) -> None:
        """A data channel stands: what it carries counts from now on."""
        self.count_handshake()
        self._channels.append(channel)

    def close(self, channel: SecureChannel) -> None:
        """A data channel has ended; what it carried stays counted."""
        self._channels.remove(channel)
        self._past = _Traffic.total(self._past, _Traffic.of(channel))

    def step(self, num_tokens: int, num_requests: int, compute_ns: int) -> StageTiming:
        """Count a computed step, of 0 tokens if it had no result; what it cost here."""
        timing = StageTiming(compute_ns, *self.spent())
        self.count(num_tokens, num_requests, compute_ns)
        return timing

    def count(self, num_tokens: int, num_requests: int, compute_ns: int) -> None:
        """Count a computed step, with what it is told to have `spent`."""
        self._last = self._now
        self._num_steps += 1
        self._compute_ns += compute_ns
        if num_tokens:
            self._num_tokens += num_tokens
            self._last_batch = num_requests

    def spent(self) -> tuple[int, int]:
        """Nanoseconds that ciphers and sockets have taken since a step was counted.

        A step's header is sealed before it is sent, so the cost of sending it is the next one's.
        """
        crypto_ns, wire_ns = self._past.crypto_ns, self._past.wire_ns
        for channel in self._channels:  # not through calls: a step waits for this
            sealer, opener, wire = channel.clocks
            crypto_ns += sealer.cipher_ns + opener.cipher_ns
            wire_ns += wire.send_ns + wire.recv_ns
        self._now = crypto_ns, wire_ns
        return crypto_ns - self._last[0], wire_ns - self._last[1]

    def answer(self, question: Health, core: StageCore | None) -> Healthy:
        """The answer to `health`; `core` is the session's, if there is one."""
        traffic = self._traffic()
        lengths = () if core is None else core.cache.lengths
        figures = StageFigures(
            uptime_ns=perf_counter_ns() - self._started_ns,
            num_slots=len(lengths),
            slots_in_use=sum(length > 0 for length in lengths),
            kv_tokens=0 if core is None else core.cache.num_rows,
            kv_bytes=0 if core is None else core.num_bytes,
            num_steps=self._num_steps,
            num_tokens=self._num_tokens,
            last_batch=self._last_batch,
            compute_ns=self._compute_ns,
            crypto_ns=traffic.crypto_ns,
            wire_ns=traffic.wire_ns,
            bytes_sent=traffic.bytes_sent,
            bytes_received=traffic.bytes_received,
            num_handshakes=self._num_handshakes,
            num_rekeys=traffic.num_rekeys,
        )
        return Healthy(sequence=question.sequence, figures=figures)

    def _traffic(self) -> _Traffic:
        return _Traffic.total(self._past, *map(_Traffic.of, self._channels))
