"""The executable specification: every op in NumPy, float32, the obvious way. Slow; `cpu` is tested against it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from ..formats import Activation, Bytes, ExpertFormat, MatrixFormat
from ..formats.numbers import F32, I64, KeyValues, from_bf16, from_int8_rows, to_bf16, to_int8_rows
from . import Arena, AttentionWeights, DeltaWeights, ExpertBlock, HostArrays, Weight

__all__ = ["ReferenceOps", "gated_delta"]


def _sigmoid(x: F32) -> F32:
    return (1 / (1 + np.exp(-np.clip(x, -88, 88)))).astype(np.float32)


def _silu(x: F32) -> F32:
    return x * _sigmoid(x)


# How keys and values are stored, by the cache's dtype.
_KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "uint16": (to_bf16, from_bf16),
    "uint8": (to_int8_rows, from_int8_rows),
}


class ReferenceOps(HostArrays):
    """Implements `ops.Ops`, which documents every method."""

    fingerprint = description = "reference"

    def bind(self, weight: Weight) -> Weight:
        weight.handle = weight.format.dequantize(weight.parts)
        return weight

    def embed(self, weight: Weight, tokens: I64) -> F32:
        return _matrix(weight)[tokens].copy()

    def tile(self, format: ExpertFormat, arena: Arena, offsets: I64) -> None:
        memory = arena.view()
        for m, starts in _by_matrix(format, offsets):
            parts = [memory[at : at + size].copy() for at, size in zip(starts, m.part_bytes, strict=False)]
            for at, part in zip(starts, m.tile(parts), strict=False):
                memory[at : at + part.shape[0]] = part

    def tiled(self, format: MatrixFormat, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        return format.tile(parts)

    def project(self, x: F32, weights: list[Weight]) -> list[F32]:
        return [_linear(x, w) for w in weights]

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * weight  # type: ignore[no-any-return]

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
        T, d, kv_heads = q.shape[0], w.head_dim, w.kv_heads
        gate = None
        if w.gated:
            q, gate = np.moveaxis(q.reshape(T, w.heads, 2, d), 2, 0)  # (T, heads, d) each
        q, k = q.reshape(T, w.heads, d), k.reshape(T, kv_heads, d)
        q = _rotate(q if w.q_norm is None else self.rms_norm(q, w.q_norm, w.eps), cos, sin)
        k = _rotate(k if w.k_norm is None else self.rms_norm(k, w.k_norm, w.eps), cos, sin)
        encode, decode = _KEPT.get(keys.dtype.name, (np.asarray, np.asarray))
        begin, end = position - first, position - first + T  # rows of this call
        keys[:, begin:end] = encode(k).transpose(1, 0, 2)
        values[:, begin:end] = encode(v.reshape(T, kv_heads, d)).transpose(1, 0, 2)
        seen_k, seen_v = decode(keys[:, :end]), decode(values[:, :end])  # (kv_heads, L, d)
        grouped = q.reshape(T, kv_heads, w.heads // kv_heads, d)
        scores = np.einsum("tkgd,kld->kgtl", grouped, seen_k) * np.float32(d**-0.5)
        row, own = np.arange(end), np.arange(begin, end)[:, None]
        hidden = row > own  # (T, L)
        if w.window:
            hidden |= row <= own - w.window
        scores = np.where(hidden, -np.inf, scores)
        if w.sinks is not None:
            sinks = np.broadcast_to(w.sinks.reshape(kv_heads, -1, 1, 1), (*scores.shape[:3], 1))
            scores = np.concatenate([scores, sinks], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)[..., :end]
        out: F32 = np.einsum("kgtl,kld->tkgd", weights, seen_v).reshape(T, w.heads, d)
        return (out if gate is None else out * _sigmoid(gate)).reshape(T, w.heads * d)

    def delta_net(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, conv_state: F32, state: F32, chunked: bool
    ) -> F32:
        T, keys = qkv.shape[0], w.key_heads * w.key_dim
        mixed = _conv(qkv, w.conv, conv_state)
        q, k, v = mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :]
        q = _unit(q.reshape(T, w.key_heads, w.key_dim)) * np.float32(w.key_dim**-0.5)
        k = _unit(k.reshape(T, w.key_heads, w.key_dim))
        v = v.reshape(T, w.value_heads, -1)
        g = (-np.exp(w.a_log) * np.logaddexp(0, a + w.dt_bias)).astype(np.float32)
        out = gated_delta(q, k, v, g, _sigmoid(b), state, chunked)
        normed = self.rms_norm(out, w.norm, w.eps)
        return normed.reshape(z.shape) * _silu(z)

    def route(self, x: F32, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[F32, I64]:
        logits = _linear(x, weight)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        selected = np.sort(np.argsort(-probs, -1, kind="stable")[:, :top_k], -1)
        weights = np.take_along_axis(probs, selected, -1)
        return weights / weights.sum(-1, keepdims=True) if renormalize else weights, selected

    def shared_expert(self, x: F32, gate: Weight, up: Weight, down: Weight, scale: Weight) -> F32:
        hidden = _silu(x @ _matrix(gate).T) * (x @ _matrix(up).T)
        out = cast(F32, _sigmoid(x @ _matrix(scale).T) * (hidden @ _matrix(down).T))
        return out

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        memory, format = block.arena.view(), block.format
        y = np.empty((pair_token.shape[0], x.shape[1]), np.float32)
        for e, offsets in enumerate(block.offsets):
            matrices, biases = [], []
            for m, starts in _by_matrix(format, offsets):
                parts = [memory[at : at + size] for at, size in zip(starts, m.tiled_bytes, strict=False)]
                matrices.append(m.dequantize(m.untile(parts)))
                last = memory[starts[-1] : starts[-1] + 4 * m.rows]
                biases.append(np.ascontiguousarray(last).view(np.float32) if format.bias_dtype else np.float32(0))
            gate, up, down = matrices
            pairs = slice(pair_start[e], pair_start[e + 1])
            xs = x[pair_token[pairs]]
            y[pairs] = _activate(format.activation, xs @ gate.T + biases[0], xs @ up.T + biases[1]) @ down.T + biases[2]
        return y

    def moe(self, acc: F32, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: F32) -> None:
        self.accumulate(acc, self.experts(x, block, pair_start, pair_token), pair_token, weights)

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        for token, weight, row in zip(pair_token, weights, y, strict=True):
            acc[token] += weight * row


def _matrix(weight: Weight) -> F32:
    """The dequantized matrix, as stored by bind()."""
    return cast(F32, weight.handle)


def _linear(x: F32, weight: Weight) -> F32:
    y: F32 = x @ _matrix(weight).T
    return y if weight.bias is None else y + weight.bias


def _by_matrix(format: ExpertFormat, offsets: I64) -> Iterator[tuple[MatrixFormat, I64]]:
    """Each matrix of an expert and the offsets of its parts, a bias last."""
    at = 0
    for m in format.matrices:
        count = len(m.parts) + bool(format.bias_dtype)
        yield m, offsets[at : at + count]
        at += count


def _activate(how: Activation, gate: F32, up: F32) -> F32:
    """Applies a formats.Activation."""
    if not how.limit:
        return _silu(gate) * up
    gate, up = np.minimum(gate, np.float32(how.limit)), np.clip(up, -how.limit, how.limit)
    return (up + 1) * gate * _sigmoid(np.float32(how.alpha) * gate)


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate-half on the first 2·half values of x (T, heads, d); cos, sin (T, half)."""
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, half)
    x1, x2 = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, x[..., 2 * half :]], -1)


