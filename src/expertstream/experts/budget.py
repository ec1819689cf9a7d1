"""Divides a memory budget: trunk, state and scratch first, the rest for slots. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config import DEFAULT_CHUNK, LEAST_CHUNK
from ..errors import BudgetError
from ..units import format_bytes

__all__ = [
    "MemoryPlan",
    "MemoryWatch",
    "chunk_beside_link",
    "default_budget",
    "for_conversations",
    "plan_beside_vram",
    "plan_memory",
    "plan_vram",
    "plan_with_chunk",
]

_GPU_SCRATCH = 32 << 20  # bytes of a GPU's memory for what scratch_bytes() does not know
_GPU_RING = 168  # slots through which experts pass to a GPU: the spare ones, and a prompt's buffers
_GPU_CHUNK = 32768  # tokens of a prompt in one pass: a launch has at most 65,535 blocks in two of its dimensions
_HOST_SCRATCH = 16 << 20  # bytes of host memory for logits and lists, where a GPU does the rest


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part, and the slots: ring_slots of them pass experts through, the others are cached slots."""

    budget_bytes: int
    available_bytes: int  # when the plan was made
    trunk_bytes: int
    state_bytes: int
    scratch_bytes: int
    slot_bytes: int
    slots: int
    ring_slots: int
    prefetch_slots: int  # ring slots for prefetched experts
    total_experts: int
    residency: str  # slots or os

    @property
    def slots_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def used_bytes(self) -> int:
        return self.trunk_bytes + self.state_bytes + self.scratch_bytes + self.slots_bytes


