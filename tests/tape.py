"""Records a pass of a model once, from the model's own Python, and replays it on other tokens, positions and sequences. Models see arrays
that have neither values nor shapes, so this fails if one looks inside an array or reads a position: a backend could then not record a step
either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from expertstream.batch import Batch
from expertstream.layers import Decoder

__all__ = ["Tape"]

_RESULTS = {
    "embed": 1, "rotary": 2, "rows": 1, "zeros_like": 1, "rms_norm": 1, "attend": 1, "gated_delta": 1, "route": 2, "shared_expert": 1,
    "host": 1,
}  # fmt: skip


class _Value:
    """What an op will return, or an input of the pass. Supports what models may do with arrays: slicing rows and adding in place."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __getitem__(self, rows: slice) -> Any:
        assert isinstance(rows, slice)
        return self.tape.record(lambda x: x[rows], (self,), 1)

    def __iadd__(self, other: _Value) -> _Value:
        self.tape.record(_add, (self, other), 0)
        return self


def _add(x: np.ndarray, y: np.ndarray) -> None:
    x += y


class _Batch(Batch):
    """A batch whose tokens, positions and states are known when it is replayed."""

    def __init__(self, tape: Tape, like: Batch) -> None:
        super().__init__(like.tokens, like.caches, like.prompt)
        self.__enter__()
        self._tape = tape
        self.tokens = tape.tokens  # type: ignore[assignment]

    def positions(self) -> Any:
        return self._tape.positions

    def states(self, layer: int) -> Any:
        return self._tape.record(lambda batch: batch.states(layer), (self._tape.batch,), 1)


class Tape:
    """The ops of a model that is to be recorded (its weights are prepared by `ops`), and its experts, which `experts` computes."""

    def __init__(self, ops: Any, experts: Any) -> None:
        self.ops, self.routed = ops, experts
        self.steps: list[tuple[Callable[..., Any], tuple[Any, ...], _Value | tuple[_Value, ...]]] = []
        self.tokens, self.positions, self.batch = (_Value(self) for _ in range(3))
        self.logits: Any = None

    def __getattr__(self, name: str) -> Any:
        """An op that records itself; what prepares weights does so at once."""
        run = getattr(self.ops, name)
        if name == "project":
            return lambda x, weights: self.record(run, (x, weights), len(weights), one=False)
        if name in _RESULTS:
            return lambda *args: self.record(run, args, _RESULTS[name])
        assert name in ("bind", "tile", "tiled", "fingerprint", "description"), name
        return run

    def record(self, run: Callable[..., Any], args: tuple[Any, ...], results: int, one: bool = True) -> Any:
        values = tuple(_Value(self) for _ in range(results))
        self.steps.append((run, args, values[0] if one and results == 1 else values))
        return values[0] if one and results == 1 else list(values)

    def adapt(self) -> None:
        pass

    def expect(self, *_: Any) -> None:
        raise AssertionError("nothing is prefetched while a pass is recorded")

    def apply(
        self, layer: int, x: Any, weights: Any, selected: Any, prompt: bool, shared: Any, ahead: Any = None
    ) -> Any:
        """experts.RoutedExperts.apply(), as one step: the routing is on the tape, not in Python."""
        added = None if shared is None else shared()

        def run(x: Any, weights: Any, selected: Any, added: Any) -> Any:
            return self.routed.apply(layer, x, weights, selected, prompt, None if added is None else lambda: added)

        return self.record(run, (x, weights, selected, added), 1)

    def record_pass(self, model: Decoder, like: Batch) -> None:
        """Records the pass of a batch with as many sequences and rows as `like`, which is left as it was."""
        positions = [cache.position for cache in like.caches]
        symbolic = _Batch(self, like)
        self.logits = model._forward(symbolic, all_logits=False)
        for i, (run, args, results) in enumerate(self.steps):
            self.steps[i] = run, tuple(self.batch if a is symbolic else a for a in args), results
        for cache, position in zip(like.caches, positions, strict=True):
            assert cache.position == position
            cache.valid = True

    def replay(self, batch: Batch) -> np.ndarray:
        """Logits (S, vocab), as Decoder.forward() returns them. No Python of the model runs."""
        with batch:
            env: dict[_Value, Any] = {self.tokens: batch.tokens, self.positions: batch.positions(), self.batch: batch}

            def known(arg: Any) -> Any:
                if isinstance(arg, (tuple, list)) and any(isinstance(a, _Value) for a in arg):
                    return type(arg)(known(a) for a in arg)
                return env[arg] if isinstance(arg, _Value) else arg

            for run, args, results in self.steps:
                found = run(*map(known, args))
                env.update(
                    [(results, found)] if isinstance(results, _Value) else zip(results, found or (), strict=True)
                )
            logits: np.ndarray = env[self.logits]
            return logits
