"""What a stage takes of the machine that an engine finds for it."""

from dataclasses import dataclass

from pipeline.units import GIB

MIB = 1 << 20
# Python, the libraries and the kernels' own buffers; torch alone takes half of it.
PROCESS_BYTES = 768 * MIB
# Of weights, while they are read and converted, and for what counting leaves out (scales, tables).
WEIGHT_MARGIN = 0.125


@dataclass(frozen=True, slots=True)
class StageNeeds:
    """Memory in bytes, by what it is for, and threads."""

    weight_bytes: int
    # What weights take on processors whose kernels compute in float32, whatever the precision.
    widest_weight_bytes: int
    session_bytes: int
    step_bytes: int
    num_threads: int

    @property
    def memory_mib(self) -> int:
        """All of it in MiB, with a margin."""
        return self._with_margin(self.weight_bytes)

    @property
    def limit_mib(self) -> int:
        """As much as it takes on any processor."""
        return self._with_margin(self.widest_weight_bytes)

    def _with_margin(self, weight_bytes: int) -> int:
        weights = int(weight_bytes * (1 + WEIGHT_MARGIN))
        return -(-(weights + self.session_bytes + self.step_bytes + PROCESS_BYTES) // MIB)

    def most(self, other: "StageNeeds") -> "StageNeeds":
        """What is enough for either."""
        return StageNeeds(
            max(self.weight_bytes, other.weight_bytes),
            max(self.widest_weight_bytes, other.widest_weight_bytes),
            max(self.session_bytes, other.session_bytes),
            max(self.step_bytes, other.step_bytes),
            max(self.num_threads, other.num_threads),
        )

    @property
    def worker_flags(self) -> list[str]:
        """What a worker is told, so that it takes no more."""
        thousandths = max(1, -(-self.session_bytes * 1000 // GIB))
        return [f"--threads={self.num_threads}", f"--kv-memory={thousandths / 1000:.3f}"]
