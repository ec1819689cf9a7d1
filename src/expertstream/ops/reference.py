"""The executable specification: every op in NumPy, float32, the obvious way. Slow; `cpu` is tested against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import (
    DTYPE_BYTES,
    F32,
    I64,
    AttentionWeights,
    DeltaWeights,
    ExpertBlock,
    ExpertFormat,
    MatrixFormat,
    Weight,
    from_bf16,
    from_int8_rows,
    to_bf16,
    to_f32,
    to_int8_rows,
)

__all__ = ["ReferenceOps", "dequantize", "gated_delta", "tile", "untile"]


def dequantize(format: MatrixFormat, data: Any, scales: Any, biases: Any) -> F32:
    """(rows, cols) float32 from flat bytes, row after row: w = q·scale + bias, q least significant bits first."""
    if not format.quantized:
        return to_f32(data, format.dtype).reshape(format.rows, format.cols)
    shifts = np.arange(0, 8, format.bits, dtype=np.uint8)
    q = (np.ascontiguousarray(data)[:, None] >> shifts) & ((1 << format.bits) - 1)
    q = q.reshape(format.rows, -1, format.group_size).astype(np.float32)
    scale = to_f32(scales, format.dtype).reshape(format.rows, -1, 1)
    if format.symmetric:
        return ((q - np.float32(1 << (format.bits - 1))) * scale).reshape(format.rows, format.cols)
    bias = to_f32(biases, format.dtype).reshape(format.rows, -1, 1)
    return (q * scale + bias).reshape(format.rows, format.cols)


def tile(format: MatrixFormat, data: Any, scales: Any, biases: Any) -> tuple[Any, Any, Any]:
    """A quantized matrix's flat bytes, row after row as checkpoints store them, in the tiles that kernels read; the last one is padded.

    A tile is 16 rows in vectors of 64 bytes, four bytes a row; bits [p·bits, (p+1)·bits) of byte b of vector v are column
    v·32/bits + 4p + b. Scales and biases are (tiles, groups, 16)."""
    m, shifts = format, np.arange(0, 8, format.bits, dtype=np.uint8)
    padded = [
        np.concatenate([np.ascontiguousarray(part).ravel(), np.zeros(size - part.size, np.uint8)])
        for part, size in zip((data, scales, biases), m.tiled_bytes, strict=True)
    ]
    data, scales, biases = padded
    columns = (data[:, None] >> shifts) & ((1 << m.bits) - 1)
    columns = columns.reshape(-1, 16, m.cols * m.bits // 32, 8 // m.bits, 4)  # tile, row, vector, plane, byte
    packed = np.bitwise_or.reduce(columns << shifts[:, None], axis=3).astype(np.uint8)  # tile, row, vector, byte

    def by_group(values: Any) -> Any:
        groups, width = m.cols // m.group_size, DTYPE_BYTES[m.dtype]
        return np.ascontiguousarray(values).reshape(-1, 16, groups, width).transpose(0, 2, 1, 3).ravel()

    return packed.transpose(0, 2, 1, 3).ravel(), by_group(scales), biases if m.symmetric else by_group(biases)


def untile(format: MatrixFormat, data: Any, scales: Any, biases: Any) -> tuple[Any, Any, Any]:
    """Undoes tile(); rows that pad the last tile are dropped."""
    m, shifts = format, np.arange(0, 8, format.bits, dtype=np.uint8)
    tiles = np.ascontiguousarray(data).reshape(-1, m.cols * m.bits // 32, 16, 4)  # tile, vector, row, byte
    columns = (tiles[..., None, :] >> shifts[:, None]) & ((1 << m.bits) - 1)  # tile, vector, row, plane, byte
    rows = columns.transpose(0, 2, 1, 3, 4).reshape(-1, m.cols * m.bits // 8, 8 // m.bits)
    packed = np.bitwise_or.reduce(rows << shifts, axis=-1).astype(np.uint8)

    def by_row(values: Any) -> Any:
        groups, width = m.cols // m.group_size, DTYPE_BYTES[m.dtype]
        parts = np.ascontiguousarray(values).reshape(-1, groups, 16, width).transpose(0, 2, 1, 3)
        return parts.reshape(-1, groups * width)[: m.rows].ravel()

    return packed[: m.rows].ravel(), by_row(scales), biases if m.symmetric else by_row(biases)


def _sigmoid(x: F32) -> F32:
    return (1 / (1 + np.exp(-np.clip(x, -88, 88)))).astype(np.float32)


def _silu(x: F32) -> F32:
    return x * _sigmoid(x)


# How keys and values are kept, by the cache's dtype.
_KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "uint16": (to_bf16, from_bf16),
    "uint8": (to_int8_rows, from_int8_rows),
}


class ReferenceOps:
    """The contract of `ops.Ops`, where every method is described."""

    def bind(self, weight: Weight) -> Weight:
        weight.handle = dequantize(weight.format, weight.data, weight.scales, weight.biases)
        return weight

    def embed(self, weight: Weight, tokens: I64) -> F32:
        return weight.handle[tokens].copy()  # type: ignore[no-any-return]

    def tile(self, format: ExpertFormat, arena: Any, offsets: I64) -> None:
        memory = arena.view()
        for i, m in enumerate(format.matrices):
            if m.quantized:
                starts = offsets[3 * i : 3 * i + 3]
                parts = [memory[at : at + size] for at, size in zip(starts, m.part_bytes, strict=True)]
                for at, part in zip(starts, tile(m, *(part.copy() for part in parts)), strict=True):
                    memory[at : at + part.shape[0]] = part

    def project(self, x: F32, weights: list[Weight]) -> list[F32]:
        return [x @ w.handle.T for w in weights]

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * weight  # type: ignore[no-any-return]

    def attention(
        self,
        w: AttentionWeights,
        q_gate: F32,
        k: F32,
        v: F32,
        cos: F32,
        sin: F32,
        keys: Any,
        values: Any,
        position: int,
    ) -> F32:
        T, kv_heads, d = q_gate.shape[0], keys.shape[0], w.q_norm.shape[0]
        q, gate = np.moveaxis(q_gate.reshape(T, w.heads, 2, d), 2, 0)  # (T, heads, d) each
        q = _rotate(self.rms_norm(q, w.q_norm, w.eps), cos, sin)
        k = _rotate(self.rms_norm(k.reshape(T, kv_heads, d), w.k_norm, w.eps), cos, sin)
        encode, decode = _KEPT.get(keys.dtype.name, (np.asarray, np.asarray))
        keys[:, position : position + T] = encode(k).transpose(1, 0, 2)
        values[:, position : position + T] = encode(v.reshape(T, kv_heads, d)).transpose(1, 0, 2)
        seen_k, seen_v = decode(keys[:, : position + T]), decode(values[:, : position + T])  # (kv_heads, L, d)
        grouped = q.reshape(T, kv_heads, w.heads // kv_heads, d)
        scores = np.einsum("tkgd,kld->kgtl", grouped, seen_k) * np.float32(d**-0.5)
        hidden = np.arange(position + T) > position + np.arange(T)[:, None]  # (T, L)
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
        out = np.einsum("kgtl,kld->tkgd", weights, seen_v).reshape(T, w.heads, d)
        return (out * _sigmoid(gate)).reshape(T, w.heads * d)  # type: ignore[no-any-return]

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

    def route(self, x: F32, weight: Weight, top_k: int) -> tuple[F32, I64]:
        logits = x @ weight.handle.T
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        selected = np.sort(np.argsort(-probs, -1, kind="stable")[:, :top_k], -1)
        weights = np.take_along_axis(probs, selected, -1)
        return weights / weights.sum(-1, keepdims=True), selected

    def shared_expert(self, x: F32, gate: Weight, up: Weight, down: Weight, scale: Weight) -> F32:
        hidden = _silu(x @ gate.handle.T) * (x @ up.handle.T)
        return _sigmoid(x @ scale.handle.T) * (hidden @ down.handle.T)  # type: ignore[no-any-return]

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        memory = block.arena.view()
        y = np.empty((pair_token.shape[0], x.shape[1]), np.float32)
        for e, offsets in enumerate(block.offsets):
            matrices = []
            for i, m in enumerate(block.format.matrices):
                starts = offsets[3 * i : 3 * i + 3]
                parts = [memory[at : at + size] for at, size in zip(starts, m.tiled_bytes, strict=True)]
                matrices.append(dequantize(m, *(untile(m, *parts) if m.quantized else parts)))
            gate, up, down = matrices
            pairs = slice(pair_start[e], pair_start[e + 1])
            xs = x[pair_token[pairs]]
            y[pairs] = (_silu(xs @ gate.T) * (xs @ up.T)) @ down.T
        return y

    def moe(self, acc: F32, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: F32) -> None:
        self.accumulate(acc, self.experts(x, block, pair_start, pair_token), pair_token, weights)

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        for token, weight, row in zip(pair_token, weights, y, strict=True):
            acc[token] += weight * row


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
    """One token after another; q, k (T, H, dk), v (T, H, dv), state (H, dk, dv) in place."""
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
