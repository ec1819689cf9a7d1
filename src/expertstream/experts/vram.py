"""A GPU's slots: what is computed there is copied there first, and stays as long as the eviction policy keeps it.

Copies and kernels run in one order, so a slot may be overwritten as soon as the kernels that read it were launched. Experts that are not to
be kept (all of a prompt's, and those of layers whose share is used up by what the same token needs) pass through ring slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import numpy as np

from ..checkpoint.format import ExpertLayout
from ..errors import BudgetError
from ..formats.numbers import I64
from ..ops import ExpertBlock, GpuOps
from .link import DiskLink
from .tier import Tier

__all__ = ["Vram"]

_ALIGNMENT = 64
_RATED, _TOGETHER = 12, 8  # layers, and experts of each, whose computation is timed
_SEGMENTS = 16  # parts of the slots, of which some are given back when other programs need the card's memory
_BUFFERS = 10  # of the ring, for prompts: copies go on while what is on the card is computed


class Vram:
    """Slots on the card. Addresses are those that kernels read."""

    def __init__(
        self, ops: GpuOps, link: DiskLink, slots: int, ring: int, spare: int, num_experts: Sequence[int], policy: str
    ) -> None:
        """slots: the total, of which `ring` are ring slots; `spare` of these are spare ones, to which experts are copied while those that
        they replace are in use."""
        self._ops, self._link, self.ring = ops, link, ring - spare
        self._spare_slots = range(slots - spare, slots)
        self.spares = list(self._spare_slots)
        self.tier = Tier(slots - ring, 0, num_experts, policy, lambda slot: None)
        self._room = max(map(_slot_room, link.store.layouts))
        self._host = int(link.memory.ctypes.data)
        # The ring and the spare slots, and parts of the others that can be given back to the card one by one.
        self._starts = np.zeros(slots, np.int64)
        size = max(1, -(-(slots - ring) // _SEGMENTS))
        self._segments = [range(at, min(at + size, slots - ring)) for at in range(0, slots - ring, size)]
        self._held = [self._allocate(part) for part in (range(slots - ring, slots), *self._segments)]
        self._sizes = [[part.nbytes for part in layout.format.parts] for layout in link.store.layouts]  # computed once
        self._bytes = np.array([sum(sizes) for sizes in self._sizes])
        parts = max(map(len, self._sizes))
        self.addresses = np.zeros((slots, parts), np.int64)
        self._next = 0  # ring slot
        # Of in_turn(): equal parts of the ring, and the point behind the last use of each.
        size = max(1, self.ring // _BUFFERS)
        self._buffers: list[tuple[list[int], list[Any]]] = [
            ([*range(at, at + size)], [None]) for at in range(slots - ring, slots - spare - size + 1, size)
        ]
        self._turn = 0
        self.bytes_copied = 0
        # Where every expert is, once all of them are on the card or in the arena: addresses (layers, experts, parts) for kernels, and
        # whether an expert is on the card.
        self.complete = False
        self.partial = False  # the table has the experts on the card, and 0 for all others
        self.host_computed = 0  # experts that the host computed for recorded passes
        self._after: Any = None  # the point that the next copy beside other work is to wait for
        self.holds_all = False  # whether every expert is on the card
        self.near = np.zeros((len(num_experts), max(num_experts)), np.bool_)
        self.far_reads = self.bytes_read = 0  # experts that kernels read from the arena, and their bytes
        self.table: list[Any] = []
        self._places = np.zeros((len(num_experts), max(num_experts), parts), np.uint64)
        self._changed: list[tuple[int, int]] = []

    def _allocate(self, slots: range) -> Any:
        memory = self._ops.memory(len(slots) * self._room)
        self._starts[slots.start : slots.stop] = memory.address + np.arange(len(slots)) * self._room
        return memory

    @property
    def can_shrink(self) -> bool:
        """Whether there are slots that could be given back."""
        return len(self._held) > 1

    @property
    def segment_bytes(self) -> int:
        """Bytes by which shrink() and grow() change the card's memory, at most."""
        return len(self._segments[0]) * self._room if self._segments else 0

    def shrink(self) -> int:
        """Gives some slots back to the card, with the experts in them; their bytes, 0 if there are no more. rebuild() follows."""
        if not self.can_shrink:
            return 0
        slots = self._segments[len(self._held) - 2]
        self.tier.withdraw(slots)
        self._held.pop()
        self._ops.trim()
        return len(slots) * self._room

    def grow(self) -> int:
        """Takes some slots back; their bytes, 0 if there are no more, or no memory. rebuild() follows."""
        held = len(self._held) - 1
        if held and self._segments[held - 1].start in self.tier.withdrawn:  # shrink() was interrupted
            self.tier.restore(self._segments[held - 1])
            return len(self._segments[held - 1]) * self._room
        if held == len(self._segments):
            return 0
        slots = self._segments[held]
        try:
            self._held.append(self._allocate(slots))
        except BudgetError:
            return 0
        self.tier.restore(slots)
        return len(slots) * self._room

    def count_far(self, experts: I64, computed: I64) -> None:
        """Counts what a step needed of each layer besides what is on the card: experts, and how many of them the host computed. Kernels
        have read the others from the arena."""
        self.host_computed += int(computed.sum())
        if self.partial:
            return
        experts = np.maximum(experts - computed, 0)
        self.far_reads += int(experts.sum())
        self.bytes_read += int((experts * self._bytes[: experts.shape[0]]).sum())

    @staticmethod
    def slot_bytes(layouts: Sequence[ExpertLayout]) -> int:
        """Bytes of a slot on the card."""
        return max(map(_slot_room, layouts))

    def find(self, layer: int, expert: int) -> int | None:
        """The slot of an expert that is on the card."""
        return self.tier.resident[layer].get(expert)

    def bring(self, layer: int, expert: int, slot: int, keep: Set[int], prompt: bool) -> int:
        """Copies an expert from a slot of the arena to one on the card, and returns that. keep: experts that must not be evicted."""
        # What the table has is moved by Shares alone.
        taken = None if prompt or self.complete or self.partial else self.tier.take(layer, keep, True, 0)
        if taken is None:
            to = self.tier.slots + self._next
            self._next = (self._next + 1) % self.ring
            self._copy(layer, slot, to)
            return to
        self._copy(layer, slot, taken[0])
        self.tier.insert(layer, expert, taken[0])
        return taken[0]

    def in_turn(self, layer: int, below: dict[int, int]) -> Iterator[Any]:
        """Tables (experts, P) of a layer's addresses on the card, each with some experts and 0 for the others: first those that are there,
        then those of the arena (below: expert → slot) as they arrive. Copies run ahead of what uses them, as far as there are buffers."""
        layout = self._link.store.layouts[layer]
        rows, count = layout.num_experts, len(layout.format.parts)
        here = np.where(self.near[layer, :rows, None], self._places[layer, :rows, :count], 0)
        yield self._ops.send(np.ascontiguousarray(here))
        far = [(expert, slot) for expert, slot in sorted(below.items()) if not self.near[layer, expert]]
        at = 0
        while at < len(far):
            slots, last = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            table = np.zeros((rows, count), np.uint64)
            some = far[at : at + len(slots)]
            self._ops.copies_beside(*self._copies(layer, [slot for _, slot in some], slots[: len(some)]), last[0])
            table[[expert for expert, _ in some]] = self.addresses[slots[: len(some)], :count]
            at += len(some)
            self._ops.join()
            yield self._ops.send(table)
            last[0] = self._ops.mark()

    def _copies(self, layer: int, slots: Sequence[int], to: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """What copies experts from slots of the arena to others on the card: addresses there, addresses in the arena, and sizes. Parts that
        follow one another are copied at once. Where they will be is entered."""
        sizes, offsets = self._sizes[layer], self._link.table(layer, slots)
        begins = self._starts[list(to), None]
        self.bytes_copied += len(slots) * sum(sizes)
        within = offsets - offsets[:, :1]
        lengths = within[:, -1] + sizes[-1]
        whole = not (within % _ALIGNMENT).any() and lengths.max() <= self._room
        if not whole:
            within = np.cumsum([0, *(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes[:-1])])
        places = self.addresses[list(to), : len(sizes)] = begins + within
        sources = self._host + offsets
        if whole:
            return places[:, 0].tolist(), sources[:, 0].tolist(), lengths.tolist()
        return places.ravel().tolist(), sources.ravel().tolist(), sizes * len(slots)

    def _copy(self, layer: int, slot: int, to: int) -> None:
        """Copies an expert from a slot of the arena to another on the card, in order with other work."""
        for at, source, size in zip(*self._copies(layer, [slot], [to]), strict=True):
            begin = source - self._host
            self._ops.copy_in(at, self._link.memory[begin : begin + size])

    def make_table(self, below: Sequence[dict[int, int]] | None) -> None:
        """Enters every expert into the table; below: those in the arena, with their slots. If that is None, or kernels cannot read them
        there, the table has only what is on the card, for passes whose host computes the others."""
        layouts, base = self._link.store.layouts, self._ops.readable(self._link.arena)
        if below is not None and base is not None and self._fill_table(below, base):
            self.holds_all = sum(map(len, self.tier.resident)) == sum(layout.num_experts for layout in layouts)
            self.complete = True
        elif self._ops.host_computes:
            self._fill_table([{} for _ in layouts], 0)
            self.holds_all, self.partial = False, True

    def _fill_table(self, below: Sequence[dict[int, int]], base: int) -> bool:
        """Whether kernels can read all that is in it."""
        self.near[:] = False
        self._places[:] = 0
        for layer, resident in enumerate(self.tier.resident):
            for expert, slot in below[layer].items():
                self._enter(layer, expert, [base + offset for offset in self._link.offsets(layer, slot)], False)
            for expert, slot in resident.items():
                self._enter(layer, expert, self.addresses[slot].tolist(), True)
        layouts = self._link.store.layouts
        used = [self._places[i, : layout.num_experts, : len(layout.format.parts)] for i, layout in enumerate(layouts)]
        if any((rows % 16).any() for rows in used):
            return False
        for i, rows in enumerate(map(np.ascontiguousarray, used)):
            if i < len(self.table):  # recordings know where it is
                self._ops.copy_in(self.table[i].address, rows.reshape(-1).view(np.uint8))
            else:
                self.table.append(self._ops.send(rows))
        self._changed.clear()
        return True

    def rate(self, below: Sequence[dict[int, int]]) -> None:
        """Has the ops measure who is to compute experts of the arena (below: expert → slot)."""
        some = []
        for layer in range(0, len(below), max(1, len(below) // _RATED)):
            far = [expert for expert in below[layer] if not self.near[layer, expert]][:_TOGETHER]
            if far:
                places = self._places[layer, far, : len(self._sizes[layer])]
                block = self._link.block(layer, [below[layer][expert] for expert in far])
                some.append((self._ops.send(np.ascontiguousarray(places)), block))
        self._ops.rate(some)

    def _enter(self, layer: int, expert: int, addresses: Sequence[int], near: bool) -> None:
        count = len(self._sizes[layer])
        self._places[layer, expert, :count] = addresses[:count]
        self.near[layer, expert] = near
        self._changed.append((layer, expert))

    def take(self, layer: int) -> int | None:
        """A slot of a layer's share that has no expert yet."""
        taken = self.tier.take(layer, set(), False, 0)
        return None if taken is None else taken[0]

    def untake(self, layer: int, slot: int) -> None:
        """Undoes take()."""
        self.tier.free.append(slot)
        self.tier.owned[layer] -= 1

    def add(self, layer: int, expert: int, slot: int) -> None:
        """An expert that was copied to a slot from take() is on the card."""
        self.tier.insert(layer, expert, slot)
        self._enter(layer, expert, self.addresses[slot].tolist(), True)

    def swap(self, layer: int, expert: int, victim: int, spare: int, victim_slot: int | None) -> None:
        """An expert that was copied to a spare slot takes the place of `victim`, which lies in a slot of the arena, if kernels read it
        there."""
        self.spares.append(self.tier.replace(layer, victim, expert, spare))
        if victim_slot is None:
            self._enter(layer, victim, [0] * len(self._sizes[layer]), False)
        else:
            base = self._ops.readable(self._link.arena)
            assert base is not None
            self._enter(layer, victim, [base + offset for offset in self._link.offsets(layer, victim_slot)], False)
        self._enter(layer, expert, self.addresses[spare].tolist(), True)

    def rebuild(self) -> None:
        """Recovers after an exception at any point; the table is to be made again."""
        self.complete = self.partial = False
        self.tier.rebuild()
        kept = {slot for resident in self.tier.resident for slot in resident.values()}.union(self.tier.free)
        kept |= self.tier.withdrawn
        self.spares = [slot for slot in (*range(self.tier.slots), *self._spare_slots) if slot not in kept]

    def copy_beside(self, layer: int, slot: int, to: int) -> None:
        """Copies an expert from a slot of the arena to a spare one, beside other work."""
        self._ops.copies_beside(*self._copies(layer, [slot], [to]), self._after)
        self._after = None

    def mark(self) -> None:
        """What is copied beside other work from now on comes after what was launched so far."""
        self._after = self._ops.mark()

    def join(self) -> None:
        """What follows comes after the copies that ran beside other work."""
        self._ops.join()

    def update_table(self) -> None:
        """Sends what swap() changed, in order with other work."""
        for layer, expert in self._changed:
            table, count = self.table[layer], len(self._sizes[layer])
            row = np.ascontiguousarray(self._places[layer, expert, :count])
            self._ops.copy_in(table.address + expert * row.nbytes, row.view(np.uint8))
        self._changed.clear()

    def give_back(self, layer: int, expert: int, slot: int) -> None:
        """Copies an expert that is on the card to a slot of the arena, beside other work."""
        addresses = self.addresses[self.tier.resident[layer][expert]]
        for address, part in zip(addresses, self._link.room(layer, slot, self._sizes[layer]), strict=False):
            self._ops.copy_out_beside(int(address), part, self._after)
            self._after = None

    def block(self, layer: int, slots: Sequence[int]) -> ExpertBlock:
        """The experts in these slots, for the ops."""
        format = self._link.store.layouts[layer].format
        addresses: I64 = self.addresses[list(slots), : len(format.parts)]
        return ExpertBlock(format, self._link.arena, addresses, on_device=True)


def _slot_room(layout: ExpertLayout) -> int:
    """Room for an expert's parts, each at a multiple of 64, and for what may lie between them in a record."""
    return -(-sum(-(-part.nbytes // 4096) * 4096 for part in layout.format.parts) // 4096) * 4096