def _conv(x: F32, weight: F32, state: F32) -> F32:
    """Causal depthwise convolution and SiLU: x (T, C), weight (kernel, C), state (kernel − 1, C) updated in place."""
    kernel, T = weight.shape[0], x.shape[0]
    padded = np.concatenate([state, x])
    state[:] = padded[T:]
    return _silu(sum(weight[i] * padded[i : i + T] for i in range(kernel)))


def _unit(x: F32) -> F32:
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + np.float32(1e-6))  # type: ignore[no-any-return]


def gated_delta(q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32, chunked: bool) -> F32:
    """q, k (T, Hk, dk), v (T, Hv, dv), g, beta (T, Hv), state (Hv, dk, dv) updated in place. Returns (T, Hv, dv)."""
    repeat = v.shape[1] // q.shape[1]
    q, k = np.repeat(q, repeat, 1), np.repeat(k, repeat, 1)  # (T, Hv, dk)
    rule = _delta_chunk if chunked else _delta_steps
    step = 64 if chunked else q.shape[0]
    parts = [
        rule(q[t : t + step], k[t : t + step], v[t : t + step], g[t : t + step], beta[t : t + step], state)
        for t in range(0, q.shape[0], step)
    ]
    return np.concatenate(parts)


def _delta_steps(q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32) -> F32:
    """One token at a time; q, k (T, H, dk), v (T, H, dv), state (H, dk, dv) in place."""
    out = np.empty_like(v)
    for t in range(q.shape[0]):
        state *= np.exp(g[t])[:, None, None]
        delta = (v[t] - np.einsum("hkv,hk->hv", state, k[t])) * beta[t][:, None]
        state += k[t][:, :, None] * delta[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    return out


def _delta_chunk(q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32) -> F32:
    """_delta_steps unrolled over one chunk: with γ_i = Σ_{m≤i} g_m and S the state before it,
    d_i = β_i(v_i − e^{γ_i} Sᵀk_i) − Σ_{j<i} β_i e^{γ_i−γ_j}(k_i·k_j) d_j, a unit triangular system, and
    out_i = e^{γ_i} Sᵀq_i + Σ_{j≤i} e^{γ_i−γ_j}(q_i·k_j) d_j."""
    T = q.shape[0]
    q, k, v, beta = (np.swapaxes(t, 0, 1) for t in (q, k, v, beta))  # (H, T, …)
    gamma = np.cumsum(g, 0).T  # (H, T)
    lower = np.tril(np.ones((T, T), bool))
    decay = np.exp(np.where(lower, gamma[:, :, None] - gamma[:, None, :], -np.inf))
    among_keys = beta[:, :, None] * decay * (k @ k.swapaxes(1, 2))
    start = np.exp(gamma)[:, :, None]
    d = beta[:, :, None] * (v - start * (k @ state))
    for i in range(1, T):
        d[:, i] -= np.einsum("hj,hjv->hv", among_keys[:, i, :i], d[:, :i])
    out = start * (q @ state) + (decay * (q @ k.swapaxes(1, 2))) @ d
    tail = np.exp(gamma[:, -1:] - gamma)[:, :, None]
    state *= np.exp(gamma[:, -1])[:, None, None]
    state += (k * tail).swapaxes(1, 2) @ d
    return np.ascontiguousarray(out.swapaxes(0, 1), np.float32)
