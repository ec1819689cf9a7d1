"""One expert: three matrices, optional biases, and the activation between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .matrix import MatrixFormat
from .numbers import DTYPE_BYTES

__all__ = ["SWIGLU", "Activation", "ExpertFormat", "ExpertPart"]


class Activation(NamedTuple):
    """The function of gate·x and up·x in an expert.

    limit 0: SwiGLU, silu(gate)·up. Otherwise gpt-oss's: (clamp(up, ±limit) + 1)·g·sigmoid(alpha·g), g = min(gate, limit)."""

    alpha: float = 1.0
    limit: float = 0.0


SWIGLU = Activation()


class ExpertPart(NamedTuple):
    """A part of an expert's record. rows·row_bytes bytes as stored, nbytes in memory."""

    name: str  # such as "gate.weight"
    rows: int
    row_bytes: int
    nbytes: int


@dataclass(frozen=True)
class ExpertFormat:
    """y = down·act(gate·x, up·x); gate and up (I, H), down (H, I). bias_dtype: how each matrix's bias (rows,) is stored, "" for none; in
    memory it is float32."""

    gate: MatrixFormat
    up: MatrixFormat
    down: MatrixFormat
    activation: Activation = SWIGLU
    bias_dtype: str = ""

    @property
    def matrices(self) -> tuple[MatrixFormat, MatrixFormat, MatrixFormat]:
        return self.gate, self.up, self.down

    @property
    def parts(self) -> tuple[ExpertPart, ...]:
        """The parts of gate, up and down in order; a bias follows its matrix."""
        found = []
        for name, m in zip(("gate", "up", "down"), self.matrices, strict=True):
            for part, nbytes in zip(m.parts, m.tiled_bytes, strict=True):
                found.append(ExpertPart(f"{name}.{part.name}", m.rows, part.row_bytes, nbytes))
            if self.bias_dtype:
                found.append(ExpertPart(f"{name}.bias", m.rows, DTYPE_BYTES[self.bias_dtype], 4 * m.rows))
        return tuple(found)

    @property
    def quantized(self) -> bool:
        return any(m.quantized for m in self.matrices)
