"""Experts in memory: one arena of slots. Hands out a layer's experts as they become ready; counts what it costs.

Slots come in two kinds. Cached slots hold experts from token to token, an equal share for each layer, so that one token's
walk through all layers cannot flush what the next one needs. Ring slots hold the rest for as long as one layer computes.
With residency "os" there are ring slots only, and the page cache keeps what it likes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from .. import _native
from ..checkpoint.format import ExpertLayout, make_record, record_pieces
from ..errors import ReadError, RequestError
from ..ops import ExpertBlock, Ops
from .fetch import Fetch, Load
from .policy import make_policy
from .prefetch import Prefetcher
from .stats import ExpertStats
from .store import ExpertStore

__all__ = ["ExpertCache"]


class ExpertCache:
    """Not thread-safe: one forward pass at a time."""

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        ring_slots: int,
        policy: str,
        reader: Any,
        residency: str,
        verify: str,
        ops: Ops,
        ahead_slots: int = 0,
        pressure: Callable[[], int] = lambda: 0,
    ) -> None:
        """slots: all of them, ring_slots of which belong to the ring, and ahead_slots of these to experts that are read before they
        are asked for. reader: a _native.Reader. ops: puts experts as its kernels want them where a checkpoint does not.
        pressure: bytes that others need of us (positive), or that we could have (negative); 0 to leave everything as it is."""
        self.store, self.reader, self.residency = store, reader, residency
        self.arena = _native.Arena(slots * store.slot_bytes)
        reader.register_memory(self.arena)
        layers = len(store.layouts)
        self._pressure, self._next_look = pressure, 0.0
        self.planned = self.cached = self.least = (
            slots - ring_slots
        )  # cached slots: at most, now, and the fewest there were
        self._parked: list[int] = []  # slots whose memory others have for now
        self.stats = ExpertStats(layers)
        self.ring, self.prefetcher = ring_slots, Prefetcher(ahead_slots)
        self.quotas = self._shares(self.cached)
        self._free_ring = list(range(ring_slots))[::-1]
        self._free = list(range(ring_slots, slots))[::-1]
        self.uses = np.zeros((layers, max(layout.num_experts for layout in store.layouts)), np.int64)
        self._resident: list[dict[int, int]] = [{} for _ in range(layers)]
        self._owned = [0] * layers  # cached slots of each layer, resident or being read into
        self._policy = policy
        self._policies = [make_policy(policy) for _ in range(layers)]
        self._slots = slots
        self._busy = False  # between the beginning of a fetch and its orderly end
        self._offsets = np.zeros((slots, max(len(layout.format.parts) for layout in store.layouts)), np.int64)
        self._loads: dict[int, Load] = {}  # by tag
        self._ahead: dict[tuple[int, int], Load] = {}  # by layer and expert: read, or being read, and not yet asked for
        self._wrong: list[Load] = []  # read ahead, not asked for, still on their way
        self._next_tag = 0
        self._parts = [len(layout.format.parts) for layout in store.layouts]
        self._verify, self._ops = verify, ops
        self._verified: list[set[int]] = [set() for _ in range(layers)]

    @property
    def resident(self) -> int:
        """Experts in cached slots."""
        return sum(map(len, self._resident))

    def check_readable(self) -> None:
        """Raises ReadError if experts that are not in memory can no longer be read as the model was opened, and RequestError if it is
        closed."""
        if self.store.closed:
            raise RequestError("this model is closed")
        for layer, layout in enumerate(self.store.layouts):
            if len(self._resident[layer]) < layout.num_experts:
                self.store.check_unchanged(layer)

    def resident_map(self) -> list[list[int]]:
        """By layer, the experts in cached slots."""
        return [sorted(list(resident)) for resident in self._resident]

    def fetch(self, layer: int, experts: list[int], prompt: bool = False) -> Fetch:
        """Begins to bring the experts (ascending, distinct) of one layer; use as a context manager and iterate. `prompt`: touches
        nearly every expert once, so it must not flush what decoding keeps."""
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
        """The experts that a layer will probably ask for, likeliest first: some of those that are missing are read ahead."""
        loads = []
        for expert in self.prefetcher.guess(layer, ranked):
            if len(self._ahead) + len(self._wrong) >= self.prefetcher.most or not self._free_ring:
                break
            if expert not in self._resident[layer] and (layer, expert) not in self._ahead:
                load = Load(layer, -1, expert, self._free_ring.pop(), cached=False, pending=1)
                self._ahead[layer, expert] = load
                loads.append(load)
        self.start(layer, loads)

    def resident_block(self, layer: int, experts: list[int]) -> ExpertBlock | None:
        """The experts (distinct) where all of them are resident, which counts as a use of each; else None, and nothing has happened."""
        resident = self._resident[layer]
        slots = [resident.get(expert, -1) for expert in experts]
        if -1 in slots or self._busy or self.store.closed:
            return None
        self._policies[layer].touch(experts)
        self.prefetcher.learn(layer, experts)
        self.uses[layer, experts] += 1
        if self._ahead:
            self._busy = True  # an interrupt in here is mended as one in a fetch
            self.drop_predictions(layer)
            self._busy = False
        self.stats.layers[layer].hits += len(experts)
        return self.block(layer, slots)

    def _shares(self, cached: int) -> list[int]:
        """Each layer's part of the cached slots."""
        share, extra = divmod(cached, len(self.store.layouts))
        return [min(share + (i < extra), layout.num_experts) for i, layout in enumerate(self.store.layouts)]

    def adapt(self) -> None:
        """Looks, ten times a second at most, whether the machine needs memory back or has some again. Between two forward passes.
        Raises RequestError in a forked process."""
        self.store.check_process()
        now = time.monotonic()
        if now < self._next_look or self._busy or self.residency != "slots":
            return
        self._next_look = now + 0.1
        slots = -(-self._pressure() // self.store.slot_bytes)
        if slots > 0 or (slots < 0 and self.cached < self.planned):
            self.resize(self.cached - slots)

    def resize(self, cached: int) -> None:
        """Keeps this many cached slots, at most as many as planned: the others' memory goes back to the machine, or comes again."""
        cached = max(0, min(cached, self.planned))
        if cached == self.cached:
            return
        self._busy = True  # an interrupt in here is mended as one in a fetch
        self.drain()
        if cached < self.cached:
            self.reader.unregister_memory()
        self.cached, self.quotas, self.least = cached, self._shares(cached), min(self.least, cached)
        for layer, quota in enumerate(self.quotas):
            while self._owned[layer] > quota:
                victim = self._policies[layer].evict(set())
                assert victim is not None
                self._park(self._resident[layer].pop(victim))
                self._owned[layer] -= 1
                self.stats.layers[layer].evictions += 1
        while self._free and sum(self._owned) + len(self._free) > cached:
            self._park(self._free.pop())
        while self._parked and sum(self._owned) + len(self._free) < cached:
            self._free.append(self._parked.pop())
        if not self._parked:
            self.reader.register_memory(self.arena)
        self._busy = False

    def _park(self, slot: int) -> None:
        self._parked.append(slot)
        self.arena.release(slot * self.store.slot_bytes, self.store.slot_bytes)

    def close(self) -> None:
        """Closes the files; a second time does nothing, nor does it in a forked process."""
        if not self.store.mine:
            return
        self.drain()
        self.store.close()

    def _recover(self) -> None:
        """After an exception at any point of a fetch or of resize(), an interrupt too. Experts that are listed as
        resident stay, up to their layer's share; every other structure is rebuilt from that list. An expert is added to it only after
        its bytes are read and checked, and removed before its slot is reused, so the list is right wherever the exception fell."""
        self.drain()
        self.quotas = self._shares(self.cached)
        for layer, quota in zip(self._resident, self.quotas, strict=True):
            while len(layer) > quota:
                layer.popitem()
        used = {slot for layer in self._resident for slot in layer.values()}
        free = [slot for slot in range(self._slots) if slot not in used]
        room = max(0, self.cached - len(used))
        self._free_ring, self._free = free[: self.ring][::-1], free[self.ring : self.ring + room][::-1]
        self._parked = []
        if free[self.ring + room :]:
            self.reader.unregister_memory()
        elif not self.reader.registered_buffers:
            self.reader.register_memory(self.arena)
        for slot in free[self.ring + room :]:
            self._park(slot)
        self._owned = [len(layer) for layer in self._resident]
        self._policies = [make_policy(self._policy) for _ in self._resident]
        for policy, layer in zip(self._policies, self._resident, strict=True):
            for expert in layer:
                policy.insert(expert)
        self._busy = False

    def finish(self) -> None:
        """The orderly end of a fetch."""
        self._busy = False

    # What follows serves Fetch.

    def lookup(self, layer: int, expert: int) -> int | None:
        """The slot of a resident expert, which counts as a use of it."""
        slot = self._resident[layer].get(expert)
        if slot is not None:
            self._policies[layer].touch((expert,))
            self.stats.layers[layer].hits += 1
        return slot

    def take_slot(self, layer: int, keep: set[int], evict: bool) -> tuple[int, bool] | None:
        """A slot for a miss and whether it is a cached one: the layer's share first, then the ring; None if all are in use.
        With `evict` (decoding), a resident expert that is not in `keep` makes room, and the ring keeps its slots for reading ahead."""
        if self._owned[layer] < self.quotas[layer]:
            self._owned[layer] += 1
            return self._free.pop(), True
        if evict:
            victim = self._policies[layer].evict(keep)
            if victim is not None:
                slot = self._resident[layer].pop(victim)
                self.stats.layers[layer].evictions += 1
                return slot, True
        spare = max(0, self.prefetcher.most - len(self._ahead) - len(self._wrong)) if evict else 0
        if len(self._free_ring) > spare:
            return self._free_ring.pop(), False
        return None

    def take_prefetched(self, layer: int, expert: int, position: int, slot: int, cached: bool) -> Load | None:
        """An expert that was read ahead, now asked for: it stays where it is, and the slot that was taken for it takes that one's
        place. None if it was not."""
        load = self._ahead.pop((layer, expert), None)
        if load is None:
            return None
        self._free_ring.append(slot)
        load.position, load.cached = position, cached
        self.stats.layers[layer].prefetched += 1
        return load

    def drop_predictions(self, layer: int) -> None:
        """Whatever was read ahead for a layer and not claimed was wrong; its slot is free once its reads are done."""
        for key in [key for key in self._ahead if key[0] == layer]:
            load = self._ahead.pop(key)
            self.stats.layers[layer].prefetch_wasted += 1
            if load.pending:
                self._wrong.append(load)
            else:
                self._free_ring.append(load.slot)

    def release(self, load: Load) -> None:
        """The slot of a load that is done with; a cached one stays."""
        if not load.cached:
            self._free_ring.append(load.slot)

    def block(self, layer: int, slots: list[int]) -> ExpertBlock:
        return ExpertBlock(self.store.layouts[layer].format, self.arena, self._offsets[slots, : self._parts[layer]])

    def start(self, layer: int, loads: list[Load]) -> None:
        """Issues every read of these experts at once."""
        if not loads:
            return
        requests, dests = [], []
        for load in loads:
            base = load.slot * self.store.slot_bytes
            plan = self.store.plan(layer, load.expert)
            self._offsets[load.slot, : self._parts[layer]] = plan.pieces
            self._offsets[load.slot] += base
            for read in plan.reads:
                file = self.store.file(layer, read.file)
                requests.append((self._next_tag, file.fd, file.direct, read.offset, read.length, read.needed))
                dests.append(base + read.dest)
                self._loads[self._next_tag] = load
                self._next_tag += 1
            load.pending = len(plan.reads)
        self.reader.submit(self.arena, np.array(requests, np.int64), np.array(dests, np.int64))

    def wait(self, layer: int, at_least: int) -> list[Load]:
        """Experts that have arrived, checked; blocks until at least `at_least` reads are done."""
        if not self.reader.pending:
            raise RuntimeError("a fetch waits but nothing is being read")
        begin = time.perf_counter()
        completions = self.reader.wait(at_least)
        counters = self.stats.layers[layer]
        counters.stall_seconds += time.perf_counter() - begin
        arrived = []
        for tag, error, count, cached_count in completions:
            load = self._loads.pop(tag)
            load.pending -= 1
            load.bytes += count
            load.cached_bytes += cached_count
            load.error = load.error or error
            self.stats.layers[load.layer].bytes_read += count
            if load.position < 0:  # ahead of its time
                if load.pending == 0 and load in self._wrong:
                    self._wrong.remove(load)
                    self._free_ring.append(load.slot)
            elif load.pending == 0 or load.error:
                self.admit(load)
                arrived.append(load)
        counters.max_in_flight = max(counters.max_in_flight, self.reader.take_peak())
        return arrived

    def admit(self, load: Load) -> None:
        """Checks an expert that has arrived and is asked for, and makes it resident if it is to stay. Raises ReadError."""
        layer, counters = load.layer, self.stats.layers[load.layer]
        if load.error:
            reason = "the file ends too early" if load.error == _native.SHORT_READ else os.strerror(load.error)
            raise ReadError(f"{self._where(layer, load.expert)}: read failed: {reason}")
        self._check(layer, load)
        if not self.store.layouts[layer].tiled:
            self._arrange(self.store.layouts[layer], load.slot)
        if self.residency == "os" and load.cached_bytes == load.bytes:
            counters.hits += 1
        else:
            counters.misses += 1
        if load.cached:
            self._resident[layer][load.expert] = load.slot
            self._policies[layer].insert(load.expert)

    def _arrange(self, layout: ExpertLayout, slot: int) -> None:
        """Puts an expert's parts as kernels read them: in place, or, where other rows lie between its own, as a pack's record."""
        offsets = self._offsets[slot, : len(layout.format.parts)]
        if layout.in_place:
            if layout.format.quantized:
                self._ops.tile(layout.format, self.arena, offsets)
            return
        memory, begin = self.arena.view(), slot * self.store.slot_bytes
        record = make_record(layout.format, layout.stored_parts(memory, offsets.tolist()), self._ops.tiled)
        memory[begin : begin + record.shape[0]] = record
        offsets[:] = record_pieces(layout.format)[0]
        offsets += begin

    def drain(self) -> None:
        """Waits for every read in flight; what they bring is forgotten, and the slots of what was read ahead are free."""
        while self.reader.pending:
            for tag, *_ in self.reader.wait(self.reader.pending):
                self._loads.pop(tag, None)
        self._free_ring += [load.slot for load in (*self._ahead.values(), *self._wrong)]
        self._loads.clear()
        self._ahead.clear()
        self._wrong.clear()

    def _where(self, layer: int, expert: int) -> str:
        layout = self.store.layouts[layer]
        files = ", ".join(str(layout.files[i]) for i in sorted(set(layout.file_index[expert])))
        return f"{files}: layer {layer}, expert {expert}"

    def _check(self, layer: int, load: Load) -> None:
        layout = self.store.layouts[layer]
        if (
            layout.checksums is None
            or self._verify == "never"
            or (self._verify == "first" and load.expert in self._verified[layer])
        ):
            return
        begin = load.slot * self.store.slot_bytes
        record = self.arena.view()[begin : begin + layout.lengths[0]]
        if xxhash.xxh3_64_intdigest(record.data) != layout.checksums[load.expert]:
            raise ReadError(
                f"{self._where(layer, load.expert)}: checksum mismatch; the file is damaged, convert it again"
            )
        self._verified[layer].add(load.expert)
