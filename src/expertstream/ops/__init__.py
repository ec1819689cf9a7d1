"""The op contract: the operations of a model, and their operands. `reference` is the specification, `cpu` the fast implementation.

Activations are float32, C-contiguous; T is tokens, H hidden size. Ops return new arrays except where they say "in place".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np

from ..batch import Batch
from ..formats import Bytes, ExpertFormat, MatrixFormat
from ..formats.numbers import F32, I64, KeyValues
from ..kv_cache import AttentionState, DeltaState, State, WindowState

__all__ = [
    "F32",
    "I64",
    "Arena",
    "AttentionWeights",
    "Below",
    "BySequence",
    "DeltaWeights",
    "Elsewhere",
    "ExpertBlock",
    "GpuOps",
    "HostArrays",
    "Ops",
    "Weight",
    "aligned_empty",
    "make_ops",
]


Values = TypeVar("Values", F32, I64)


@dataclass(eq=False)
class Weight:
    """One matrix in memory. parts: each flat, row by row as in checkpoints. bias (rows,): added to every product."""

    format: MatrixFormat
    parts: tuple[Bytes, ...]
    bias: F32 | None = None
    handle: object = field(default=None, repr=False)  # set by Ops.bind()

    def rows(self, which: Sequence[int]) -> Weight:
        """A copy of some rows of a weight that is not bound yet."""
        chosen = np.array(which)
        parts = tuple(part.reshape(self.format.rows, -1)[chosen].reshape(-1) for part in self.parts)
        bias = None if self.bias is None else self.bias[chosen]
        return Weight(replace(self.format, rows=len(which)), parts, bias)


class Arena(Protocol):
    """Memory for experts, written by a link and read by kernels."""

    @property
    def size(self) -> int:
        """Bytes."""

    def view(self) -> Bytes:
        """All of it."""


class ExpertBlock(NamedTuple):
    """Experts in an arena: offsets (experts, P) of the format's parts, quantized ones in tiles (see MatrixFormat.tile), biases as
    float32. on_device: they are on the card instead, and offsets are addresses there."""

    format: ExpertFormat
    arena: Arena
    offsets: I64
    on_device: bool = False


@dataclass(eq=False)
class AttentionWeights:
    """Grouped-query attention without its projections. q_norm, k_norm (head_dim,): norms of queries and keys, or None. gated: each head's
    query is followed by an output gate. sinks (heads,): an extra logit among each head's scores that takes weight but has no value (Xiao et
    al., Efficient Streaming Language Models with Attention Sinks, 2023). window: how many positions a query sees, including its own; 0 for
    all before it."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 0.0
    q_norm: F32 | None = None
    k_norm: F32 | None = None
    gated: bool = False
    sinks: F32 | None = None
    window: int = 0
    handle: object = field(default=None, repr=False)


@dataclass(eq=False)
class DeltaWeights:
    """A gated-delta layer without its projections; C = 2·key_heads·key_dim + value_heads·value_dim channels."""

    conv: F32  # (kernel, C)
    a_log: F32  # (value_heads,)
    dt_bias: F32  # (value_heads,)
    norm: F32  # (value_dim,)
    key_heads: int
    value_heads: int
    key_dim: int
    eps: float
    handle: object = field(default=None, repr=False)


