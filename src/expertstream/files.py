"""Opens files whose names come from outside: a pipe or a device in place of a file must not hang the reader or fill its memory."""

from __future__ import annotations

import errno
import json
import os
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Any

from .errors import CheckpointError

__all__ = ["MAX_TEXT", "open_regular", "private_folder", "read_json", "read_text", "write_private"]

MAX_TEXT = 256 << 20  # bytes; the largest tokenizers have a few dozen MiB


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Raises OSError, also for anything else."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The text of a regular file. Raises OSError, also for more than `limit` bytes, or UnicodeDecodeError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data.decode("utf-8")


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, whatever the umask and the mode of an existing file. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as out:
        os.fchmod(file, 0o600)
        out.write(data)


def private_folder(path: Path) -> None:
    """Creates a folder and its missing parents for the owner alone, or removes other users' permissions from an existing folder.
    Raises OSError."""
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        folder.mkdir(exist_ok=True, mode=0o700)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; give a checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value
