"""Opening files whose names come from elsewhere: a pipe or a device in a file's place must not hang the reader, or fill its memory."""

from __future__ import annotations

import errno
import os
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG

__all__ = ["MAX_TEXT", "open_regular", "private_folder", "read_text", "write_private"]

MAX_TEXT = 256 << 20  # bytes; the largest tokenizers have some dozens of MiB


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading. Raises OSError, also for everything that is none."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """The text of a regular file. Raises OSError for one of more than `limit` bytes, UnicodeDecodeError."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data.decode("utf-8")


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that only its owner can read, whatever the umask and an earlier file of that name allowed. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "wb") as out:
        os.fchmod(file, 0o600)
        out.write(data)


def private_folder(path: Path) -> None:
    """Makes a folder of this program's own, with all above it that are missing, or takes back what others could do in it. Raises
    OSError."""
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        folder.mkdir(exist_ok=True, mode=0o700)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
