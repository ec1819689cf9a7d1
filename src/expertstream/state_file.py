"""Files of arrays with a checksum for each, which store the state of a sequence. Contents are verified before use.

magic 8 bytes | header length, u32 | header, JSON | xxh3-64 of the header, 8 bytes | the arrays, one after another. The header's "arrays"
lists dtype, shape and xxh3-64 of each.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .files import open_regular

__all__ = ["StateFile", "StateFileError", "array_bytes", "is_state_file", "write_state"]

_MAGIC = b"ESSTATE1"
_DTYPES = ("float32", "uint16", "int64", "uint8", "int8")
_MAX_HEADER = 16 << 20
_MAX_DIMENSIONS = 8


class StateFileError(Exception):
    """A file that is damaged, truncated, or not a state file."""


def write_state(path: Path, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> int:
    """Writes a temporary file and renames it, so that `path` is complete or absent. Returns its size in bytes. Raises OSError."""
    entries = [
        {"dtype": a.dtype.name, "shape": list(a.shape), "xxh3": xxhash.xxh3_64_hexdigest(_raw(a))}
        for a in map(np.ascontiguousarray, arrays)
    ]
    text = json.dumps({**header, "arrays": entries}).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(text).to_bytes(4, "little") + text + xxhash.xxh3_64_digest(text))
            for array in arrays:
                file.write(_raw(np.ascontiguousarray(array)))
            size = file.tell()
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return size


def is_state_file(path: Path) -> bool:
    """Whether the path is a regular file with the magic number of a state file; its contents may be damaged. Raises OSError."""
    if path.is_symlink() or not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


@dataclass(frozen=True)
class StateFile:
    """A state file. Its header has been checked; its arrays are checked when they are read."""

    path: Path
    header: dict[str, Any]
    begin: int  # offset of the first array

    @classmethod
    def open(cls, path: Path) -> StateFile:
        """Raises StateFileError, OSError."""
        with open_regular(path) as file:
            head = file.read(12)
            length = int.from_bytes(head[8:], "little")
            if head[:8] != _MAGIC or not 2 <= length <= _MAX_HEADER:
                raise StateFileError(f"{path}: not a state file")
            text, digest = file.read(length), file.read(8)
            size = os.fstat(file.fileno()).st_size
        if xxhash.xxh3_64_digest(text) != digest:
            raise StateFileError(f"{path}: damaged header")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):  # a checksum proves integrity, not origin
            raise StateFileError(f"{path}: the header is not JSON") from None
        if not isinstance(header, dict) or not isinstance(header.get("arrays"), list):
            raise StateFileError(f"{path}: the header lists no arrays")
        for entry in header["arrays"]:
            _check_entry(path, entry, size)
        found = cls(path, header, 20 + length)
        if size != found.size:
            raise StateFileError(f"{path}: truncated, or longer than its header says")
        return found

    def integer(self, name: str) -> int:
        """A count in the header, at least 0. Raises StateFileError."""
        value = self.header.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
            raise StateFileError(f"{self.path}: the header's {name!r} is not a count")
        return value

    @property
    def size(self) -> int:
        return self.begin + sum(map(_bytes, self.header["arrays"]))

    def read(self, first: int, last: int, expected: Sequence[tuple[str, tuple[int, ...]]]) -> list[np.ndarray]:
        """Arrays [first, last), whose dtypes and shapes must be those expected. Raises StateFileError, also for
        floats that are not finite, or OSError."""
        entries = self.header["arrays"]
        if [(e["dtype"], tuple(e["shape"])) for e in entries[first:last]] != list(expected):
            raise StateFileError(f"{self.path}: its shapes differ from this model's")
        arrays = []
        with open_regular(self.path) as file:
            file.seek(self.begin + sum(map(_bytes, entries[:first])))
            for entry in entries[first:last]:
                array = np.empty(entry["shape"], entry["dtype"])
                data = _raw(array)
                if file.readinto(data) != data.size or xxhash.xxh3_64_hexdigest(data) != entry["xxh3"]:
                    raise StateFileError(f"{self.path}: damaged")
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    raise StateFileError(f"{self.path}: contains values that are not finite")
                arrays.append(array)
        return arrays


def _check_entry(path: Path, entry: Any, size: int) -> None:
    """Raises StateFileError for an array that a file of that size cannot hold, before anything is allocated for it."""
    if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES or not isinstance(entry.get("xxh3"), str):
        raise StateFileError(f"{path}: the header lists an array of an unknown type")
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise StateFileError(f"{path}: the header lists an array without a shape")
    if (
        not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= size for n in shape)
        or _bytes(entry) > size
    ):
        raise StateFileError(f"{path}: the header lists an array that is larger than the file")


def array_bytes(shape: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of an array with this dtype and shape."""
    return math.prod(shape[1]) * int(np.dtype(shape[0]).itemsize)


def _bytes(entry: dict[str, Any]) -> int:
    return array_bytes((entry["dtype"], entry["shape"]))


def _raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
