"""The native ops: shapes here, loops in C++. Quantized products use 16-bit activations and exact integer sums
(native/kernels/kernels.h); everything else is float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _native
from ..errors import UsageError
from . import F32, I64, ExpertBlock, ExpertFormat, MatrixFormat, Weight

__all__ = ["CpuOps"]


def _format(m: MatrixFormat) -> Any:
    return _native.Format(m.rows, m.cols, m.bits, m.group_size, m.dtype)


class CpuOps:
    """Not thread-safe: the threads are inside. `isa` caps the instruction set: the fastest this machine has up to it is taken."""

    def __init__(self, threads: int, isa: str = "") -> None:
        known, available = _native.known_isas(), _native.available_isas()
        if isa and isa not in known:
            raise UsageError(
                f"unknown instruction set {isa!r}; there are {', '.join(known)}, and this machine has {available[-1]}"
            )
        chosen = [name for name in available if not isa or known.index(name) <= known.index(isa)][-1]
        try:
            self.engine = _native.Engine(threads, chosen)
        except RuntimeError as error:
            raise UsageError(f"{threads} threads cannot be started: {error}") from None
        self._formats: dict[ExpertFormat, list[Any]] = {}

    def bind(self, weight: Weight) -> Weight:
        weight.handle = _native.Matrix(_format(weight.format), weight.data, weight.scales, weight.biases)
        return weight

    def embed(self, weight: Weight, tokens: I64) -> F32:
        y = np.empty((tokens.shape[0], weight.format.cols), np.float32)
        self.engine.embed(weight.handle, tokens, y)
        return y

    def linear(self, x: F32, weight: Weight) -> F32:
        y = np.empty((x.shape[0], weight.format.rows), np.float32)
        self.engine.linear(weight.handle, x, y)
        return y

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        y = np.empty_like(x)
        self.engine.rms_norm(x, weight, eps, y)
        return y

    def gated_rms_norm(self, x: F32, z: F32, weight: F32, eps: float) -> F32:
        y = np.empty_like(x)
        self.engine.gated_rms_norm(x, z, weight, eps, y)
        return y

    def l2_norm(self, x: F32, eps: float, scale: float) -> F32:
        y = np.empty_like(x)
        self.engine.l2_norm(x, x.shape[-1], eps, scale, y)
        return y

    def rotary(self, x: F32, cos: F32, sin: F32) -> None:
        self.engine.rotary(x, cos, sin)

    def attention(self, q: F32, k: F32, v: F32, gate: F32, keys: Any, values: Any, position: int) -> F32:
        out = np.empty_like(q)
        self.engine.attention(q, k, v, gate, keys, values, position, q.shape[2] ** -0.5, out)
        return out

    def conv(self, x: F32, weight: F32, state: F32) -> F32:
        y = np.empty_like(x)
        self.engine.conv(x, weight, state, y)
        return y

    def gates(self, a: F32, b: F32, a_log: F32, dt_bias: F32) -> tuple[F32, F32]:
        g, beta = np.empty_like(a), np.empty_like(b)
        self.engine.gates(a, b, a_log, dt_bias, g, beta)
        return g, beta

    def gated_delta(self, q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32, chunked: bool) -> F32:
        out = np.empty_like(v)
        self.engine.gated_delta(chunked, q, k, v, g, beta, state, out)
        return out

    def route(self, logits: F32, top_k: int) -> tuple[F32, I64]:
        weights = np.empty((logits.shape[0], top_k), np.float32)
        selected = np.empty((logits.shape[0], top_k), np.int64)
        self.engine.route(logits, top_k, weights, selected)
        return weights, selected

    def swiglu(self, gate: F32, up: F32) -> F32:
        y = np.empty_like(gate)
        self.engine.swiglu(gate, up, y)
        return y

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        formats = self._formats.get(block.format)
        if formats is None:
            formats = self._formats[block.format] = [_format(m) for m in block.format.matrices]
        y = np.empty((pair_token.shape[0], x.shape[1]), np.float32)
        self.engine.experts(block.arena, formats, block.offsets, x, pair_start, pair_token, y)
        return y

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        self.engine.accumulate(acc, y, pair_token, weights)

    def add_shared(self, h: F32, acc: F32, shared: F32, gate_logit: F32) -> None:
        self.engine.add_shared(h, acc, shared, gate_logit)

    def quantize(self, w: F32, bits: int, group_size: int) -> tuple[Any, Any, Any]:
        """(rows, cols) float32 → packed uint8 (rows, cols·bits/8), scales and biases (rows, groups) as bfloat16 bits."""
        return self.engine.quantize(w, bits, group_size)  # type: ignore[no-any-return]
