"""Runs a command in a memory control group (version 1 or 2). Needs root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class ControlGroupError(Exception):
    """A control group could not be created on this machine."""


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Path]:
    """A group with this limit, removed afterwards. Raises ControlGroupError."""
    name = f"expertstream-{os.getpid()}"
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group, limit = (
        (v1 / name, "memory.limit_in_bytes") if (v1 / "memory.limit_in_bytes").exists() else (v2 / name, "memory.max")
    )
    try:
        if group.parent == v2:
            (v2 / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
        (group / limit).write_text(str(limit_bytes))
    except OSError as error:
        raise ControlGroupError(str(error)) from None
    try:
        yield group
    finally:
        group.rmdir()


def run_inside(group: Path, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command inside the group from its start."""
    script = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    return subprocess.run(["sh", "-c", script, "sh", *command], capture_output=True, text=True, check=False, **options)


def peak_bytes(group: Path) -> int:
    """The peak memory use of the group, including page cache."""
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (group / name).exists():
            return int((group / name).read_text())
    return 0
