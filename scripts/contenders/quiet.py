"""How much of the machine others used while a contender ran."""

import os
from pathlib import Path
from time import perf_counter

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")
# Of a core. Less than this is the system's own housekeeping.
DISTURBED = 0.1


def busy_ticks() -> int:
    """Ticks in which any core did anything, or the hypervisor kept it."""
    names = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"]
    values = map(int, (PROC / "stat").read_text().split("\n", 1)[0].split()[1 : 1 + len(names)])
    ticks = dict(zip(names, values, strict=True))
    return sum(ticks.values()) - ticks["idle"] - ticks["iowait"]


def group_ticks(group: int) -> int:
    """Ticks that the processes of a group have used so far."""
    total = 0
    for path in PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            total += int(fields[11]) + int(fields[12])
    return total


class Watch:
    """Cores that others kept busy since this was made; 0 where the system does not tell."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._can_tell = (PROC / "stat").exists()
        if self._can_tell:
            self._busy, self._own = busy_ticks(), group_ticks(group)
        self._started = perf_counter()

    def others(self) -> float:
        if not self._can_tell:
            return 0.0
        elapsed = perf_counter() - self._started
        own = group_ticks(self._group) - self._own
        return max(0.0, (busy_ticks() - self._busy - own) / TICKS / elapsed)
