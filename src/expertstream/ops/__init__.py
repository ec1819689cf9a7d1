"""The op contract: what a model may compute, and what it computes with. `reference` is the specification, `cpu` the fast one.

Activations are float32, C-contiguous; T is tokens, H hidden size. Ops return new arrays except where they say "in place".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "F32",
    "I64",
    "ExpertBlock",
    "ExpertFormat",
    "MatrixFormat",
    "Ops",
    "Weight",
    "from_bf16",
    "make_ops",
    "to_bf16",
    "to_f32",
]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass(frozen=True)
class MatrixFormat:
    """What the bytes of one matrix mean: (rows, cols), out by in.

    bits 2, 4, 8: affine, w = q·scale + bias a group, `dtype` being the scales'; 16, 32: dense, `dtype` being the values'.
    """

    rows: int
    cols: int
    bits: int
    group_size: int
    dtype: str

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def data_bytes(self) -> int:
        return self.rows * self.cols * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales; as many again for the biases."""
        return self.rows * (self.cols // self.group_size) * DTYPE_BYTES[self.dtype] if self.quantized else 0

    @property
    def nbytes(self) -> int:
        return self.data_bytes + 2 * self.scale_bytes


@dataclass(frozen=True)
class ExpertFormat:
    """One expert: y = down·(silu(gate·x) ∘ (up·x)); gate and up (I, H), down (H, I)."""

    gate: MatrixFormat
    up: MatrixFormat
    down: MatrixFormat

    @property
    def matrices(self) -> tuple[MatrixFormat, MatrixFormat, MatrixFormat]:
        return self.gate, self.up, self.down


@dataclass(eq=False)
class Weight:
    """One matrix in memory. data, scales, biases: flat uint8, as the checkpoint has them (MLX's order of bits)."""

    format: MatrixFormat
    data: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    biases: NDArray[np.uint8]
    handle: Any = field(default=None, repr=False)  # what an Ops made of it


@dataclass(frozen=True)
class ExpertBlock:
    """Experts that lie in an arena: offsets (experts, 9) of data, scales and biases of gate, up and down."""

    format: ExpertFormat
    arena: Any  # _native.Arena
    offsets: I64


class Ops(Protocol):
    """The contract. An implementation keeps no state but threads and buffers; calls come one at a time."""

    def bind(self, weight: Weight) -> Weight:
        """Prepares a weight for linear() and embed(); returns it."""

    def embed(self, weight: Weight, tokens: I64) -> F32:
        """(T,) → (T, H), rows of the weight."""

    def linear(self, x: F32, weight: Weight) -> F32:
        """(T, cols) → (T, rows): x·wᵀ."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x·rsqrt(mean(x²) + eps)·weight over the last axis; weight includes any +1."""

    def gated_rms_norm(self, x: F32, z: F32, weight: F32, eps: float) -> F32:
        """rms_norm(x)·silu(z)."""

    def l2_norm(self, x: F32, eps: float, scale: float) -> F32:
        """x·rsqrt(Σx² + eps)·scale over the last axis."""

    def rotary(self, x: F32, cos: F32, sin: F32) -> None:
        """In place: rotate-half on the first 2·half values of x (T, heads, d); cos, sin (T, half)."""

    def attention(self, q: F32, k: F32, v: F32, gate: F32, keys: Any, values: Any, position: int) -> F32:
        """Appends k, v (T, kv_heads, d) at `position` of keys, values (kv_heads, capacity, d; float32, or bfloat16 bits), then
        q (T, heads, d) attends causally, scaled by d^-½; times sigmoid(gate). Returns (T, heads, d)."""

    def conv(self, x: F32, weight: F32, state: F32) -> F32:
        """Causal depthwise convolution and SiLU: x (T, C), weight (kernel, C), state (kernel−1, C) updated in place."""

    def gates(self, a: F32, b: F32, a_log: F32, dt_bias: F32) -> tuple[F32, F32]:
        """g = −exp(a_log)·softplus(a + dt_bias), the log decay, and beta = sigmoid(b); (T, Hv) each."""

    def gated_delta(self, q: F32, k: F32, v: F32, g: F32, beta: F32, state: F32, chunked: bool) -> F32:
        """S ← e^g S; d = (v − Sᵀk)·beta; S ← S + k dᵀ; out = Sᵀq, a token at a time or in chunks of 64. q, k (T, Hk, dk),
        v (T, Hv, dv), g, beta (T, Hv), state (Hv, dk, dv) updated in place. Returns (T, Hv, dv)."""

    def route(self, logits: F32, top_k: int) -> tuple[F32, I64]:
        """softmax over all experts, the top_k largest, divided by their sum: routing_weights, selected_experts (T, top_k)."""

    def swiglu(self, gate: F32, up: F32) -> F32:
        """silu(gate)·up."""

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        """(pairs, H): row p is its expert applied to x[pair_token[p]]. Expert e of the block has pairs
        [pair_start[e], pair_start[e+1])."""

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        """In place, p ascending: acc[pair_token[p]] += weights[p]·y[p]."""

    def add_shared(self, h: F32, acc: F32, shared: F32, gate_logit: F32) -> None:
        """In place: h += acc + sigmoid(gate_logit)·shared; h, acc, shared (T, H), gate_logit (T, 1)."""


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    """bfloat16 bits → float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def to_f32(raw: NDArray[np.uint8], dtype: str) -> F32:
    """Flat bytes of bf16, f16 or f32 → float32, flat."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bf16":
        return from_bf16(raw.view(np.uint16))
    return np.asarray(raw.view(np.float16 if dtype == "f16" else np.float32), np.float32)


def make_ops(name: str, threads: int, isa: str) -> Ops:
    """ "cpu" or "reference". Raises UsageError for an instruction set that this machine does not have."""
    if name == "reference":
        from .reference import ReferenceOps

        return ReferenceOps()
    from .cpu import CpuOps

    return CpuOps(threads, isa)
