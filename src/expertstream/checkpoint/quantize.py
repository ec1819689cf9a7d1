"""Chooses the bits of each trunk tensor, and splits matrices into blocks of rows so that quantizing needs little memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError
from ..formats import Affine, Dense, MatrixFormat
from ..formats.numbers import DTYPE_BYTES, F32
from .format import WeightSpec

__all__ = ["BitPolicy", "check_finite", "quantized_format", "row_blocks"]

BLOCK_ELEMENTS = 4 << 20  # per block of rows that is quantized at once: 16 MiB as float32


@dataclass(frozen=True)
class BitPolicy:
    """bits: of the experts; trunk_bits: of the trunk's matrices; 16 leaves them unchanged.

    Matrices that a model marks as sensitive (WeightSpec) are never quantized. docs/quantization.md has the perplexities behind the
    defaults.
    """

    bits: int = 4
    group_size: int = 64
    trunk_bits: int = 8
    symmetric: bool = False  # no biases: saves 16 bits per group

    def trunk_bits_of(self, spec: WeightSpec) -> int:
        return 16 if spec.sensitive else self.trunk_bits


def quantized_format(dense: MatrixFormat, bits: int, policy: BitPolicy) -> MatrixFormat:
    """The format after quantizing to `bits`: unchanged if bits is 16, if the matrix is quantized already, or if no group of 32 or more
    divides its columns."""
    group_size = policy.group_size
    while group_size >= 32 and dense.cols % group_size:
        group_size //= 2
    if dense.quantized or bits == 16 or group_size < 32:
        return dense
    return Affine(dense.rows, dense.cols, bits, group_size, "bf16", policy.symmetric)


def row_blocks(m: Dense) -> Iterator[tuple[int, int, int, int]]:
    """(first row, end row, first byte, end byte) of the blocks of a dense matrix."""
    rows = max(1, BLOCK_ELEMENTS // m.cols)
    row_bytes = m.cols * DTYPE_BYTES[m.dtype]
    for begin in range(0, m.rows, rows):
        end = min(begin + rows, m.rows)
        yield begin, end, begin * row_bytes, end * row_bytes


def check_finite(values: F32, where: str) -> F32:
    """Returns the values if they are plausible weights. Raises CheckpointError naming `where`."""
    if not (np.abs(values) < 1e30).all():  # excludes NaN and infinity too
        raise CheckpointError(
            f"{where}: has values that are not finite or are implausibly large; the source is damaged"
        )
    return values
