"""Predicts a model's speed on this machine from measured rates and its sizes, before any download.

The time of a decoded token is the time to read the weights it touches from memory plus the disk time of the missing experts, minus
their overlap. In this engine, cached experts and the shared expert are computed while others arrive, and the token mixer of the next
layer runs while correctly predicted experts are prefetched. With a GPU, a token takes as long as the kernels of its layers, reading the
weights on the card, reading or computing the experts in the host's memory, and the disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint.format import record_pieces
from ..checkpoint.quantize import BitPolicy
from ..checkpoint.reader import open_checkpoint
from ..config import DEFAULT_CHUNK, DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig
from ..errors import BudgetError
from ..experts.budget import MemoryPlan, plan_beside_vram, plan_vram, plan_with_chunk
from ..kv_cache import AttentionSpec, state_bytes
from ..layers import DecoderConfig
from ..models import config_of, expert_layouts, read_config, scratch_bytes
from .card import Card
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
    vram_experts: int  # on a GPU
    hit_rate: float
    missed_bytes: float  # per token
    decode_tps: float
    prefill_tps: float
    ttft_seconds: float  # of a prompt of `prompt_tokens`
    bound: str  # what limits decoding


def load_model(name: str, layers: int, policy: BitPolicy) -> Model:
    """A checkpoint folder as it is, or a geometry as `convert` with this policy would write it. Raises UsageError, CheckpointError."""
    path = Path(name)
    if (path / "config.json").is_file() and not layers and any(path.rglob("*.safetensors")):
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
    card: Card | None = None,
    vram_bytes: int = 0,
) -> Prediction | None:
    """None if the budget is too small for the trunk, the context and one layer's experts. card: a GPU with everything that fits into
    vram_bytes of it."""
    c = model.config
    states = state_bytes(c.states, context, EngineConfig().kv_dtype)
    sizes: dict[str, Any] = {
        "slot_bytes": model.slot_bytes, "layers": c.num_hidden_layers, "num_experts": c.num_experts, "top_k": c.num_experts_per_tok,
    }  # fmt: skip
    host: dict[str, Any] = {
        "memory_bytes": budget_bytes, "available_bytes": budget_bytes, "residency": "slots", "direct": True,
        "prefetch": EngineConfig().prefetch, **sizes,
    }  # fmt: skip
    near: MemoryPlan | None = None
    try:
        if card is not None:
            near, chunk = plan_vram(
                lambda tokens: scratch_bytes(c, tokens, context, 1), context, 0, vram_bytes=vram_bytes, free_bytes=vram_bytes,
                trunk_bytes=model.trunk_bytes, state_bytes=states, **sizes,
            )  # fmt: skip
            plan = plan_beside_vram(near, state_bytes=0, **host)
        else:
            plan, chunk = plan_with_chunk(
                lambda tokens: scratch_bytes(c, tokens, context, threads), min(DEFAULT_CHUNK, -(-context // LEAST_CHUNK) * LEAST_CHUNK),
                LEAST_CHUNK, trunk_bytes=model.trunk_bytes, state_bytes=states, **host,
            )  # fmt: skip
    except BudgetError:
        return None
    places = _Places(model, plan, near, chunk, routing)
    decode = _decode_seconds(model, machine, card, places, context)
    prefill = _prefill_seconds(model, machine, card, places, prompt_tokens)
    seconds = sum(decode.values()) - min(decode["disk"], sum(decode.values()) - decode["disk"]) * HIDDEN_SHARE
    return Prediction(
        budget_bytes, plan.slots, 0 if near is None else near.slots - near.ring_slots, places.hit, places.missed_bytes, 1 / seconds,
        prompt_tokens / prefill, prefill + seconds, max(decode, key=lambda what: decode[what]),
    )  # fmt: skip


class _Places:
    """Where a model's experts are found: the share of their uses that a GPU serves (near), that any memory does (hit), and the bytes a
    token that come from the disk."""

    def __init__(self, model: Model, plan: MemoryPlan, near: MemoryPlan | None, chunk: int, routing: str) -> None:
        self.chunk, total = chunk, plan.total_experts
        self.host_slots = plan.slots - plan.ring_slots
        self.near_slots = 0 if near is None else near.slots - near.ring_slots
        self.hit = hit_rate_of(min(1.0, (self.host_slots + self.near_slots) / total), routing)
        self.near = hit_rate_of(min(1.0, self.near_slots / total), routing)
        self.missed_bytes = (1 - self.hit) * model.cost.experts * model.slot_bytes


def _decode_seconds(
    model: Model, machine: Machine, card: Card | None, places: _Places, context: int
) -> dict[str, float]:
    """Of a token, by what it waits for. Reading from the disk partly overlaps with the rest; nothing else does."""
    cost = model.cost
    disk = places.missed_bytes / (DISK_REACH * machine.disk_rate)
    cached = cost.kv_bytes * min(context, 1024)
    if card is None:
        return {"memory": (cost.bytes + cached) / (MEMORY_REACH * machine.memory_rate), "disk": disk}
    own = cost.trunk_bytes + cached + places.near * cost.experts * cost.expert_bytes
    far = (places.hit - places.near) * cost.experts * model.slot_bytes
    states = model.config.states
    attention = sum(isinstance(spec, AttentionSpec) for spec in states) if context >= 512 else 0
    layers = len(states) + ATTENTION_LAYERS * attention
    found = {
        "GPU": layers * card.layer_seconds + own / (CARD_REACH * card.memory_rate),
        "disk": disk,
    }
    beside = HOST_REACH * machine.memory_rate
    # Kernels read experts over the link if the memories hold all; the CPU computes those that it is faster with, and all others.
    if places.missed_bytes == 0 and card.link_rate * LINK_REACH >= beside:
        found["link"] = far / (LINK_REACH * card.link_rate)
    else:
        found["memory"] = far / beside
    return found


def _prefill_seconds(model: Model, machine: Machine, card: Card | None, places: _Places, tokens: int) -> float:
    """Arithmetic, or the experts' way to where they are computed, each once a chunk, whichever takes longer: they overlap."""
    c, cost = model.config, model.cost
    pairs = min(places.chunk, tokens) * c.num_experts_per_tok
    touched = c.num_experts * (1 - (1 - 1 / c.num_experts) ** pairs)
    chunks = -(-tokens // places.chunk)

    def moved(slots: int) -> float:
        """Bytes of experts that are not in so many slots."""
        return max(0.0, touched - slots / c.num_hidden_layers) * c.num_hidden_layers * model.slot_bytes * chunks

    products = (cost.multiply_adds - cost.head_multiply_adds) * tokens
    disk = moved(places.host_slots + places.near_slots) / machine.disk_rate
    if card is None:
        return max(products / (PREFILL_REACH * machine.arithmetic_rate), disk)
    link = moved(places.near_slots) / (LINK_REACH * card.link_rate)
    return max(products / (CARD_PREFILL_REACH * card.arithmetic_rate), link, disk)


# The share of each limit that the engine reaches. Measured (docs/log.md): of memory bandwidth with resident experts, and of the arithmetic
# peak in a long prompt. Assumed: of the disk's steady rate with a layer's misses in flight, and the share of the shorter of computing and
# reading that overlaps with the longer. docs/measuring.md compares the resulting predictions with measurements.
MEMORY_REACH, DISK_REACH, PREFILL_REACH, HIDDEN_SHARE = 0.93, 0.9, 0.40, 0.45
# With a GPU: of its memory's rate, of its link, of the arithmetic of one large product, and of the host's memory by experts that the CPU
# computes for it.
CARD_REACH, LINK_REACH, CARD_PREFILL_REACH, HOST_REACH = 0.8, 0.95, 0.35, 0.45
ATTENTION_LAYERS = 1.25  # layers' kernels that attention over some hundred positions takes besides


def advice(model: Model, machine: Machine, budget_bytes: int, **options: Any) -> list[tuple[str, float]]:
    """(change, factor by which decoding would be faster), the most useful first."""
    base = predict(model, machine, budget_bytes, **options)
    if base is None:
        return []
    card: Card | None = options.get("card")
    faster_disk = Machine(machine.memory_rate, 2 * machine.disk_rate, machine.arithmetic_rate)
    faster_memory = Machine(2 * machine.memory_rate, machine.disk_rate, machine.arithmetic_rate)
    changes: list[tuple[str, Prediction | None]] = [
        ("twice the memory", predict(model, machine, 2 * budget_bytes, **options)),
        ("a disk twice as fast", predict(model, faster_disk, budget_bytes, **options)),
        ("memory twice as fast", predict(model, faster_memory, budget_bytes, **options)),
    ]
    if card is not None:
        larger = {**options, "vram_bytes": 2 * options["vram_bytes"]}
        faster = {**options, "card": replace(card, link_rate=2 * card.link_rate)}
        changes.append(("twice the GPU's memory", predict(model, machine, budget_bytes, **larger)))
        changes.append(("a link to the GPU twice as fast", predict(model, machine, budget_bytes, **faster)))
    found = [(what, p.decode_tps / base.decode_tps) for what, p in changes if p is not None]
    return sorted(found, key=lambda item: -item[1])