class Ops(Protocol):
    """The contract. An implementation has no state but threads and buffers; calls must not overlap."""

    @property
    def fingerprint(self) -> str:
        """Identifies the arithmetic: backends with equal fingerprints give the same bits."""

    @property
    def description(self) -> str:
        """Human-readable: instruction set and precision."""

    def bind(self, weight: Weight) -> Weight:
        """Prepares a weight for the other ops; returns it. The ops own its bytes from then on and may rearrange them."""

    def tile(self, format: ExpertFormat, arena: Arena, offsets: I64) -> None:
        """In place: one expert's quantized matrices, row by row at offsets (P,) in an arena → the tiles of ExpertBlock."""

    def tiled(self, format: MatrixFormat, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        """Copies of a matrix's parts, as MatrixFormat.tile() returns them."""

    def attach(self, arena: Arena) -> None:
        """Announces an arena whose experts will be computed."""

    def detach(self, arena: Arena) -> None:
        """Undoes attach(): afterwards parts of the arena may be released."""

    def state(self, shape: Sequence[int], dtype: str) -> KeyValues:
        """Zeros, for the state of a sequence: in this backend's memory, to be indexed as kv_cache.State does."""

    def embed(self, weight: Weight, tokens: I64) -> F32:
        """(T,) → (T, H), rows of the weight."""

    def project(self, x: F32, weights: list[Weight]) -> list[F32]:
        """x·wᵀ for each of several weights: (T, cols) → (T, rows)."""

    def rotary(self, positions: I64, frequencies: Sequence[float], scale: float) -> tuple[F32, F32]:
        """cos and sin (T, dims/2) of position·frequency, times scale. The angle is rounded to float32 first, as `transformers` does: at
        large positions this makes the largest difference."""

    def rows(self, x: F32, which: Sequence[int]) -> F32:
        """Some rows of x; x itself if these are all of them, in order."""

    def zeros_like(self, x: F32) -> F32:
        """Zeros of the shape of x."""

    def empty_rows(self, count: int, like: F32) -> F32:
        """(count, H), to be filled by put_rows()."""

    def put_rows(self, to: F32, which: I64, rows: F32) -> None:
        """In place: to[which] ← rows."""

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        """x·rsqrt(mean(x²) + eps)·weight over the last axis; weight includes any +1."""

    def attend(
        self,
        w: AttentionWeights,
        q: F32,
        k: F32,
        v: F32,
        angles: tuple[F32, F32],
        states: Sequence[State],
        batch: Batch,
    ) -> F32:
        """Grouped-query attention of all rows of a batch, each sequence on its own state, in which k and v are stored. Shapes as in
        BySequence.attention(). Positions are the batch's: a backend may have them in its own memory."""

    def gated_delta(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, states: Sequence[State], batch: Batch
    ) -> F32:
        """The gated delta rule for all rows of a batch, each sequence on its own state, in chunked form for a prompt. Shapes as in
        BySequence.delta_net()."""

    def host(self, x: Values) -> Values:
        """The values of an array, for Python to read: which experts a router selected, with which weights."""

    def route(self, x: F32, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[F32, I64]:
        """softmax(x·wᵀ + bias) over all experts, the top_k largest, divided by their sum if `renormalize`: routing_weights,
        selected_experts (T, top_k), experts in ascending order."""

    def shared_expert(self, x: F32, gate: Weight, up: Weight, down: Weight, scale: Weight) -> F32:
        """sigmoid(x·scaleᵀ)·down(silu(gate(x))·up(x)): (T, H) → (T, H); scale has one row."""

    def experts(self, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64) -> F32:
        """(pairs, H): row p is the expert of pair p (formats.ExpertFormat) applied to x[pair_token[p]]. Expert e of the block has pairs
        [pair_start[e], pair_start[e+1])."""

    def moe(self, acc: F32, x: F32, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: F32) -> None:
        """experts() and accumulate() in one: in place, acc[pair_token[p]] += weights[p]·(its expert applied to x[pair_token[p]])."""

    def accumulate(self, acc: F32, y: F32, pair_token: I64, weights: F32) -> None:
        """In place, p ascending: acc[pair_token[p]] += weights[p]·y[p]."""

    recording: object | None
    """Not None while a pass is being recorded."""

    def recorded(self, batch: Batch, run: Callable[[Batch], F32], elsewhere: Elsewhere) -> tuple[F32, I64, I64] | None:
        """A batch of single tokens by a recording of run(batch): logits, the experts selected in each layer (layers, T, top_k), and how
        many of each layer the host computed (layers,). None if this backend has no recording of it; then the pass is to be run."""

    def wait(self) -> None:
        """Waits for everything that was launched: afterwards the memory that it read may be written."""

    def close(self) -> None:
        """Gives back what the backend holds besides what callers do."""


@dataclass
class Below:
    """Where a layer's experts lie that are not on a card: in an arena, or, if `partial`, elsewhere. last: no layer with experts follows."""

    layer: int
    arena: Arena
    partial: bool
    last: bool


class Elsewhere(Protocol):
    """The experts that a GPU does not have, while a recorded pass runs."""

    @property
    def partial(self) -> bool:
        """Whether there are experts that are neither on the card nor where it can read them: the host computes those."""

    def fetched(self, layer: int, experts: list[int], guess: list[int]) -> Iterator[tuple[list[int], ExpertBlock]]:
        """Experts (ascending) for the host, as they arrive: their positions in the list, and where they are. guess: what the next layer
        will probably select, the most likely first. Raises ReadError."""

    def meanwhile(self) -> None:
        """Called when the host has nothing more to compute for a pass that is still running."""


@runtime_checkable
class GpuOps(Protocol):
    """What the ops of a GPU offer besides Ops. Arrays are on the card, and opaque."""

    @property
    def wait_seconds(self) -> float:
        """How long the host has waited for the card."""

    @property
    def host_computes(self) -> bool:
        """Whether the host may compute experts in recorded passes."""

    def free_bytes(self) -> int:
        """Free memory of the card."""

    def trim(self) -> None:
        """Returns memory to the card that arrays no longer use."""

    def memory(self, size: int) -> Any:
        """Memory of the card, with its `address`."""

    def copy_in(self, to: int, source: Bytes) -> None:
        """Copies host memory to the card, in order with the other work."""

    def mark(self) -> Any:
        """A point behind the work so far."""

    def copies_beside(self, to: Sequence[int], sources: Sequence[int], sizes: Sequence[int], after: Any) -> None:
        """Copies registered host memory, by its addresses, to the card, after the point `after`, if given, and beside the work after it."""

    def copy_out_beside(self, address: int, to: Bytes, after: Any) -> None:
        """Copies the card's memory to registered host memory, likewise."""

    def join(self) -> None:
        """What follows comes after all copies that run beside."""

    def readable(self, arena: Arena) -> int | None:
        """The address at which kernels read an arena; None if they cannot."""

    def send(self, values: Any) -> Any:
        """A NumPy array, copied to the card."""

    def routed(
        self,
        format: ExpertFormat,
        table: Any,
        acc: Any,
        x: Any,
        weights: Any,
        selected: Any,
        in_turn: Callable[[], Iterator[Any]] | None = None,
        below: Below | None = None,
    ) -> None:
        """In place: acc (T, H) += Σ weights·expert(x), with the experts (T, top_k) that the card selected and finds in a table (experts, P)
        of the addresses of their parts. in_turn: yields tables for many tokens, to be used in order: each has some of the experts
        in the card's own memory, and 0 for the others; together they have all. below: for a recorded pass, where experts lie that
        the host may compute."""

    def ahead(self, run: Callable[[], None]) -> None:
        """While a pass is recorded: run() calls route() for the next layer, and guess() with what that returns."""

    def guess(self, weights: Any, selected: Any) -> None:
        """What the next layer will probably select (T, top_k), for Elsewhere.fetched()."""

    def rate(self, some: Sequence[tuple[Any, ExpertBlock]]) -> None:
        """Measures how fast kernels and the host compute experts that lie in an arena, and divides them accordingly in passes that are
        recorded from now on. some: layers' tables (experts, P) of the addresses of experts in the arena, and the same experts there."""


class BySequence(ABC):
    """attend() and gated_delta() for backends that process one sequence after another, as attention() and delta_net() of its rows."""

    @abstractmethod
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
        """Grouped-query attention of one sequence. q (T, heads·d), or (T, heads·2·d) with gates; k, v (T, kv_heads·d). Queries and keys are
        normed if there are norms, and their first 2·half values are rotated by halves (cos, sin (T, half)); k, v are stored from `position`
        on in keys, values (kv_heads, rows, d; float32, or bfloat16 bits; or uint8 rows of d + 4, see to_int8_rows()), whose row 0 is
        position `first`, a multiple of 64; queries attend causally, scaled by d^-½; the output is multiplied by sigmoid(gate). Returns
        (T, heads·d). With a window, rows from the last multiple of 64 at or before its first position must still be present."""

    @abstractmethod
    def delta_net(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, conv_state: F32, state: F32, chunked: bool
    ) -> F32:
        """The gated delta rule for one sequence. qkv (T, C), which may be overwritten, goes through a causal depthwise convolution and
        SiLU; queries and keys are scaled to unit length, queries also by d^-½; with the log decay g = −exp(a_log)·softplus(a + dt_bias) and
        beta = sigmoid(b), a token at a time or in chunks of 64: S ← e^g S; d = (v − Sᵀk)·beta; S ← S + k dᵀ; o = Sᵀq. Returns
        rms_norm(o)·silu(z), (T, Hv·dv). conv_state (kernel − 1, C) and state (Hv, dk, dv) are updated in place."""

    @abstractmethod
    def concatenate(self, parts: list[F32]) -> F32:
        """Rows of several parts (Tᵢ, n), one after another; a single one unchanged."""

    def attend(
        self,
        w: AttentionWeights,
        q: F32,
        k: F32,
        v: F32,
        angles: tuple[F32, F32],
        states: Sequence[State],
        batch: Batch,
    ) -> F32:
        (cos, sin), parts = angles, []
        for state, segment in zip(cast("Sequence[AttentionState | WindowState]", states), batch.segments, strict=True):
            for rows, position in segment.parts(state):
                inputs = q[rows], k[rows], v[rows], cos[rows], sin[rows]
                parts.append(self.attention(w, *inputs, state.keys, state.values, position, state.first))
        return self.concatenate(parts)

    def gated_delta(
        self, w: DeltaWeights, qkv: F32, z: F32, a: F32, b: F32, states: Sequence[State], batch: Batch
    ) -> F32:
        parts = []
        for state, segment in zip(cast("Sequence[DeltaState]", states), batch.segments, strict=True):
            for rows, _ in segment.parts(state):
                inputs = qkv[rows], z[rows], a[rows], b[rows]
                parts.append(self.delta_net(w, *inputs, state.conv_state, state.recurrent_state, batch.prompt))
        return self.concatenate(parts)


class HostArrays(BySequence):
    """The ops that are the same for all backends with NumPy arrays."""

    def rotary(self, positions: I64, frequencies: Sequence[float], scale: float) -> tuple[F32, F32]:
        angle = positions.astype(np.float32)[:, None] * np.array(frequencies, np.float64).astype(np.float32)
        # NumPy's float32 functions differ between processors; its float64 ones, rounded, do not.
        exact = angle.astype(np.float64)
        cos, sin = np.cos(exact).astype(np.float32), np.sin(exact).astype(np.float32)
        return (cos, sin) if scale == 1 else (cos * np.float32(scale), sin * np.float32(scale))

    def concatenate(self, parts: list[F32]) -> F32:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def rows(self, x: F32, which: Sequence[int]) -> F32:
        return x if len(which) == x.shape[0] else np.ascontiguousarray(x[list(which)])

    def zeros_like(self, x: F32) -> F32:
        return np.zeros_like(x)

    def host(self, x: Values) -> Values:
        return x

    def attach(self, arena: Arena) -> None:
        return

    def detach(self, arena: Arena) -> None:
        return

    def state(self, shape: Sequence[int], dtype: str) -> KeyValues:
        return np.zeros(shape, dtype)

    def empty_rows(self, count: int, like: F32) -> F32:
        return np.empty((count, like.shape[1]), np.float32)

    def put_rows(self, to: F32, which: I64, rows: F32) -> None:
        to[which] = rows

    def wait(self) -> None:
        return

    recording: object | None = None

    def recorded(self, batch: Batch, run: Callable[[Batch], F32], elsewhere: Elsewhere) -> tuple[F32, I64, I64] | None:
        return None

    def close(self) -> None:
        return


def aligned_empty(size: int) -> Bytes:
    """Memory aligned to a cache line, so that no vector of a matrix straddles two."""
    room = np.empty(size + 64, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def make_ops(
    name: str, threads: int, isa: str, activation_bits: int = 8, gpu: int | None = None, cpu_experts: str = "auto"
) -> Ops:
    """ "cpu" or "reference"; gpu: the number of a card, on which the ops then run, and cpu_experts: which experts the CPU computes
    nevertheless (EngineConfig). Raises UsageError for an instruction set that this machine does not have, and DeviceError."""
    if name == "reference":
        from .reference import ReferenceOps

        return ReferenceOps()
    if gpu is not None:
        from ..cuda.driver import open_driver
        from .cuda import CudaOps

        return cast(Ops, CudaOps(open_driver(gpu), threads, isa, activation_bits, cpu_experts))
    from .cpu import CpuOps

    return CpuOps(threads, isa, activation_bits)
