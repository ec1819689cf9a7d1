"""A GPU's slots: what is computed there is copied there first, and stays as long as the eviction policy keeps it.

Copies and kernels run in one order, so a slot may be overwritten as soon as the kernels that read it were launched. Experts that are not to
be kept (all of a prompt's, and those of layers whose share is used up by what the same token needs) pass through ring slots.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np

from ..checkpoint.format import ExpertLayout
from ..formats.numbers import I64
from ..ops import ExpertBlock, GpuOps
from .link import DiskLink
from .tier import Tier

__all__ = ["Vram"]

_ALIGNMENT = 64


class Vram:
    """Slots on the card. Addresses are those that kernels read."""

    def __init__(
        self, ops: GpuOps, link: DiskLink, slots: int, ring: int, num_experts: Sequence[int], policy: str
    ) -> None:
        """slots: the total, of which `ring` are ring slots."""
        self._ops, self._link, self._ring = ops, link, ring
        self.tier = Tier(slots - ring, 0, num_experts, policy, lambda slot: None)
        self._room = max(map(_slot_room, link.store.layouts))
        self._memory = ops.memory(slots * self._room)
        parts = max(len(layout.format.parts) for layout in link.store.layouts)
        self.addresses = np.zeros((slots, parts), np.int64)
        self._next = 0  # ring slot
        self.bytes_copied = 0
        # Where every expert is, once all of them are on the card or in the arena: addresses (layers, experts, parts) for kernels, and
        # whether an expert is on the card.
        self.complete = False
        self._below = 0  # experts in the arena
        self.near = np.zeros((len(num_experts), max(num_experts)), np.bool_)
        self.far_reads = 0  # experts that kernels read from the arena
        self.table: list[Any] = []
        self._places = np.zeros((len(num_experts), max(num_experts), parts), np.uint64)
        self._changed: list[tuple[int, int]] = []

    @staticmethod
    def slot_bytes(layouts: Sequence[ExpertLayout]) -> int:
        """Bytes of a slot on the card."""
        return max(map(_slot_room, layouts))

    def find(self, layer: int, expert: int) -> int | None:
        """The slot of an expert that is on the card."""
        return self.tier.resident[layer].get(expert)

    def bring(self, layer: int, expert: int, slot: int, keep: Set[int], prompt: bool) -> int:
        """Copies an expert from a slot of the arena to one on the card, and returns that. keep: experts that must not be evicted."""
        # Once the table is complete, an expert that left the card would be nowhere: only exchange() moves them.
        taken = None if prompt or self.complete else self.tier.take(layer, keep, True, 0)
        if taken is None:
            to = self.tier.slots + self._next
            self._next = (self._next + 1) % self._ring
            self._copy(layer, slot, to)
            return to
        self._copy(layer, slot, taken[0])
        self.tier.insert(layer, expert, taken[0])
        return taken[0]

    def _copy(self, layer: int, slot: int, to: int) -> None:
        """Parts that follow one another in the arena are copied at once."""
        begin, format = self._memory.address + to * self._room, self._link.store.layouts[layer].format
        offsets, memory = self._link.offsets(layer, slot), self._link.arena.view()
        sizes = [part.nbytes for part in format.parts]
        first, end = offsets[0], offsets[-1] + sizes[-1]
        whole = end - first <= self._room and all(offset % _ALIGNMENT == first % _ALIGNMENT for offset in offsets)
        at = begin
        for i, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
            if whole:
                self.addresses[to, i] = begin + offset - first
                continue
            self.addresses[to, i] = at
            self._ops.copy_in(at, memory[offset : offset + size])
            at += -(-size // _ALIGNMENT) * _ALIGNMENT
        if whole:
            self._ops.copy_in(begin, memory[first:end])
        self.bytes_copied += sum(sizes)

    def make_table(self, below: Sequence[dict[int, int]]) -> None:
        """Enters every expert into the table; below: those in the arena, with their slots. Without effect if kernels cannot read one."""
        base = self._ops.readable(self._link.arena)
        if base is None:
            return
        for layer, resident in enumerate(self.tier.resident):
            for expert, slot in below[layer].items():
                self._enter(layer, expert, [base + offset for offset in self._link.offsets(layer, slot)], False)
            for expert, slot in resident.items():
                self._enter(layer, expert, self.addresses[slot].tolist(), True)
        layouts = self._link.store.layouts
        used = [self._places[i, : layout.num_experts, : len(layout.format.parts)] for i, layout in enumerate(layouts)]
        if any((rows % 16).any() for rows in used):
            return
        self.table = [self._ops.send(np.ascontiguousarray(rows)) for rows in used]
        self._changed.clear()
        self._below = sum(map(len, below))
        self.complete = True

    def _enter(self, layer: int, expert: int, addresses: Sequence[int], near: bool) -> None:
        count = len(self._link.store.layouts[layer].format.parts)
        self._places[layer, expert, :count] = addresses[:count]
        self.near[layer, expert] = near
        self._changed.append((layer, expert))

    @property
    def holds_all(self) -> bool:
        """Whether every expert is on the card."""
        return self.complete and not self._below

    def exchange(self, layer: int, expert: int, victim: int, expert_slot: int, victim_slot: int) -> None:
        """Copies an expert from a slot of the arena over `victim`, which lies in another slot of the arena by now."""
        to = self.tier.resident[layer][victim]
        self.tier.replace(layer, victim, expert, to)
        self._copy(layer, expert_slot, to)
        base = self._ops.readable(self._link.arena)
        assert base is not None
        self._enter(layer, victim, [base + offset for offset in self._link.offsets(layer, victim_slot)], False)
        self._enter(layer, expert, self.addresses[to].tolist(), True)

    def update_table(self) -> None:
        """Sends what exchange() changed."""
        for layer, expert in self._changed:
            table, count = self.table[layer], len(self._link.store.layouts[layer].format.parts)
            row = np.ascontiguousarray(self._places[layer, expert, :count])
            self._ops.copy_in(table.address + expert * row.nbytes, row.view(np.uint8))
        self._changed.clear()

    def give_back(self, layer: int, expert: int, slot: int) -> None:
        """Copies an expert that is on the card to a slot of the arena, in order with the other work."""
        sizes = [part.nbytes for part in self._link.store.layouts[layer].format.parts]
        addresses = self.addresses[self.tier.resident[layer][expert]]
        for address, part in zip(addresses, self._link.room(layer, slot, sizes), strict=False):
            self._ops.copy_out(int(address), part)

    def block(self, layer: int, slots: Sequence[int]) -> ExpertBlock:
        """The experts in these slots, for the ops."""
        format = self._link.store.layouts[layer].format
        addresses: I64 = self.addresses[list(slots), : len(format.parts)]
        return ExpertBlock(format, self._link.arena, addresses, on_device=True)


def _slot_room(layout: ExpertLayout) -> int:
    """Room for an expert's parts, each at a multiple of 64, and for what may lie between them in a record."""
    return -(-sum(-(-part.nbytes // 4096) * 4096 for part in layout.format.parts) // 4096) * 4096
