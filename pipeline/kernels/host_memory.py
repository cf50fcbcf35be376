"""How much memory this process may still take: the machine's, or less where a cgroup says so."""

import re
from pathlib import Path

ROOT = Path("/")
# A limit this large is none: version 1 writes the largest number of pages.
NO_LIMIT = 1 << 60


def available_bytes(root: Path = ROOT) -> int | None:
    """What can be had without pushing anything out; None where the system does not say.

    `root`: where /proc and /sys are looked for.
    """
    free = _meminfo(root).get("MemAvailable")
    if free is None:
        return None
    return max(0, min([free, *_left_in_groups(root)]))


def _meminfo(root: Path) -> dict[str, int]:
    text = _read(root / "proc/meminfo")
    return {
        name: int(kib) << 10 for name, kib in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)
    }


def _left_in_groups(root: Path) -> list[int]:
    """What the limits of this process's control group, and of those it lies in, leave."""
    left = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            files = (root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        base, limit_file, used_file, cached = files
        group = base / path.lstrip("/")
        while True:
            limit, used = _number(group / limit_file), _number(group / used_file)
            if limit is not None and used is not None and limit < NO_LIMIT:
                left.append(limit - used + _statistic(group / "memory.stat", cached))
            if group == base:
                break
            group = group.parent
    return left


def _statistic(path: Path, name: str) -> int:
    """Files that are cached and can go at once, which groups count as used."""
    match = re.search(rf"^{name} (\d+)$", _read(path), re.MULTILINE)
    return int(match[1]) if match else 0


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
