"""Memory and processors that this process may use, as limited by the machine and by each of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes", "memory_limit_bytes", "usable_processors"]

_UNLIMITED = 1 << 60


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without swapping or being killed: the least of MemAvailable and, for each control group from
    this process's to the root, limit − use, not counting page cache, which can be reclaimed. `root` is for tests."""
    available = _meminfo(root).get("MemAvailable", 0)
    for limit, used, reclaimable in _groups(root):
        available = min(available, max(0, limit - max(0, used - reclaimable)))
    return available


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The most memory that this process could use if nothing else ran: MemTotal or the tightest control group's limit."""
    total = _meminfo(root).get("MemTotal", 0)
    return min([total, *(limit for limit, _, _ in _groups(root))])


def usable_processors(root: Path = Path("/")) -> int:
    """Processors that this process may run on, but no more than its control groups' quotas allow; at least 1."""
    count = len(os.sched_getaffinity(0))
    for group, version in _group_folders(root, "cpu"):
        try:
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
            if quota.strip() not in ("max", "-1"):
                count = min(count, int(quota) // int(period))
        except (OSError, ValueError):
            continue
    return max(1, count)


def _meminfo(root: Path) -> dict[str, int]:
    values = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields = rest.split()
        if fields and fields[0].isdecimal():
            values[name] = int(fields[0]) * 1024
    return values


def _groups(root: Path) -> list[tuple[int, int, int]]:
    """(limit, use, reclaimable page cache) of each memory control group this process is in, versions 1 and 2."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
    }
    found = (_group(group, *names[version]) for group, version in _group_folders(root, "memory"))
    return [entry for entry in found if entry is not None]


def _group_folders(root: Path, controller: str) -> list[tuple[Path, int]]:
    """(folder, version) of every control group from this process's to the root that may limit `controller`."""
    found: list[tuple[Path, int]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            mounts, version = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"], 2
        elif controller in controllers.split(","):
            mounts, version = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller], 1
        else:
            continue
        for mount in mounts:
            # Inside a container the path may be the host's: if it does not exist, the mount itself is the group.
            group = mount / path.lstrip("/")
            if not group.is_dir():
                group = mount
            while True:
                found.append((group, version))
                if group == mount:
                    break
                group = group.parent
    return found


def _group(group: Path, limit_name: str, usage_name: str, cache_names: tuple[str, ...]) -> tuple[int, int, int] | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return int(limit), usage, sum(int(stat.get(name, 0)) for name in cache_names)
