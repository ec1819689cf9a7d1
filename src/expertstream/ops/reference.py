"""The executable specification: every op in NumPy, float32, the obvious way. Slow; `cpu` is tested against it."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import F32, I64, ExpertBlock, MatrixFormat, Weight, from_bf16, to_bf16, to_f32

__all__ = ["ReferenceOps", "dequantize"]


def dequantize(format: MatrixFormat, data: Any, scales: Any, biases: Any) -> F32:
    """(rows, cols) float32 from flat bytes: w = q·scale + bias, q least significant bits first."""
    if not format.quantized:
        return to_f32(data, format.dtype).reshape(format.rows, format.cols)
    shifts = np.arange(0, 8, format.bits, dtype=np.uint8)
    q = (np.ascontiguousarray(data)[:, None] >> shifts) & ((1 << format.bits) - 1)
    q = q.reshape(format.rows, -1, format.group_size).astype(np.float32)
    scale = to_f32(scales, format.dtype).reshape(format.rows, -1, 1)
    bias = to_f32(biases, format.dtype).reshape(format.rows, -1, 1)
    return (q * scale + bias).reshape(format.rows, format.cols)


def _sigmoid(x: F32) -> F32:
    return (1 / (1 + np.exp(-np.clip(x, -88, 88)))).astype(np.float32)


def _silu(x: F32) -> F32:
    return x * _sigmoid(x)


class ReferenceOps:
    """The contract of `ops.Ops`, where every method is described."""

    def bind(self, weight: Weight) -> Weight:
        weight.handle = dequantize(weight.format, weight.data, weight.scales, weight.biases)
        return weight

    def embed(self, weight: Weight, tokens: I64) -> F32:
        return weight.handle[tokens].copy()  # type: ignore[no-any-return]

    def linear(self, x: F32, weight: Weight) -> F32:
        return x @ weight.handle.T  # type: ignore[no-any-return]

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.float32(eps)) * weight  # type: ignore[no-any-return]

    def gated_rms_norm(self, x: F32, z: F32, weight: F32, eps: float) -> F32:
        return self.rms_norm(x, weight, eps) * _silu(z)

    def l2_norm(self, x: F32, eps: float, scale: float) -> F32:
        norm = np.sqrt(np.sum(x * x, -1, keepdims=True) + np.float32(eps))
        return x / norm * np.float32(scale)  # type: ignore[no-any-return]

    def rotary(self, x: F32, cos: F32, sin: F32) -> None:
        half = cos.shape[1]
        cos, sin = cos[:, None], sin[:, None]  # (T, 1, half)
        x1, x2 = x[..., :half].copy(), x[..., half : 2 * half].copy()
        x[..., :half] = x1 * cos - x2 * sin
        x[..., half : 2 * half] = x2 * cos + x1 * sin

    def attention(self, q: F32, k: F32, v: F32, gate: F32, keys: Any, values: Any, position: int) -> F32:
        T, heads, d = q.shape
        kv_heads = keys.shape[0]
        encode = to_bf16 if keys.dtype == np.uint16 else np.asarray
        decode = from_bf16 if keys.dtype == np.uint16 else np.asarray
        keys[:, position : position + T] = encode(k).transpose(1, 0, 2)
        values[:, position : position + T] = encode(v).transpose(1, 0, 2)
        seen_k, seen_v = decode(keys[:, : position + T]), decode(values[:, : position + T])  # (kv_heads, L, d)
        grouped = q.reshape(T, kv_heads, heads // kv_heads, d)
        scores = np.einsum("tkgd,kld->kgtl", grouped, seen_k) * np.float32(d**-0.5)
        hidden = np.arange(position + T) > position + np.arange(T)[:, None]  # (T, L)
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
        out = np.einsum("kgtl,kld->tkgd", weights, seen_v).reshape(T, heads, d)
        return out * _sigmoid(gate)  # type: ignore[no-any-return]

    def conv(self, x: F32, weight: F32, state: F32) -> F32:
        kernel, T = weight.shape[0], x.shape[0]
        padded = np.concatenate([state, x])
        state[:] = padded[T:]
        return _silu(sum(weight[i] * padded[i : i + T] for i in range(kernel)))

    def gates(self, a: F32, b: F32, a_log: F32, dt_bias: F32) -> tuple[F32, F32]:
        g = -np.exp(a_log) * np.logaddexp(0, a + dt_bias)
        return g.astype(np.float32), _sigmoid(b)

    def gated_delta(self, q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32, chunked: bool) -> F32:
        repeat = v.shape[1] // q.shape[1]
        q, k = np.repeat(q, repeat, 1), np.repeat(k, repeat, 1)  # (T, Hv, dk)
        rule = _delta_chunk if chunked else _delta_steps
        step = 64 if chunked else q.shape[0]
        parts = [
            rule(q[t : t + step], k[t : t + step], v[t : t + step], g[t : t + step], beta[t : t + step], state)
            for t in range(0, q.shape[0], step)
        ]
        return np.concatenate(parts)

    def route(self, logits: F32, top_k: int) -> tuple[F32, I64]:
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        selected = np.argsort(-probs, -1, kind="stable")[:, :top_k]
        weights = np.take_along_axis(probs, selected, -1)
        return weights / weights.sum(-1, keepdims=True), selected

    def swiglu(self, gate: F32, up: F32) -> F32:
        return _silu(gate) * up

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        memory = block.arena.view()
        y = np.empty((pair_token.shape[0], x.shape[1]), np.float32)
        for e, offsets in enumerate(block.offsets):
            pairs = slice(pair_start[e], pair_start[e + 1])
            matrices = []
            for i, m in enumerate(block.format.matrices):
                data, scales, biases = (
                    memory[at : at + size]
                    for at, size in zip(
                        offsets[3 * i : 3 * i + 3], (m.data_bytes, m.scale_bytes, m.scale_bytes), strict=True
                    )
                )
                matrices.append(dequantize(m, data, scales, biases))
            gate, up, down = matrices
            xs = x[pair_token[pairs]]
            y[pairs] = self.swiglu(xs @ gate.T, xs @ up.T) @ down.T
        return y

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        for token, weight, row in zip(pair_token, weights, y, strict=True):
            acc[token] += weight * row

    def add_shared(self, h: F32, acc: F32, shared: F32, gate_logit: F32) -> None:
        h += acc + _sigmoid(gate_logit) * shared


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
