"""Experts in memory: a tier of slots, a link that fills them, and a prefetcher. Yields a layer's experts as they become ready.

With residency "os" there are only ring slots, and the page cache decides what stays in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import cast

import numpy as np

from .. import _native
from ..errors import RequestError
from ..ops import F32, I64, Below, ExpertBlock, GpuOps, Ops
from .fetch import Fetch, Load
from .link import DiskLink
from .prefetch import Prefetcher
from .shares import Shares
from .stats import ExpertStats
from .store import ExpertStore
from .tier import Tier
from .vram import Vram

__all__ = ["ExpertCache"]

_TOGETHER = 32


class ExpertCache:
    """Not thread-safe: one forward pass at a time."""

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        ring_slots: int,
        policy: str,
        reader: _native.Reader,
        residency: str,
        verify: str,
        ops: Ops,
        prefetch_slots: int = 0,
        pressure: Callable[[], int] = lambda: 0,
        vram: tuple[int, int, int] | None = None,
        vram_pressure: Callable[[], int] = lambda: 0,
    ) -> None:
        """slots: the total, including ring_slots for the ring, of which prefetch_slots are for prefetched experts. ops: converts experts to
        the layout of its kernels if a checkpoint has another. pressure: bytes to release (positive), or that can be taken back (negative);
        0 for no change. vram: slots on a GPU, how many of them are ring slots, and how many of those are spare ones.
        vram_pressure: as `pressure`, of the GPU's memory."""
        self.store, self.residency, self._pressure, self._vram_pressure = store, residency, pressure, vram_pressure
        layers = [layout.num_experts for layout in store.layouts]
        self.stats = ExpertStats(len(layers))
        self.link = DiskLink(store, slots, reader, ops, self.stats, residency, verify)
        self.tier = Tier(slots, ring_slots, layers, policy, self.link.release)
        self.vram: Vram | None = None
        self.shares: Shares | None = None
        if vram is not None:
            self.vram = Vram(cast(GpuOps, ops), self.link, *vram, layers, policy)
        # Experts that are computed at once: their outputs stay in the processor's cache, or they fit in the GPU's ring.
        self.most_together = _TOGETHER if self.vram is None else min(_TOGETHER, self.vram.ring)
        self.prefetcher = Prefetcher(prefetch_slots)
        self.uses = np.zeros((len(layers), max(layers)), np.int64)
        if self.vram is not None and residency == "slots":
            self.shares = Shares(self, self.vram)
        self._next_look = 0.0
        self._busy = False  # from the start of a fetch to its normal end
        self._incomplete = self.shares is not None  # the memories may hold all experts, and do not
        # Prefetched experts, read or being read, not requested yet; and wrong predictions whose reads are in flight.
        self._prefetched: dict[tuple[int, int], Load] = {}
        self._wasted: list[Load] = []

    @property
    def resident(self) -> int:
        """Experts in cached slots, here or on a GPU."""
        return sum(map(len, self.resident_map()))

    def check_readable(self) -> None:
        """Raises ReadError if the files of experts that are not in memory have changed or cannot be read, and RequestError if the model is
        closed."""
        if self.store.closed:
            raise RequestError("this model is closed")
        for layer, layout in enumerate(self.store.layouts):
            if len(self.tier.resident[layer]) < layout.num_experts:
                self.store.check_unchanged(layer)

    def resident_map(self) -> list[list[int]]:
        """The experts in cached slots, by layer."""
        near = [{}] * len(self.tier.resident) if self.vram is None else self.vram.tier.resident
        return [sorted({*here, *there}) for here, there in zip(self.tier.resident, near, strict=True)]

    @property
    def complete(self) -> bool:
        """Whether every expert is on the GPU or where it can read it, so that a table of addresses finds them all."""
        return self.vram is not None and self.vram.complete and not self._busy and not self.store.closed

    @property
    def partial(self) -> bool:
        """Whether a table of addresses finds the experts on the GPU, and the host computes all others."""
        vram = self.vram
        return vram is not None and vram.partial and not self._busy and not self.store.closed

    def count_found(self, layer: int, pairs: int) -> None:
        """Counts the hits of a pass whose selection stayed on the GPU."""
        self.stats.layers[layer].hits += pairs

    def table_routed(self, ops: Ops, layer: int, acc: F32, x: F32, weights: F32, selected: I64) -> None:
        """In place: acc += Σ weights·expert(x), with experts found by the GPU's table."""
        vram = self.vram
        assert vram is not None
        in_turn = None if vram.holds_all else partial(vram.in_turn, layer, self.tier.resident[layer])
        format = self.store.layouts[layer].format
        last = layer + 1 == len(vram.table)
        below = None if vram.holds_all else Below(layer, self.link.arena, vram.partial, last)
        cast(GpuOps, ops).routed(format, vram.table[layer], acc, x, weights, selected, in_turn, below)

    def count(self, experts: I64, computed: I64) -> None:
        """Counts what was selected (layers, T, top_k) in a recorded pass, and how many of each layer the host computed (layers,)."""
        assert self.shares is not None
        self.shares.count(experts, computed, self.stats)

    def move(self) -> None:
        """Moves experts between the memories, as what was counted suggests, while a recorded pass runs."""
        assert self.shares is not None
        self.shares.move()

    def fetch(self, layer: int, experts: list[int], prompt: bool = False, here: bool = False) -> Fetch:
        """Starts to fetch experts (ascending, distinct) of one layer; use as a context manager and iterate. `prompt`: the pass touches
        nearly every expert once, so it must not evict the experts that decoding uses. here: into host memory, for a recorded pass."""
        self.store.check_process()
        if self.store.closed:
            raise RequestError("this model is closed")
        if self._busy:
            self._recover()
        self._busy = True
        self.prefetcher.learn(layer, experts)
        if not here:  # counted with what the card has found
            self.uses[layer, experts] += 1
        return Fetch(self, layer, experts, prompt, here)

    def hint(self, layer: int, ranked: list[int]) -> None:
        """Prefetches missing experts among those that a layer will probably request. ranked: most likely first."""
        loads = []
        before, self._busy = self._busy, True  # an interrupt here is handled like one in a fetch
        for other in {key[0] for key in self._prefetched} - {layer}:  # which a GPU did not need
            self.drop_predictions(other)
        if self.vram is not None:
            ranked = [expert for expert in ranked if self.vram.find(layer, expert) is None]
        for expert in self.prefetcher.guess(layer, ranked):
            if self._spare_slots() <= 0 or not self.tier.free_ring:
                break
            if expert not in self.tier.resident[layer] and (layer, expert) not in self._prefetched:
                load = Load(layer, -1, expert, self.tier.free_ring.pop(), cached=False, pending=1)
                self._prefetched[layer, expert] = load
                loads.append(load)
        self.link.start(layer, loads)
        self._busy = before

    def _spare_slots(self) -> int:
        """Ring slots that are reserved for prefetching and not in use."""
        return self.prefetcher.most - len(self._prefetched) - len(self._wasted)

    def resident_block(self, layer: int, experts: list[int]) -> ExpertBlock | None:
        """The experts (distinct) if all of them are resident, counted as a use of each; otherwise None, without side effects."""
        if self._busy or self.store.closed:
            return None
        slots = self._find(layer, experts)
        if slots is None:
            return None
        self.prefetcher.learn(layer, experts)
        self.uses[layer, experts] += 1
        if self._prefetched:
            self._busy = True  # an interrupt here is handled like one in a fetch
            self.drop_predictions(layer)
            self._busy = False
        self.stats.layers[layer].hits += len(experts)
        if self.vram is None:
            return self.link.block(layer, slots)
        self._busy = True
        block = self.block(layer, dict(zip(experts, slots, strict=True)), experts, False)
        self._busy = False
        return block

    def block_here(self, layer: int, experts: list[int]) -> ExpertBlock | None:
        """The same for experts in host memory, whatever a GPU has."""
        slots = None if self._busy else self.tier.lookup(layer, experts)
        if slots is None:
            return None
        self.prefetcher.learn(layer, experts)
        if self._prefetched:
            self._busy = True
            self.drop_predictions(layer)
            self._busy = False
        self.stats.layers[layer].hits += len(experts)
        return self.link.block(layer, slots)

    def _find(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of experts that are all in memory, counted as a use of each; those on a GPU have numbers from tier.slots on."""
        if self.vram is None:
            return self.tier.lookup(layer, experts)
        near = [self.vram.find(layer, expert) for expert in experts]
        far = [expert for expert, slot in zip(experts, near, strict=True) if slot is None]
        below = self.tier.lookup(layer, far)
        if below is None:
            return None
        self.vram.tier.lookup(layer, [expert for expert, slot in zip(experts, near, strict=True) if slot is not None])
        others = iter(below)
        return [next(others) if slot is None else self.tier.slots + slot for slot in near]

    def block(self, layer: int, slots: dict[int, int], experts: Sequence[int], prompt: bool) -> ExpertBlock:
        """Experts in these slots, for the ops; with a GPU, those that are not there are brought. experts: all that the pass needs of this
        layer, which must not be evicted."""
        vram = self.vram
        if vram is None:
            return self.link.block(layer, list(slots.values()))
        first, keep = self.tier.slots, set(experts)
        found = [
            slot - first if slot >= first else vram.bring(layer, expert, slot, keep, prompt)
            for expert, slot in slots.items()
        ]
        return vram.block(layer, found)

    def adapt(self) -> None:
        """Releases memory under pressure, or takes it back; checks at most ten times a second. Call between forward passes. Raises
        RequestError in a forked process."""
        self.store.check_process()
        if self.shares is not None and (self._incomplete or self._busy):
            if self._busy:  # after an interrupt
                self._recover()
            self._incomplete = False
            self.shares.fill()
        now = time.monotonic()
        if now < self._next_look or self._busy or self.residency != "slots":
            return
        self._next_look = now + 0.1
        if self.vram is not None:
            self._adapt_vram(self.vram)
        slots = -(-self._pressure() // self.store.slot_bytes)
        if slots > 0 or (slots < 0 and self.tier.cached < self.tier.planned):
            self.resize(self.tier.cached - slots)

    def _adapt_vram(self, vram: Vram) -> None:
        """Gives a GPU's slots back to it while other programs need its memory, or takes them back."""
        bytes_ = self._vram_pressure()
        if bytes_ > 0 and not vram.can_shrink:
            return
        if bytes_ > 0:
            cast(GpuOps, self.link.ops).trim()  # perhaps that is enough
            bytes_ = self._vram_pressure()
        if bytes_ == 0 or (bytes_ < 0 and (not vram.tier.withdrawn or -bytes_ < vram.segment_bytes)):
            return
        self._busy = True  # an interrupt here is handled like one in a fetch
        if self.shares is not None:
            self.shares.abandon()
        self.drain()
        self.link.settle()
        while bytes_ > 0 and (changed := vram.shrink()):
            bytes_ -= changed
        while bytes_ <= -vram.segment_bytes and (changed := vram.grow()):
            bytes_ += changed
        vram.rebuild()
        self._incomplete = self.shares is not None
        self._busy = False

    def resize(self, cached: int) -> None:
        """Sets the number of cached slots, at most the planned number: releases the memory of the others, or takes it back."""
        cached = max(0, min(cached, self.tier.planned))
        if cached == self.tier.cached:
            return
        self._busy = True  # an interrupt here is handled like one in a fetch
        if self.vram is not None:
            self.vram.complete = self.vram.partial = False
            self._incomplete = self.shares is not None
        if self.shares is not None:
            self.shares.abandon()
        self.drain()
        if cached < self.tier.cached:
            self.link.register(False)
        for layer, evictions in enumerate(self.tier.resize(cached)):
            self.stats.layers[layer].evictions += evictions
        if not self.tier.parked:
            self.link.register(True)
        self._busy = False

    def close(self) -> None:
        """Closes the files. Does nothing if they are closed, or in a forked process."""
        if not self.store.mine:
            return
        self.drain()
        self.link.close()
        self.store.close()

    def _recover(self) -> None:
        """Restores consistency after an exception or an interrupt anywhere in a fetch or in resize()."""
        self.drain()
        if self.tier.cached < self.tier.planned:
            self.link.register(False)  # registered memory cannot be released
        if self.shares is not None:
            self.shares.abandon()
        self.tier.rebuild()
        if self.vram is not None:
            self.vram.rebuild()
            self._incomplete = True
        if not self.tier.parked:
            self.link.register(True)
        self._busy = False

    def begin(self) -> None:
        """The start of what must not be interrupted; after an interrupt, everything is rebuilt from what is resident."""
        self._busy = True

    def finish(self) -> None:
        """The normal end of a fetch, or of what began with begin()."""
        self._busy = False

    # The methods below are for Fetch.

    def lookup(self, layer: int, expert: int, here: bool) -> int | None:
        """The slot of a resident expert, counted as a use of it; None if it is not resident. here: in host memory."""
        slots = self.tier.lookup(layer, (expert,)) if here else self._find(layer, (expert,))
        if slots is None:
            return None
        self.stats.layers[layer].hits += 1
        return slots[0]

    def take_slot(self, layer: int, keep: Set[int], evict: bool) -> tuple[int, bool] | None:
        """A slot for a miss and whether it is a cached one; None if all are in use. `evict` (decoding): evicts a resident expert that is
        not in `keep` if necessary, and leaves the ring slots for prefetching free."""
        if self.shares is not None:
            keep = keep | self.shares.copying(layer)
        taken = self.tier.take(layer, keep, evict, max(0, self._spare_slots()))
        if taken is None:
            return None
        slot, cached, evicted = taken
        self.stats.layers[layer].evictions += evicted
        return slot, cached

    def take_prefetched(self, layer: int, expert: int, position: int, slot: int, cached: bool) -> Load | None:
        """Claims a prefetched expert that is now requested: it stays in its slot, and the slot taken for it joins the ring instead. None if
        it was not prefetched."""
        load = self._prefetched.pop((layer, expert), None)
        if load is None:
            return None
        self.tier.free_ring.append(slot)
        load.position, load.cached = position, cached
        self.stats.layers[layer].prefetched += 1
        return load

    def drop_predictions(self, layer: int) -> None:
        """Discards experts that were prefetched for a layer and not requested; their slots are freed once their reads are done."""
        for key in [key for key in self._prefetched if key[0] == layer]:
            load = self._prefetched.pop(key)
            self.stats.layers[layer].prefetch_wasted += 1
            if load.pending:
                self._wasted.append(load)
            else:
                self.tier.free_ring.append(load.slot)

    def release(self, load: Load) -> None:
        """Frees the slot of a load that is no longer needed; a cached slot keeps its expert."""
        if not load.cached:
            self.tier.free_ring.append(load.slot)

    def wait(self, layer: int, at_least: int) -> list[Load]:
        """Requested experts that have arrived, checked; blocks until at least `at_least` reads are done."""
        arrived = []
        for load in self.link.wait(layer, at_least):
            if load.position >= 0:
                self.admit(load)
                arrived.append(load)
            elif load.pending == 0 and load in self._wasted:
                self._wasted.remove(load)
                self.tier.free_ring.append(load.slot)
        return arrived

    def admit(self, load: Load) -> None:
        """Checks a requested expert that has arrived, and makes it resident if its slot is a cached one. Raises ReadError."""
        self.link.admit(load)
        if load.cached:
            self.tier.insert(load.layer, load.expert, load.slot)

    def drain(self) -> None:
        """Waits for all reads in flight and discards their results; frees the slots of prefetched experts."""
        self.link.drain()
        self.tier.free_ring += [load.slot for load in (*self._prefetched.values(), *self._wasted)]
        self._prefetched.clear()
        self._wasted.clear()
