"""The format of a matrix's bytes. A format names its parts and defines their meaning; reader, pack, converter and kernels rely on this
description alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .numbers import F32

__all__ = [
    "TILE_ROWS",
    "Bytes",
    "KernelFormat",
    "MatrixFormat",
    "Part",
    "tile_codes",
    "tile_values",
    "untile_codes",
    "untile_values",
]

TILE_ROWS = 16
Bytes = NDArray[np.uint8]


class Part(NamedTuple):
    """One tensor of a matrix. name: its suffix after the module's name in a checkpoint; row_bytes: bytes per row of the matrix."""

    name: str
    row_bytes: int


class KernelFormat(NamedTuple):
    """A matrix as described in native/kernels/kernels.h: `codes` defines the meaning of the integers of `bits` bits."""

    bits: int
    group_size: int
    dtype: str  # of the values if dense, of the scales otherwise
    codes: str  # dense, affine, symmetric or e2m1


@dataclass(frozen=True)
class MatrixFormat(ABC):
    """A matrix (rows, cols), out by in. In memory a quantized one is stored in tiles of 16 rows, the last one padded."""

    rows: int
    cols: int

    @property
    @abstractmethod
    def kernel(self) -> KernelFormat:
        """Which kernel multiplies it."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Its tensors, in the order that kernels expect."""

    @abstractmethod
    def dequantize(self, parts: Sequence[Bytes]) -> F32:
        """The parts' flat bytes, row by row → (rows, cols) float32: the definition of the format."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Its entry in a pack's manifest."""

    @property
    def quantized(self) -> bool:
        return self.kernel.codes != "dense"

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Bytes of each part, as checkpoints store them."""
        return tuple(self.rows * part.row_bytes for part in self.parts)

    @property
    def tiled_bytes(self) -> tuple[int, ...]:
        """Bytes of each part, as kernels read them."""
        return tuple(self.padded_rows * part.row_bytes for part in self.parts)

    @property
    def padded_rows(self) -> int:
        """Rows in memory, including padding."""
        return -(-self.rows // TILE_ROWS) * TILE_ROWS if self.quantized else self.rows

    @property
    def nbytes(self) -> int:
        return sum(self.part_bytes)

    def tile(self, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        """Converts the parts' flat bytes, row by row, to the kernels' layout: tile_codes() and tile_values()."""
        if not self.quantized:
            return tuple(parts)
        k = self.kernel
        padded = [
            np.concatenate([np.ascontiguousarray(part).ravel(), np.zeros(size - part.size, np.uint8)])
            for part, size in zip(parts, self.tiled_bytes, strict=True)
        ]
        rows, groups = self.padded_rows, self.cols // k.group_size
        return tile_codes(padded[0], self.cols, k.bits), *(tile_values(part, rows, groups) for part in padded[1:])

    def untile(self, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        """Undoes tile(); rows that pad the last tile are dropped."""
        if not self.quantized:
            return tuple(parts)
        k = self.kernel
        rows, groups = self.padded_rows, self.cols // k.group_size
        flat = untile_codes(parts[0], self.cols, k.bits), *(untile_values(part, rows, groups) for part in parts[1:])
        return tuple(part[:size] for part, size in zip(flat, self.part_bytes, strict=True))


def tile_codes(data: Bytes, cols: int, bits: int) -> Bytes:
    """Integers of 2, 4 or 8 bits, least significant bits first, whole tiles of rows → tiles.

    A tile is 16 rows in vectors of 64 bytes, four bytes per row; bits [p·bits, (p+1)·bits) of byte b of vector v are column v·32/bits + 4p
    + b."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    columns = (data[:, None] >> shifts) & ((1 << bits) - 1)
    columns = columns.reshape(-1, TILE_ROWS, cols * bits // 32, 8 // bits, 4)  # tile, row, vector, plane, byte
    packed: Bytes = np.bitwise_or.reduce(columns << shifts[:, None], axis=3).astype(np.uint8)  # tile, row, vector, byte
    return packed.transpose(0, 2, 1, 3).ravel()


def untile_codes(data: Bytes, cols: int, bits: int) -> Bytes:
    """Undoes tile_codes()."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    tiles = np.ascontiguousarray(data).reshape(-1, cols * bits // 32, TILE_ROWS, 4)  # tile, vector, row, byte
    columns = (tiles[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)  # tile, vector, row, plane, byte
    rows = columns.transpose(0, 2, 1, 3, 4).reshape(-1, cols * bits // 8, 8 // bits)
    packed: Bytes = np.bitwise_or.reduce(rows << shifts, axis=-1).astype(np.uint8)
    return packed.ravel()


def tile_values(values: Bytes, rows: int, groups: int) -> Bytes:
    """One value per group, (rows, groups) for whole tiles of rows → (tiles, groups, 16)."""
    return values.reshape(-1, TILE_ROWS, groups, values.size // (rows * groups)).transpose(0, 2, 1, 3).ravel()


def untile_values(values: Bytes, rows: int, groups: int) -> Bytes:
    """Undoes tile_values()."""
    values = np.ascontiguousarray(values)
    return values.reshape(-1, groups, TILE_ROWS, values.size // (rows * groups)).transpose(0, 2, 1, 3).ravel()
