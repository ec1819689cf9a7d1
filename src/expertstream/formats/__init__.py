"""The formats of weights in memory and on disk: one file per format."""

from __future__ import annotations

from typing import Any

from .affine import AFFINE_BITS, AFFINE_GROUPS, Affine
from .dense import Dense
from .expert import SWIGLU, Activation, ExpertFormat, ExpertPart
from .matrix import TILE_ROWS, Bytes, KernelFormat, MatrixFormat, Part
from .mxfp4 import MXFP4, MXFP4_GROUP

__all__ = [
    "AFFINE_BITS",
    "AFFINE_GROUPS",
    "MXFP4",
    "MXFP4_GROUP",
    "SWIGLU",
    "TILE_ROWS",
    "Activation",
    "Affine",
    "Bytes",
    "Dense",
    "ExpertFormat",
    "ExpertPart",
    "KernelFormat",
    "MatrixFormat",
    "Part",
    "matrix_from_json",
]


def matrix_from_json(entry: dict[str, Any]) -> MatrixFormat:
    """The format written by MatrixFormat.to_json(). Raises ValueError if no kernel supports it, KeyError or TypeError for a malformed
    entry."""
    rows, cols = entry["rows"], entry["cols"]
    if type(rows) is not int or type(cols) is not int or rows < 1 or cols < 1:
        raise ValueError(f"rows and cols must be integers of at least 1; got {entry}")
    if entry.get("kind") == "mxfp4":
        if cols % MXFP4_GROUP:
            raise ValueError(f"cols must be a multiple of {MXFP4_GROUP}; got {entry}")
        return MXFP4(rows, cols)
    bits, group, dtype, symmetric = entry["bits"], entry["group_size"], entry["dtype"], entry.get("symmetric", False)
    known = type(bits) is int and type(group) is int and type(symmetric) is bool and dtype in ("f32", "f16", "bf16")
    if "kind" in entry or not known:
        raise ValueError(f"unknown quantization: {entry}")
    if (bits, group, symmetric) == (32 if dtype == "f32" else 16, 0, False):
        return Dense(rows, cols, dtype)
    if bits in AFFINE_BITS and group in AFFINE_GROUPS and cols % group == 0:
        return Affine(rows, cols, bits, group, dtype, symmetric)
    raise ValueError(f"unknown quantization: {entry}")