class MemoryWatch:
    """Returns how many bytes to release, or (negative) how many can be taken back, so that other processes do not run out of memory.

    The reserve for other processes is a twenty-fourth of what was available at the start, at least 32 MiB. default_budget() leaves more
    than that free, so only memory that others take later can use it up. Memory is taken back when four times the reserve is free.
    """

    def __init__(self, available: Callable[[], int], available_at_start: int) -> None:
        self._available = available
        self.reserve_bytes = max(available_at_start // 24, 32 << 20)

    def __call__(self) -> int:
        free = self._available()
        if free < self.reserve_bytes:
            return 2 * self.reserve_bytes - free
        if free > 4 * self.reserve_bytes:
            return 2 * self.reserve_bytes - free
        return 0


def default_budget(available_bytes: int) -> int:
    """The default: all available memory, less a twelfth (at least 48 MiB) for what is not counted."""
    return max(0, available_bytes - max(available_bytes // 12, 48 << 20))


def for_conversations(memory_bytes: int | None, available_bytes: int) -> dict[str, Any]:
    """Engine options for conversations: an eighth of the budget for contexts, and an eighth, at most 4 GiB, for the prefix cache."""
    budget = default_budget(available_bytes) if memory_bytes is None else memory_bytes
    return {"context_memory_fraction": 1 / 8, "prefix_cache_bytes": min(budget // 8, 4 << 30)}


def plan_memory(
    *,
    memory_bytes: int | None,
    available_bytes: int,
    trunk_bytes: int,
    state_bytes: int,
    scratch_bytes: int,
    slot_bytes: int,
    layers: int,
    num_experts: int,
    top_k: int,
    residency: str,
    direct: bool,
    prefetch: int = 0,
    ring_slots: int = 16,
    name: str = "memory",
) -> MemoryPlan:
    """Divides memory_bytes, or default_budget(available_bytes) if that is None. Raises BudgetError, with a value that works, for a budget
    below the floor (everything but the slots, plus one layer's top-k) or above what is available. ring_slots: as many as
    an eighth of the slots allows, and top_k at least. name: of the budget's option."""
    budget = default_budget(available_bytes) if memory_bytes is None else memory_bytes
    fixed = trunk_bytes + state_bytes + scratch_bytes
    floor = fixed + top_k * slot_bytes
    if budget < floor:
        if memory_bytes is not None:
            said = f"{name} is {format_bytes(budget)}"
        else:
            kept = format_bytes(available_bytes - budget)
            said = f"{format_bytes(available_bytes)} are available, of which {kept} are reserved"
        raise BudgetError(
            f"{said}, but this model needs at least {name}={_whole_mib(floor, up=True)}: trunk {format_bytes(trunk_bytes)}, "
            f"context {format_bytes(state_bytes)}, scratch {format_bytes(scratch_bytes)}, "
            f"{top_k} experts of one layer {format_bytes(top_k * slot_bytes)}"
        )
    total = layers * num_experts
    slots = min((budget - fixed) // slot_bytes, total + max(top_k, ring_slots) + prefetch)
    if residency == "auto":
        # Without O_DIRECT the page cache holds a copy of the slots' contents: then use only that copy.
        residency = "slots" if direct or slots >= total else "os"
    ahead = min(prefetch, (slots - top_k) // 8)
    ring = min(slots, max(top_k, min(ring_slots, slots // 8)) + ahead)
    if residency == "os":
        slots = ring = min(slots, max(top_k, ring_slots) + ahead)
    ahead = min(ahead, ring - top_k)
    plan = MemoryPlan(
        budget,
        available_bytes,
        trunk_bytes,
        state_bytes,
        scratch_bytes,
        slot_bytes,
        slots,
        ring,
        ahead,
        total,
        residency,
    )
    if plan.used_bytes > available_bytes:
        raise BudgetError(
            f"{name} of {format_bytes(budget)} would take {format_bytes(plan.used_bytes)}, "
            f"but only {format_bytes(available_bytes)} is available; "
            f"set {name}={_whole_mib(available_bytes - (1 << 20), up=False)} or less, or free some memory"
        )
    return plan


def plan_with_chunk(scratch_of: Callable[[int], int], largest: int, least: int, **sizes: Any) -> tuple[MemoryPlan, int]:
    """The plan with the largest prefill chunk, from `largest` down in steps of `least` tokens, whose scratch leaves the slots at least half
    of what remains after trunk and state; a third if that remainder holds less than a tenth of the experts, since every chunk of a long
    prompt then reads nearly all of them again. scratch_of: bytes for a number of tokens; sizes: plan_memory()'s. Raises BudgetError."""
    chunk = largest
    while True:
        scratch, last = scratch_of(chunk), chunk <= least
        try:
            plan = plan_memory(scratch_bytes=scratch, **sizes)
        except BudgetError:
            if last:
                raise
        else:
            left = plan.budget_bytes - plan.trunk_bytes - plan.state_bytes
            few = 10 * left < plan.total_experts * plan.slot_bytes
            if last or (scratch * 3 <= left * 2 if few else scratch * 2 <= left):
                return plan, chunk
        chunk -= least


def chunk_beside_link(default: int, scratch_of: Callable[[int], int], left: int, experts_bytes: int) -> int:
    """Tokens of a prompt that go through a GPU at once, where experts that it has no room for cross its link once a chunk: more than the
    default if there are such experts and an eighth of `left`, what trunk and contexts leave, is enough for the scratch memory."""
    if experts_bytes + scratch_of(default) <= left:
        return default
    return next((tokens for tokens in (4 * default, 2 * default) if 8 * scratch_of(tokens) <= left), default)


def plan_vram(
    scratch_of: Callable[[int], int],
    context: int,
    prefill_chunk: int,
    *,
    vram_bytes: int | None,
    free_bytes: int,
    trunk_bytes: int,
    state_bytes: int,
    slot_bytes: int,
    layers: int,
    num_experts: int,
    top_k: int,
) -> tuple[MemoryPlan, int]:
    """The plan of a GPU's memory, and the tokens of a prompt that go through it at once. scratch_of: bytes for a number of tokens, as on a
    CPU; prefill_chunk: tokens, 0 to choose. Raises BudgetError."""

    def scratch(tokens: int) -> int:
        return 2 * scratch_of(tokens) + _GPU_SCRATCH

    left = (vram_bytes or default_budget(free_bytes)) - trunk_bytes - state_bytes
    chunk = prefill_chunk or chunk_beside_link(DEFAULT_CHUNK, scratch, left, layers * num_experts * slot_bytes)
    return plan_with_chunk(
        scratch,
        min(chunk, _GPU_CHUNK, -(-context // LEAST_CHUNK) * LEAST_CHUNK),
        LEAST_CHUNK,
        memory_bytes=vram_bytes,
        available_bytes=free_bytes,
        trunk_bytes=trunk_bytes,
        state_bytes=state_bytes,
        slot_bytes=slot_bytes,
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        residency="slots",
        direct=True,
        ring_slots=_GPU_RING,
        name="vram",
    )


def plan_beside_vram(vram: MemoryPlan, **sizes: Any) -> MemoryPlan:
    """The plan of the host's memory where a GPU has trunk, contexts and scratch; logits and lists pass through the host's. sizes:
    plan_memory()'s. Raises BudgetError."""
    plan = plan_memory(trunk_bytes=0, scratch_bytes=_HOST_SCRATCH, **sizes)
    if vram.slots - vram.ring_slots >= plan.total_experts and plan.residency == "slots":
        return replace(plan, slots=plan.ring_slots)  # experts only pass through on their way to the card
    return plan


def _whole_mib(count: int, up: bool) -> str:
    """A size in the form that the memory option accepts."""
    return f"{-(-count // (1 << 20)) if up else count >> 20}MiB"
