"""The source of a model's weights. A model names each of them once, in its constructor: run with a recorder, that lists what a checkpoint
must have; run with a checkpoint, it loads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..checkpoint.format import WeightSpec
from ..checkpoint.reader import Checkpoint
from ..ops import F32, Ops, Weight
from .basic import Embedding, Linear, RMSNorm

__all__ = ["LoadedWeights", "Weights", "weight_names"]


class Weights(Protocol):
    """The dense part of a model, by canonical names."""

    ops: Ops

    def matrices(
        self, module: str, rows: int, cols: int, parts: Sequence[Sequence[int]] | None, bias: bool, sensitive: bool
    ) -> list[Weight]:
        """matrix(), whole or split into the rows that each of `parts` lists."""

    def matrix(self, module: str, rows: int, cols: int, bias: bool = False, sensitive: bool = False) -> Weight:
        """`module`.weight, dense or quantized, bound by the ops; bias: with `module`.bias (rows,). sensitive: the converter never quantizes
        it. Raises CheckpointError."""
        return self.matrices(module, rows, cols, None, bias, sensitive)[0]

    def split(self, module: str, cols: int, parts: Sequence[Sequence[int]], sensitive: bool = False) -> list[Weight]:
        """Several matrices that a checkpoint stores as one: each of `parts` lists the rows of one of them. Raises CheckpointError."""
        return self.matrices(module, sum(map(len, parts)), cols, parts, False, sensitive)

    def vector(self, name: str, *shape: int, kind: str = "vector") -> F32:
        """A tensor that is never quantized. kind: as in WeightSpec. Raises CheckpointError."""

    def linear(self, module: str, rows: int, cols: int, bias: bool = False) -> Linear:
        return Linear(self.matrix(module, rows, cols, bias), self.ops)

    def embedding(self, module: str, rows: int, cols: int) -> Embedding:
        return Embedding(self.matrix(module, rows, cols), self.ops)

    def norm(self, module: str, size: int, eps: float, plus_one: bool = False) -> RMSNorm:
        """plus_one: the architecture multiplies by 1 + weight; the result includes the 1, however the checkpoint stores it."""
        return RMSNorm(self.vector(f"{module}.weight", size, kind="norm" if plus_one else "vector"), eps, self.ops)


class LoadedWeights(Weights):
    """Read from a checkpoint, and bound by the ops that will use them."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops) -> None:
        self.checkpoint, self.ops = checkpoint, ops

    def matrices(
        self, module: str, rows: int, cols: int, parts: Sequence[Sequence[int]] | None, bias: bool, sensitive: bool
    ) -> list[Weight]:
        whole = self.checkpoint.weight(module, WeightSpec("matrix", (rows, cols)))
        if bias:
            whole.bias = self.vector(f"{module}.bias", rows)
        return [self.ops.bind(w) for w in ([whole] if parts is None else [whole.rows(part) for part in parts])]

    def vector(self, name: str, *shape: int, kind: str = "vector") -> F32:
        return self.checkpoint.vector(name, WeightSpec(kind, shape))


class _Names(Weights):
    """Records the requested names and returns placeholders: for constructors that only store their weights."""

    def __init__(self) -> None:
        self.ops: Any = None
        self.specs: dict[str, WeightSpec] = {}

    def matrices(
        self, module: str, rows: int, cols: int, parts: Sequence[Sequence[int]] | None, bias: bool, sensitive: bool
    ) -> Any:
        self.specs[module] = WeightSpec("matrix", (rows, cols), sensitive)
        if bias:
            self.specs[f"{module}.bias"] = WeightSpec("vector", (rows,))
        return [None] * (1 if parts is None else len(parts))

    def vector(self, name: str, *shape: int, kind: str = "vector") -> Any:
        self.specs[name] = WeightSpec(kind, shape)


def weight_names(build: Callable[[Weights], object]) -> dict[str, WeightSpec]:
    """Every tensor that `build` requests, in order: matrices by module, whose tensor is `.weight` (and `.scales`, `.biases`), the others by
    name."""
    names = _Names()
    build(names)
    return names.specs
