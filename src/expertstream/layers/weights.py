"""Where a model gets its weights from. A model names each of them once, in its constructor: run over a list it says what a checkpoint must
have, run over a checkpoint it loads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..checkpoint.format import WeightSpec
from ..checkpoint.reader import Checkpoint
from ..ops import F32, Ops, Weight
from .basic import Embedding, Linear, RMSNorm

__all__ = ["LoadedWeights", "Weights", "weight_names"]


class Weights(Protocol):
    """The dense part of a model, by canonical names."""

    ops: Ops

    def matrix(self, module: str, rows: int, cols: int) -> Weight:
        """`module`.weight, dense or quantized, as the ops want it. Raises CheckpointError."""

    def vector(self, name: str, *shape: int, kind: str = "vector") -> F32:
        """A tensor that is never quantized. kind: as in WeightSpec. Raises CheckpointError."""

    def linear(self, module: str, rows: int, cols: int) -> Linear:
        return Linear(self.matrix(module, rows, cols), self.ops)

    def embedding(self, module: str, rows: int, cols: int) -> Embedding:
        return Embedding(self.matrix(module, rows, cols), self.ops)

    def norm(self, module: str, size: int, eps: float) -> RMSNorm:
        """A norm whose weight includes its +1, however the checkpoint stores it."""
        return RMSNorm(self.vector(f"{module}.weight", size, kind="norm"), eps, self.ops)


class LoadedWeights(Weights):
    """Read from a checkpoint, and bound by the ops that will use them."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops) -> None:
        self.checkpoint, self.ops = checkpoint, ops

    def matrix(self, module: str, rows: int, cols: int) -> Weight:
        return self.ops.bind(self.checkpoint.weight(module, WeightSpec("matrix", (rows, cols))))

    def vector(self, name: str, *shape: int, kind: str = "vector") -> F32:
        return self.checkpoint.vector(name, WeightSpec(kind, shape))


class _Names(Weights):
    """Notes what is asked for, and gives nothing: for constructors that only keep what they get."""

    def __init__(self) -> None:
        self.ops: Any = None
        self.specs: dict[str, WeightSpec] = {}

    def matrix(self, module: str, rows: int, cols: int) -> Any:
        self.specs[module] = WeightSpec("matrix", (rows, cols))

    def vector(self, name: str, *shape: int, kind: str = "vector") -> Any:
        self.specs[name] = WeightSpec(kind, shape)


def weight_names(build: Callable[[Weights], object]) -> dict[str, WeightSpec]:
    """Every tensor that `build` asks for, in its order: a matrix by its module, whose tensor is `.weight` (and `.scales`, `.biases`), the
    others by their names."""
    names = _Names()
    build(names)
    return names.specs
