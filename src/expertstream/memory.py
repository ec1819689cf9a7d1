"""How much memory this process may still take: the machine's, and every control group's above us."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "memory_limit_bytes"]

_UNLIMITED = 1 << 60


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping or being killed: the least of MemAvailable and, for each control group from
    ours to the top, limit − use, where use that is page cache can be taken back. `root` is for tests."""
    available = _meminfo(root).get("MemAvailable", 0)
    for limit, used, reclaimable in _groups(root):
        available = min(available, max(0, limit - max(0, used - reclaimable)))
    return available


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """The memory this process could have at most, were nothing else running: MemTotal or the tightest control group."""
    total = _meminfo(root).get("MemTotal", 0)
    return min([total, *(limit for limit, _, _ in _groups(root))])


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
    found: list[tuple[int, int, int]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            # Inside a container the path may be the host's: where it does not exist, the mount itself is our group.
            group = mount / path.lstrip("/")
            if not group.is_dir():
                group = mount
            while True:
                entry = _group(group, *names)
                if entry is not None:
                    found.append(entry)
                if group == mount:
                    break
                group = group.parent
    return found


def _group(group: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int, int] | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED:
        return None
    return int(limit), usage, int(stat.get(cache_name, 0))
