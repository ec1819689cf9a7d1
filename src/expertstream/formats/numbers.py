"""Conversions between float32 and stored numbers: bfloat16 bits, rows of int8 with a scale, powers of two in one byte."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPE_BYTES", "F32", "I64", "KeyValues", "from_bf16", "from_int8_rows", "to_bf16", "to_f32", "to_int8_rows"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
KeyValues = NDArray[Any]  # float32, bfloat16 bits as uint16, or rows of to_int8_rows() as uint8
DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "e8m0": 1}


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    """bfloat16 bits → float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def to_int8_rows(x: F32) -> NDArray[np.uint8]:
    """(…, d) → (…, d + 4): int8 values, the largest ±127, followed by their float32 scale."""
    step = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    inverse = np.where(step > 0, np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-38)), 0)
    values = np.rint(x * inverse.astype(np.float32)).astype(np.int8).view(np.uint8)
    return np.concatenate([values, np.ascontiguousarray(step).view(np.uint8)], -1)


def from_int8_rows(rows: NDArray[np.uint8]) -> F32:
    """The values of to_int8_rows(): (…, d + 4) → (…, d)."""
    step = np.ascontiguousarray(rows[..., -4:]).view(np.float32)
    return rows[..., :-4].view(np.int8).astype(np.float32) * step


def to_f32(raw: NDArray[np.uint8], dtype: str) -> F32:
    """Flat bytes of bf16, f16, f32 or e8m0 → float32, flat. e8m0 (OCP Microscaling Formats 1.0, 5.4.1): byte e is 2^(e − 127), 255 is
    NaN."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bf16":
        return from_bf16(raw.view(np.uint16))
    if dtype == "e8m0":
        exponents = raw.astype(np.int32) - 127
        return np.where(raw == 255, np.float32(np.nan), np.ldexp(np.float32(1), exponents)).astype(np.float32)
    return np.asarray(raw.view(np.float16 if dtype == "f16" else np.float32), np.float32)
