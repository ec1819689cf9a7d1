"""Predicts a model's speed on this machine from measured rates and its sizes, before any download.

The time of a decoded token is the time to read the weights it touches from memory plus the disk time of the missing experts, minus
their overlap. In this engine, cached experts and the shared expert are computed while others arrive, and the token mixer of the next
layer runs while correctly predicted experts are prefetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.format import record_pieces
from ..checkpoint.quantize import BitPolicy
from ..checkpoint.reader import open_checkpoint
from ..config import DEFAULT_CHUNK, DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig
from ..errors import BudgetError
from ..experts.budget import plan_with_chunk
from ..kv_cache import state_bytes
from ..layers import DecoderConfig
from ..models import config_of, expert_layouts, read_config, scratch_bytes
from .costs import TokenCost, token_cost
from .geometry import geometry_config
from .speed import trunk_formats_of
from .synth import expert_format, trunk_formats

__all__ = ["Machine", "Prediction", "load_model", "predict"]

# Hit rate of S3-FIFO by share of the experts that fit, replayed on a public trace of Kimi-Linear: 300 tokens, 8 of 256 experts
# (docs/cache-policies.md). Models differ: OLMoE (8 of 64) hits 43, 61 and 81 % at an eighth, a quarter and a half. With uniform routing
# the hit rate is the share itself.
REAL_ROUTING = ((0.0, 0.0), (0.0625, 0.47), (0.125, 0.60), (0.25, 0.74), (0.5, 0.87), (1.0, 1.0))


@dataclass(frozen=True)
class Machine:
    """Measured rates: bytes per second of memory and disk, peak multiply-adds per second."""

    memory_rate: float
    disk_rate: float
    arithmetic_rate: float


@dataclass(frozen=True)
class Model:
    """The sizes of a model."""

    name: str
    config: DecoderConfig
    cost: TokenCost
    trunk_bytes: int  # in memory, including the embedding
    slot_bytes: int
    model_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What to expect of one memory budget."""

    budget_bytes: int
    slots: int
    hit_rate: float
    missed_bytes: float  # per token
    decode_tps: float
    prefill_tps: float
    ttft_seconds: float  # of a prompt of `prompt_tokens`
    bound: str  # what limits decoding


def load_model(name: str, layers: int, policy: BitPolicy) -> Model:
    """A checkpoint folder as it is, or a geometry as `convert` with this policy would write it. Raises UsageError, CheckpointError."""
    path = Path(name)
    if (path / "config.json").is_file() and not layers and any(path.glob("*.safetensors")):
        checkpoint = open_checkpoint(path)
        c = config_of(checkpoint)
        trunk, layouts = trunk_formats_of(checkpoint, c), expert_layouts(c, checkpoint)
        expert = sum(m.nbytes for layout in layouts for m in layout.format.matrices) // len(layouts)
        slot = max(layout.bytes_per_expert for layout in layouts)
    else:
        c = read_config(geometry_config(name, layers), name)
        trunk, format = trunk_formats(c, policy, "bf16"), expert_format(c, policy, "bf16")
        expert, slot = sum(m.nbytes for m in format.matrices), record_pieces(format)[1]
    trunk_bytes = sum(m.nbytes for m in trunk.values())
    total = trunk_bytes + c.num_hidden_layers * c.num_experts * slot
    return Model(name, c, token_cost(c, trunk, expert), trunk_bytes, slot, total)


def hit_rate_of(share: float, routing: str) -> float:
    if routing == "uniform":
        return min(1.0, share)
    for (x0, y0), (x1, y1) in pairwise(REAL_ROUTING):
        if share <= x1:
            return y0 + (y1 - y0) * max(0.0, share - x0) / (x1 - x0)
    return 1.0


