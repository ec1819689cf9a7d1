"""The native ops: shapes here, loops in C++. Products with quantized weights round their activations to 8 or 16 bits per group and sum
exact integers (native/kernels/kernels.h); everything else is float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..errors import BudgetError, UsageError
from ..formats import Bytes, ExpertFormat, MatrixFormat
from ..formats.numbers import F32, I64, KeyValues
from . import Arena, AttentionWeights, DeltaWeights, ExpertBlock, HostArrays, Weight, aligned_empty

__all__ = ["CpuOps"]

U16 = NDArray[np.uint16]


def _format(m: MatrixFormat) -> _native.Format:
    return _native.Format(m.rows, m.cols, *m.kernel)


class CpuOps(HostArrays):
    """Not thread-safe: it has its own threads. `isa` limits the instruction set: the fastest available one up to it is used."""

    def __init__(self, threads: int, isa: str = "", activation_bits: int = 8) -> None:
        known, available = _native.known_isas(), _native.available_isas()
        if isa and isa not in known:
            raise UsageError(
                f"unknown instruction set {isa!r}; use one of {', '.join(known)}; this machine has {available[-1]}"
            )
        chosen = [name for name in available if not isa or known.index(name) <= known.index(isa)][-1]
        try:
            self.activation_bits = activation_bits
            self.engine = _native.Engine(threads, chosen, activation_bits)
        except RuntimeError as error:
            raise BudgetError(f"{threads} threads cannot be started ({error}); use fewer, such as threads=1") from None
        # By identity: hashing a format costs as much as a call.
        self._formats: dict[int, tuple[ExpertFormat, _native.ExpertFormat]] = {}

    @property
    def fingerprint(self) -> str:
        return f"cpu, {self.activation_bits}-bit activations"

    @property
    def description(self) -> str:
        return f"{self.engine.isa}, {self.activation_bits}-bit activations"

    def bind(self, weight: Weight) -> Weight:
        m = weight.format
        if m.quantized and m.part_bytes == m.tiled_bytes:
            # In place: a large matrix is never in memory twice.
            self.engine.tile(_format(m), list(weight.parts), list(weight.parts))
        elif m.quantized:
            weight.parts = self.tiled(m, weight.parts)
        weight.handle = _native.Matrix(_format(m), list(weight.parts), weight.bias)
        return weight

    def tiled(self, format: MatrixFormat, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        if not format.quantized:
            return tuple(parts)
        out = tuple(aligned_empty(size) for size in format.tiled_bytes)
        self.engine.tile(_format(format), list(parts), list(out))
        return out

    def tile(self, format: ExpertFormat, arena: Arena, offsets: I64) -> None:
        memory, first = arena.view(), 0
        for m in format.matrices:
            starts = offsets[first : first + len(m.parts)]
            first += len(m.parts) + bool(format.bias_dtype)
            if not m.quantized:
                continue
            parts = [memory[at : at + size] for at, size in zip(starts, m.part_bytes, strict=True)]
            if m.part_bytes == m.tiled_bytes:
                self.engine.tile(_format(m), parts, parts)
                continue
            for at, part in zip(starts, self.tiled(m, [part.copy() for part in parts]), strict=True):
                memory[at : at + part.shape[0]] = part

    def embed(self, weight: Weight, tokens: I64) -> F32:
        y = np.empty((tokens.shape[0], weight.format.cols), np.float32)
        self.engine.embed(weight.handle, tokens, y)
        return y

    def project(self, x: F32, weights: list[Weight]) -> list[F32]:
        return self.engine.project([w.handle for w in weights], x)  # type: ignore[no-any-return]

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        y = np.empty_like(x)
        self.engine.rms_norm(x, weight, eps, y)
        return y

    def attention(
        self,
        w: AttentionWeights,
        q: F32,
        k: F32,
        v: F32,
        cos: F32,
        sin: F32,
        keys: KeyValues,
        values: KeyValues,
        position: int,
        first: int = 0,
    ) -> F32:
        if w.handle is None:
            w.handle = _native.Attention(
                w.heads, w.kv_heads, w.head_dim, w.eps, w.q_norm, w.k_norm, w.gated, w.sinks, w.window
            )
        out = np.empty((q.shape[0], w.heads * w.head_dim), np.float32)
        self.engine.attention(w.handle, q, k, v, cos, sin, keys, values, position, first, out)
        return out

    def delta_net(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, conv_state: F32, state: F32, chunked: bool
    ) -> F32:
        if w.handle is None:
            w.handle = _native.DeltaNet(
                w.conv, w.a_log, w.dt_bias, w.norm, w.key_heads, w.value_heads, w.key_dim, w.eps
            )
        out = np.empty_like(z)
        self.engine.delta_net(w.handle, chunked, qkv, z, a, b, conv_state, state, out)
        return out

    def route(self, x: F32, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[F32, I64]:
        weights = np.empty((x.shape[0], top_k), np.float32)
        selected = np.empty((x.shape[0], top_k), np.int64)
        self.engine.route(weight.handle, x, top_k, renormalize, weights, selected)
        return weights, selected

    def shared_expert(self, x: F32, gate: Weight, up: Weight, down: Weight, scale: Weight) -> F32:
        y = np.empty_like(x)
        self.engine.shared_expert(gate.handle, up.handle, down.handle, scale.handle, x, y)
        return y

    def native_format(self, format: ExpertFormat) -> _native.ExpertFormat:
        """An expert's format for the engine, made once."""
        known = self._formats.get(id(format))
        if known is None:
            gate, up, down = map(_format, format.matrices)
            native = _native.ExpertFormat(gate, up, down, bool(format.bias_dtype), *format.activation)
            known = self._formats[id(format)] = format, native
        return known[1]

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        y = np.empty((pair_token.shape[0], x.shape[1]), np.float32)
        self.engine.experts(block.arena, self.native_format(block.format), block.offsets, x, pair_start, pair_token, y)
        return y

    def moe(self, acc: F32, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: F32) -> None:
        self.engine.moe(
            block.arena, self.native_format(block.format), block.offsets, x, pair_start, pair_token, weights, acc
        )

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        self.engine.accumulate(acc, y, pair_token, weights)

    def quantize(self, w: F32, bits: int, group_size: int, symmetric: bool = False) -> tuple[Bytes, U16, U16]:
        """(rows, cols) float32 → packed uint8 (rows, cols·bits/8), scales and biases (rows, groups) as bfloat16 bits."""
        return self.engine.quantize(w, bits, group_size, symmetric)  # type: ignore[no-any-return]
