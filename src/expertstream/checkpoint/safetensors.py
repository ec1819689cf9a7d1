"""Reads safetensors headers; nothing in a file is trusted before it is checked against the file's size.

Format: 8 bytes little-endian header length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
(https://github.com/huggingface/safetensors, format section.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..files import open_regular
from ..ops import aligned_empty
from .format import ALIGNMENT, TensorInfo, align

__all__ = ["header_bytes", "read_header", "read_tensor"]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit


def read_header(path: Path) -> dict[str, TensorInfo]:
    """All tensors of one file. Raises CheckpointError if the file is invalid."""
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes is less than a safetensors header")
            length = int.from_bytes(prefix, "little")
            if length > min(_MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: invalid header: its length is {length} bytes, but the file has {size}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: invalid header: not JSON; is this a safetensors file?") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: invalid header: not a JSON object")
    header.pop("__metadata__", None)
    base = 8 + length
    tensors = {name: _tensor(path, name, entry, base, size) for name, entry in header.items()}
    end, before = base, ""
    for info in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if info.offset < end and info.nbytes:
            raise CheckpointError(f"{path}: tensors {before} and {info.name} overlap")
        end, before = max(end, info.offset + info.nbytes), info.name
    return tensors


def _tensor(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise wrong(f"unknown dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n <= 1 << 48 for n in shape):
        raise wrong(f"invalid shape {shape!r:.100}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise wrong(f"invalid data_offsets {offsets!r}")
    begin, end = offsets
    nbytes = DTYPE_BYTES[dtype]
    for n in shape:
        nbytes *= n
    if end - begin != nbytes:
        raise wrong(f"{dtype} {shape} is {nbytes} bytes, but data_offsets give {end - begin}")
    if base + end > size:
        raise wrong(f"out of range: it ends at byte {base + end}, but the file has {size}; is the download complete?")
    return TensorInfo(name, path, dtype, tuple(shape), base + begin, nbytes)


def read_tensor(info: TensorInfo, begin: int = 0, end: int | None = None) -> NDArray[np.uint8]:
    """Bytes [begin, end) of a tensor, flat uint8. Raises CheckpointError."""
    end = info.nbytes if end is None else end
    out = aligned_empty(end - begin)
    view = memoryview(out)
    try:
        with info.file.open("rb", buffering=0) as file:
            done = 0
            while done < len(view):
                n = os.preadv(file.fileno(), [view[done : done + (1 << 30)]], info.offset + begin + done)
                if n == 0:
                    raise CheckpointError(f"{info.file}: tensor {info.name}: the file ends too early")
                done += n
            # The bytes are in our memory now; a second copy in the page cache would only waste memory.
            os.posix_fadvise(file.fileno(), info.offset + begin, len(view), os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {info.name}: cannot be read: {error.strerror}") from None
    return out


def header_bytes(
    tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str], aligned: bool
) -> bytes:
    """The start of a file that holds `tensors` (name → dtype, shape, nbytes) one after another. With `aligned` the data begins
    at a multiple of 4,096 (the header is padded with spaces, as the format allows)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    length = align(8 + len(text), ALIGNMENT if aligned else 8) - 8
    return length.to_bytes(8, "little") + text.ljust(length)
