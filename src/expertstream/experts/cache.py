"""Experts in memory: a tier of slots, a link that fills them, and a prefetcher. Yields a layer's experts as they become ready.

With residency "os" there are only ring slots, and the page cache decides what stays in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from .. import _native
from ..errors import RequestError
from ..ops import F32, I64, ExpertBlock, GpuOps, Ops
from .fetch import Fetch, Load
from .link import DiskLink
from .prefetch import Prefetcher
from .stats import ExpertStats
from .store import ExpertStore
from .tier import Tier
from .vram import Vram

__all__ = ["ExpertCache"]

_TOGETHER = 32
_EXCHANGES = 8  # experts that change places with the GPU's after a recorded pass, at most


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
        vram: tuple[int, int] | None = None,
    ) -> None:
        """slots: the total, including ring_slots for the ring, of which prefetch_slots are for prefetched experts. ops: converts experts to
        the layout of its kernels if a checkpoint has another. pressure: bytes to release (positive), or that can be taken back (negative);
        0 for no change. vram: slots on a GPU, and how many of them are ring slots."""
        self.store, self.residency, self._pressure = store, residency, pressure
        layers = [layout.num_experts for layout in store.layouts]
        self.stats = ExpertStats(len(layers))
        self.link = DiskLink(store, slots, reader, ops, self.stats, residency, verify)
        self.tier = Tier(slots, ring_slots, layers, policy, self.link.release)
        self.vram: Vram | None = None
        if vram is not None:
            self.vram = Vram(cast(GpuOps, ops), self.link, *vram, layers, policy)
        # Experts that are computed at once: their outputs stay in the processor's cache, or they fit in the GPU's ring.
        self.most_together = _TOGETHER if vram is None else min(_TOGETHER, vram[1])
        self.prefetcher = Prefetcher(prefetch_slots)
        self.uses = np.zeros((len(layers), max(layers)), np.int64)
        self._next_look = 0.0
        self._next_exchange = 0  # the layer that begins
        self._busy = False  # from the start of a fetch to its normal end
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
    def all_near(self) -> bool:
        """Whether every expert is on the GPU, so that nothing needs to know which ones a router selects."""
        return self.vram is not None and self.complete and self.vram.holds_all

    def count_near(self, layer: int, pairs: int) -> None:
        """Counts the hits of a pass whose selection stayed on the GPU."""
        self.stats.layers[layer].hits += pairs

    def fill(self) -> None:
        """Reads all experts if a GPU and the arena can hold them together: first the GPU's share of each layer, then the arena's. Raises
        ReadError."""
        vram, counts = self.vram, [layout.num_experts for layout in self.store.layouts]
        if vram is None or self.residency != "slots":
            return
        shares = [(near, far) for near, far in zip(vram.tier.quotas, self.tier.quotas, strict=True)]
        if any(near + far < count for (near, far), count in zip(shares, counts, strict=True)):
            return
        self._busy = True
        for layer, count in enumerate(counts):
            near = vram.tier.quotas[layer]
            for first in range(0, near, self.tier.ring):
                experts = range(first, min(first + self.tier.ring, near))
                loads = [Load(layer, 0, e, self.tier.free_ring.pop(), False, 1) for e in experts]
                self._read(layer, loads)
                for load in loads:
                    vram.bring(layer, load.expert, load.slot, set(), False)
                self.link.settle()
                self.tier.free_ring += [load.slot for load in loads]
            rest = []
            for expert in range(near, count):
                taken = self.tier.take(layer, set(), False, 0)
                assert taken is not None and taken[1], "a layer's share holds the rest of its experts"
                rest.append(Load(layer, 0, expert, taken[0], True, 1))
            self._read(layer, rest)
        self._busy = False
        self.stats.layers = ExpertStats(len(counts)).layers
        vram.make_table(self.tier.resident)

    def _read(self, layer: int, loads: list[Load]) -> None:
        self.link.start(layer, loads)
        left = len(loads)
        while left:
            left -= len(self.wait(layer, 1))

    def table_routed(self, ops: Ops, layer: int, acc: F32, x: F32, weights: F32, selected: I64) -> None:
        """In place: acc += Σ weights·expert(x), with experts found by the GPU's table."""
        assert self.vram is not None
        cast(GpuOps, ops).routed(self.store.layouts[layer].format, self.vram.table[layer], acc, x, weights, selected)

    def count(self, experts: I64) -> None:
        """Counts what was selected (layers, T, top_k) in a recorded pass, and exchanges some of what the GPU read from the arena for what
        it no longer uses."""
        vram = self.vram
        assert vram is not None
        layers = np.arange(experts.shape[0])[:, None]
        flat = experts.reshape(experts.shape[0], -1)
        if flat.shape[1] == 1 or experts.shape[1] == 1:
            self.uses[layers, flat] += 1
        else:
            np.add.at(self.uses, (layers, flat), 1)
        for counters in self.stats.layers:
            counters.hits += flat.shape[1]
        if vram.holds_all:
            return
        far = ~vram.near[layers, flat]
        vram.far_reads += int(far.sum())
        self._busy = True
        exchanged, first = 0, self._next_exchange
        for offset in range(experts.shape[0]):
            layer = (first + offset) % experts.shape[0]
            used = set(flat[layer].tolist())
            vram.tier.lookup(layer, [e for e in used if vram.near[layer, e]])
            missed = flat[layer][far[layer]]
            if missed.size and exchanged < _EXCHANGES:
                uses = self.uses[layer]
                if self._exchange(layer, int(missed[uses[missed].argmax()]), used):
                    exchanged, self._next_exchange = exchanged + 1, layer + 1
        if exchanged:
            vram.update_table()
        self._busy = False

    def _exchange(self, layer: int, expert: int, used: set[int]) -> bool:
        """Brings an expert from the arena to the GPU, and what makes room for it to the arena, unless that was used as often."""
        vram, free = self.vram, self.tier.free_ring
        assert vram is not None
        victim = vram.tier.victim(layer, used)
        if victim is None or not free or self.uses[layer, victim] >= self.uses[layer, expert]:
            return False
        slot = free.pop()
        vram.give_back(layer, victim, slot)
        old = self.tier.replace(layer, expert, victim, slot)
        vram.exchange(layer, expert, victim, old, slot)
        free.append(old)
        return True

    def fetch(self, layer: int, experts: list[int], prompt: bool = False) -> Fetch:
        """Starts to fetch experts (ascending, distinct) of one layer; use as a context manager and iterate. `prompt`: the pass touches
        nearly every expert once, so it must not evict the experts that decoding uses."""
        self.store.check_process()
        if self.store.closed:
            raise RequestError("this model is closed")
        if self._busy:
            self._recover()
        self._busy = True
        self.prefetcher.learn(layer, experts)
        self.uses[layer, experts] += 1
        return Fetch(self, layer, experts, prompt)

    def hint(self, layer: int, ranked: list[int]) -> None:
        """Prefetches missing experts among those that a layer will probably request. ranked: most likely first."""
        loads = []
        for expert in self.prefetcher.guess(layer, ranked):
            if self._spare_slots() <= 0 or not self.tier.free_ring:
                break
            if expert not in self.tier.resident[layer] and (layer, expert) not in self._prefetched:
                load = Load(layer, -1, expert, self.tier.free_ring.pop(), cached=False, pending=1)
                self._prefetched[layer, expert] = load
                loads.append(load)
        self.link.start(layer, loads)

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
        now = time.monotonic()
        if now < self._next_look or self._busy or self.residency != "slots":
            return
        self._next_look = now + 0.1
        slots = -(-self._pressure() // self.store.slot_bytes)
        if slots > 0 or (slots < 0 and self.tier.cached < self.tier.planned):
            self.resize(self.tier.cached - slots)

    def resize(self, cached: int) -> None:
        """Sets the number of cached slots, at most the planned number: releases the memory of the others, or takes it back."""
        cached = max(0, min(cached, self.tier.planned))
        if cached == self.tier.cached:
            return
        self._busy = True  # an interrupt here is handled like one in a fetch
        if self.vram is not None:
            self.vram.complete = False
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
        self.tier.rebuild()
        if self.vram is not None:
            self.vram.complete = False  # the table may be half changed
            self.vram.tier.rebuild()
        if not self.tier.parked:
            self.link.register(True)
        self._busy = False

    def finish(self) -> None:
        """The normal end of a fetch."""
        self._busy = False

    # The methods below are for Fetch.

    def lookup(self, layer: int, expert: int) -> int | None:
        """The slot of a resident expert, counted as a use of it; None if it is not resident."""
        slots = self._find(layer, (expert,))
        if slots is None:
            return None
        self.stats.layers[layer].hits += 1
        return slots[0]

    def take_slot(self, layer: int, keep: set[int], evict: bool) -> tuple[int, bool] | None:
        """A slot for a miss and whether it is a cached one; None if all are in use. `evict` (decoding): evicts a resident expert that is
        not in `keep` if necessary, and leaves the ring slots for prefetching free."""
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
