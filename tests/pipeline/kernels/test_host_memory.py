"""What a process may still take is the least of what machine and control groups leave."""

import pytest

from pipeline.kernels import base
from pipeline.kernels.host_memory import available_bytes

MIB = 1 << 20
MEMINFO = "MemTotal: 65536 kB\nMemFree: 1024 kB\nMemAvailable: 32768 kB\nHugePages_Total: 0\n"


@pytest.fixture
def machine(tmp_path):
    """Writes files of a machine with 32 MiB available; returns its root."""

    def write(**files):
        files = {"proc/meminfo": MEMINFO} | files
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def group(path, limit, used, cached=0, *, version=2):
    base = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}[version] + path
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    return {
        f"{base}/{names[0]}": f"{limit}\n",
        f"{base}/{names[1]}": f"{used}\n",
        f"{base}/memory.stat": f"anon 5\n{names[2]} {cached}\n",
    }


def test_without_a_group_it_is_what_the_machine_has_available(machine):
    assert available_bytes(machine()) == 32 * MIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([("/a/b", 20 * MIB, 8 * MIB)], 12),
        ([("/a/b", 20 * MIB, 8 * MIB, 3 * MIB)], 15),
        ([("/a/b", 90 * MIB, 8 * MIB)], 32),
        ([("/a/b", 20 * MIB, 8 * MIB), ("/a", 10 * MIB, 9 * MIB)], 1),
        ([("/a/b", "max", 8 * MIB), ("/a", 10 * MIB, 8 * MIB)], 2),
        ([("/a/b", 9223372036854771712, 8 * MIB)], 32),
        ([("", 10 * MIB, 8 * MIB)], 2),  # as a container sees its own
        ([("/a/b", 5 * MIB, 8 * MIB)], 0),
        ([("/other", 5 * MIB, 4 * MIB)], 32),
    ],
)
def test_a_groups_limit_less_what_it_uses_bounds_it(machine, version, groups, expected):
    lines = {1: "5:cpu:/x\n9:cpuset,memory:/a/b\n0::/\n", 2: "0::/a/b\n"}
    files = {"proc/self/cgroup": lines[version]}
    for each in groups:
        files |= group(*each, version=version)
    assert available_bytes(machine(**files)) == expected * MIB


def test_a_system_that_does_not_say_is_told_apart(tmp_path):
    assert available_bytes(tmp_path) is None


def test_kernels_give_what_is_available_less_a_tenth(kernels, oracle_class, monkeypatch):
    from pipeline.kernels.kernel_selection import choose_kernels

    monkeypatch.setattr(base, "available_bytes", lambda: 50 * MIB)
    assert choose_kernels(kernels, 16).free_bytes() == 45 * MIB
