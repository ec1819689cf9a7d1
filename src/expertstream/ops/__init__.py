"""The op contract: what a model may compute, and what it computes with. `reference` is the specification, `cpu` the fast one.

Activations are float32, C-contiguous; T is tokens, H hidden size. Ops return new arrays except where they say "in place".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "F32",
    "I64",
    "AttentionWeights",
    "DeltaWeights",
    "ExpertBlock",
    "ExpertFormat",
    "MatrixFormat",
    "Ops",
    "Weight",
    "aligned_empty",
    "from_bf16",
    "make_ops",
    "to_bf16",
    "to_f32",
]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
DTYPE_BYTES = {"f32": 4, "bf16": 2, "f16": 2}


TILE_ROWS = 16


@dataclass(frozen=True)
class MatrixFormat:
    """What the bytes of one matrix mean: (rows, cols), out by in.

    bits 2, 4, 8: affine, w = q·scale + bias a group, or symmetric, w = (q − 2^(bits−1))·scale with no bias stored; `dtype` is
    the scales'. 16, 32: dense, `dtype` is the values'.
    """

    rows: int
    cols: int
    bits: int
    group_size: int
    dtype: str
    symmetric: bool = False

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def data_bytes(self) -> int:
        return self.rows * self.cols * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        return self.rows * (self.cols // self.group_size) * DTYPE_BYTES[self.dtype] if self.quantized else 0

    @property
    def bias_bytes(self) -> int:
        return 0 if self.symmetric else self.scale_bytes

    @property
    def part_bytes(self) -> tuple[int, int, int]:
        """Bytes of the values, the scales and the biases, as checkpoints store them."""
        return self.data_bytes, self.scale_bytes, self.bias_bytes

    @property
    def tiled_bytes(self) -> tuple[int, int, int]:
        """Bytes of the parts as kernels read them: a quantized matrix's rows in tiles of 16, the last one padded."""
        if not self.quantized:
            return self.part_bytes
        data, scales, biases = self.part_bytes
        rows = -(-self.rows // TILE_ROWS) * TILE_ROWS
        return data // self.rows * rows, scales // self.rows * rows, biases // self.rows * rows

    @property
    def nbytes(self) -> int:
        return sum(self.part_bytes)


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
    """One matrix in memory. data, scales, biases: flat uint8, row after row as checkpoints have them (MLX's order of bits)."""

    format: MatrixFormat
    data: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    biases: NDArray[np.uint8]
    handle: Any = field(default=None, repr=False)  # what an Ops made of it


class ExpertBlock(NamedTuple):
    """Experts that lie in an arena: offsets (experts, 9) of data, scales and biases of gate, up and down, quantized ones in tiles
    (reference.untile says which byte is what)."""

    format: ExpertFormat
    arena: Any  # _native.Arena
    offsets: I64


@dataclass(eq=False)
class AttentionWeights:
    """What attention needs beside its projections: norms (head_dim,) of queries and keys."""

    q_norm: F32
    k_norm: F32
    heads: int
    eps: float
    handle: Any = field(default=None, repr=False)


@dataclass(eq=False)
class DeltaWeights:
    """What a gated-delta layer needs beside its projections; C = 2·key_heads·key_dim + value_heads·value_dim channels."""

    conv: F32  # (kernel, C)
    a_log: F32  # (value_heads,)
    dt_bias: F32  # (value_heads,)
    norm: F32  # (value_dim,)
    key_heads: int
    value_heads: int
    key_dim: int
    eps: float
    handle: Any = field(default=None, repr=False)


class Ops(Protocol):
    """The contract. An implementation keeps no state but threads and buffers; calls come one at a time."""

    def bind(self, weight: Weight) -> Weight:
        """Prepares a weight for the other ops; returns it. Its bytes are the op's from now on, and may be rearranged."""

    def tile(self, format: ExpertFormat, arena: Any, offsets: I64) -> None:
        """In place: one expert's quantized matrices, row after row in an arena at offsets (9,), into the tiles of ExpertBlock."""

    def embed(self, weight: Weight, tokens: I64) -> F32:
        """(T,) → (T, H), rows of the weight."""

    def project(self, x: F32, weights: list[Weight]) -> list[F32]:
        """x·wᵀ for each of several weights: (T, cols) → (T, rows)."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x·rsqrt(mean(x²) + eps)·weight over the last axis; weight includes any +1."""

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
        """Grouped-query attention with an output gate. q_gate (T, heads·2·d): each head's query, then its gate; k, v
        (T, kv_heads·d). Queries and keys are normed, and rotated by halves in their first 2·half values (cos, sin (T, half)); k, v
        are appended at `position` of keys, values (kv_heads, capacity, d; float32, or bfloat16 bits; or uint8 rows of d + 4, see
        to_int8_rows()); queries attend causally, scaled by d^-½; times sigmoid(gate). Returns (T, heads·d)."""

    def delta_net(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, conv_state: F32, state: F32, chunked: bool
    ) -> F32:
        """The gated delta rule. qkv (T, C), whose memory may be used up, goes through a causal depthwise convolution and SiLU;
        queries and keys get unit length, queries a factor d^-½; with the log decay g = −exp(a_log)·softplus(a + dt_bias) and
        beta = sigmoid(b), a token at a time or in chunks of 64: S ← e^g S; d = (v − Sᵀk)·beta; S ← S + k dᵀ; o = Sᵀq. Returns
        rms_norm(o)·silu(z), (T, Hv·dv). conv_state (kernel − 1, C) and state (Hv, dk, dv) are updated in place."""

    def route(self, x: F32, weight: Weight, top_k: int) -> tuple[F32, I64]:
        """softmax(x·wᵀ) over all experts, the top_k largest, divided by their sum: routing_weights, selected_experts (T, top_k), experts
        in ascending order."""

    def shared_expert(self, x: F32, gate: Weight, up: Weight, down: Weight, scale: Weight) -> F32:
        """sigmoid(x·scaleᵀ)·down(silu(gate(x))·up(x)): (T, H) → (T, H); scale has one row."""

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        """(pairs, H): row p is its expert applied to x[pair_token[p]]. Expert e of the block has pairs
        [pair_start[e], pair_start[e+1])."""

    def moe(self, acc: F32, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: F32) -> None:
        """experts() and accumulate() in one: in place, acc[pair_token[p]] += weights[p]·(its expert applied to x[pair_token[p]])."""

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        """In place, p ascending: acc[pair_token[p]] += weights[p]·y[p]."""


def aligned_empty(size: int) -> NDArray[np.uint8]:
    """Memory that begins at a cache line, so that no vector of a matrix lies across two."""
    room = np.empty(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def from_bf16(bits: NDArray[np.uint16]) -> F32:
    """bfloat16 bits → float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: F32) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def to_int8_rows(x: F32) -> NDArray[np.uint8]:
    """(…, d) → (…, d + 4): int8 values, the largest ±127, and behind them the float32 that they are times."""
    step = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
    inverse = np.where(step > 0, np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-38)), 0)
    values = np.rint(x * inverse.astype(np.float32)).astype(np.int8).view(np.uint8)
    return np.concatenate([values, np.ascontiguousarray(step).view(np.uint8)], -1)


def from_int8_rows(rows: NDArray[np.uint8]) -> F32:
    """The values that to_int8_rows() left: (…, d + 4) → (…, d)."""
    step = np.ascontiguousarray(rows[..., -4:]).view(np.float32)
    return rows[..., :-4].view(np.int8).astype(np.float32) * step


def to_f32(raw: NDArray[np.uint8], dtype: str) -> F32:
    """Flat bytes of bf16, f16 or f32 → float32, flat."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bf16":
        return from_bf16(raw.view(np.uint16))
    return np.asarray(raw.view(np.float16 if dtype == "f16" else np.float32), np.float32)


def make_ops(name: str, threads: int, isa: str, activation_bits: int = 8) -> Ops:
    """ "cpu" or "reference". Raises UsageError for an instruction set that this machine does not have."""
    if name == "reference":
        from .reference import ReferenceOps

        return ReferenceOps()
    from .cpu import CpuOps

    return CpuOps(threads, isa, activation_bits)
