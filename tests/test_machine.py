"""Available memory and processors, on made-up machines."""

from __future__ import annotations

from pathlib import Path

from expertstream.machine import available_bytes, memory_limit_bytes, usable_processors

GIB = 1 << 30


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    files = {
        "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {10 * GIB // 1024} kB\n",
        "proc/self/cgroup": cgroup,
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(path: str, limit: str, current: int, inactive: int, active: int = 0) -> dict[str, str]:
    return {
        f"{path}/memory.max": limit,
        f"{path}/memory.current": str(current),
        f"{path}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file {active}\n",
    }


def v1(path: str, limit: int, usage: int, inactive: int, active: int = 0) -> dict[str, str]:
    return {
        f"{path}/memory.limit_in_bytes": str(limit), f"{path}/memory.usage_in_bytes": str(usage),
        f"{path}/memory.stat": f"cache 9\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n",
    }  # fmt: skip


def test_no_groups(tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    assert available_bytes(root) == 10 * GIB and memory_limit_bytes(root) == 16 * GIB


def test_version_2_takes_the_tightest_group_above_us(tmp_path: Path) -> None:
    files = v2("sys/fs/cgroup/a/b", "max", GIB, 0) | v2("sys/fs/cgroup/a", str(4 * GIB), 3 * GIB, 2 * GIB)
    root = machine(tmp_path, "0::/a/b\n", files)
    assert available_bytes(root) == 3 * GIB  # 4 − (3 − 2 of page cache)
    assert memory_limit_bytes(root) == 4 * GIB


def test_version_1(tmp_path: Path) -> None:
    files = v1("sys/fs/cgroup/memory/x", 2 * GIB, GIB, 0) | v1("sys/fs/cgroup/memory", 1 << 62, GIB, 0)
    root = machine(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n", files)
    assert available_bytes(root) == GIB and memory_limit_bytes(root) == 2 * GIB


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    root = machine(tmp_path, "4:memory:/docker/abc\n", v1("sys/fs/cgroup/memory", 3 * GIB, GIB, 0))
    assert available_bytes(root) == 2 * GIB


def test_page_cache_that_was_used_lately_is_not_in_use(tmp_path: Path) -> None:
    """Weights that were read through the page cache and read again are on the kernel's active list."""
    root = machine(tmp_path / "2", "0::/a\n", v2("sys/fs/cgroup/a", str(4 * GIB), 4 * GIB, GIB, 2 * GIB))
    assert available_bytes(root) == 3 * GIB
    root = machine(tmp_path / "1", "4:memory:/x\n", v1("sys/fs/cgroup/memory/x", 4 * GIB, 4 * GIB, GIB, 2 * GIB))
    assert available_bytes(root) == 3 * GIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", v2("sys/fs/cgroup/a", str(GIB), 2 * GIB, 0))
    assert available_bytes(root) == 0


def test_processors(tmp_path: Path) -> None:
    import os

    here = len(os.sched_getaffinity(0))
    assert usable_processors(machine(tmp_path / "a", "", {})) == here
    v2_quota = {"sys/fs/cgroup/a/cpu.max": "150000 100000\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}
    assert usable_processors(machine(tmp_path / "b", "0::/a\n", v2_quota)) == 1
    v1_quota = {
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
    }
    assert usable_processors(machine(tmp_path / "c", "3:cpu,cpuacct:/x\n", v1_quota)) == 1
    free = {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n"}
    assert usable_processors(machine(tmp_path / "d", "3:cpu:/x\n", free)) == here


def test_this_machine() -> None:
    assert usable_processors() >= 1
    assert 0 < available_bytes() <= memory_limit_bytes()