def predict(
    model: Model,
    machine: Machine,
    budget_bytes: int,
    context: int = DEFAULT_CONTEXT,
    prompt_tokens: int = 2048,
    routing: str = "real",
    threads: int = 1,
) -> Prediction | None:
    """None if the budget is too small for the trunk, the context and one layer's experts."""
    c, cost = model.config, model.cost
    settings = EngineConfig(context_length=context, memory_bytes=budget_bytes)
    try:
        plan, chunk = plan_with_chunk(
            lambda tokens: scratch_bytes(c, tokens, context, threads),
            min(settings.prefill_chunk or DEFAULT_CHUNK, -(-context // LEAST_CHUNK) * LEAST_CHUNK),
            LEAST_CHUNK,
            memory_bytes=budget_bytes,
            available_bytes=budget_bytes,
            trunk_bytes=model.trunk_bytes,
            state_bytes=state_bytes(c.states, context, settings.kv_dtype),
            slot_bytes=model.slot_bytes,
            layers=c.num_hidden_layers,
            num_experts=c.num_experts,
            top_k=c.num_experts_per_tok,
            residency="slots",
            direct=True,
            prefetch=settings.prefetch,
        )
    except BudgetError:
        return None
    cached = plan.slots - plan.ring_slots
    hit = hit_rate_of(min(1.0, cached / plan.total_experts), routing)
    missed = (1 - hit) * cost.experts * model.slot_bytes
    # Decode: memory time of the bytes touched plus disk time, part of which overlaps with computing experts.
    touched = cost.bytes + cost.kv_bytes * min(context, 1024)
    compute = touched / (MEMORY_REACH * machine.memory_rate)
    disk = missed / (DISK_REACH * machine.disk_rate) if missed else 0.0
    hidden = min(disk, compute) * HIDDEN_SHARE
    decode = compute + disk - hidden
    # Prefill: arithmetic, or reading every touched expert once per chunk, whichever takes longer: they overlap.
    pairs = min(chunk, prompt_tokens) * c.num_experts_per_tok
    touched_experts = c.num_experts * (1 - (1 - 1 / c.num_experts) ** pairs)
    chunks = -(-prompt_tokens // chunk)
    from_disk = (
        max(0.0, touched_experts - cached / c.num_hidden_layers) * c.num_hidden_layers * model.slot_bytes * chunks
    )
    arithmetic = (
        (cost.multiply_adds - cost.head_multiply_adds) * prompt_tokens / (PREFILL_REACH * machine.arithmetic_rate)
    )
    prefill = max(arithmetic, from_disk / machine.disk_rate)
    bound = "memory" if disk < compute else "disk"
    return Prediction(
        budget_bytes, plan.slots, hit, missed, 1 / decode, prompt_tokens / prefill, prefill + decode, bound
    )


# The share of each limit that the engine reaches. Measured (docs/log.md): of memory bandwidth with resident experts, and of the arithmetic
# peak in a long prompt. Assumed: of the disk's steady rate with a layer's misses in flight, and the share of the shorter of computing and
# reading that overlaps with the longer. docs/measuring.md compares the resulting predictions with measurements.
MEMORY_REACH, DISK_REACH, PREFILL_REACH, HIDDEN_SHARE = 0.93, 0.9, 0.40, 0.45


def advice(model: Model, machine: Machine, budget_bytes: int, **options: Any) -> list[tuple[str, float]]:
    """(change, factor by which decoding would be faster), the most useful first."""
    base = predict(model, machine, budget_bytes, **options)
    if base is None:
        return []
    faster_disk = Machine(machine.memory_rate, 2 * machine.disk_rate, machine.arithmetic_rate)
    faster_memory = Machine(2 * machine.memory_rate, machine.disk_rate, machine.arithmetic_rate)
    changes: list[tuple[str, Prediction | None]] = [
        ("twice the memory", predict(model, machine, 2 * budget_bytes, **options)),
        ("a disk twice as fast", predict(model, faster_disk, budget_bytes, **options)),
        ("memory twice as fast", predict(model, faster_memory, budget_bytes, **options)),
    ]
    found = [(what, p.decode_tps / base.decode_tps) for what, p in changes if p is not None]
    return sorted(found, key=lambda item: -item[1])
