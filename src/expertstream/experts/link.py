"""Moves experts between memories: currently from files into the slots of an arena."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import xxhash

from .. import _native
from ..checkpoint.format import ExpertLayout, make_record, record_pieces
from ..errors import ReadError
from ..formats import Bytes
from ..formats.numbers import I64
from ..ops import ExpertBlock, Ops
from .fetch import Load
from .stats import ExpertStats
from .store import ExpertStore

__all__ = ["DiskLink"]


class DiskLink:
    """Reads expert records into slots, checks them, and converts them to the kernels' layout. Counts the bytes of each read in stats."""

    def __init__(
        self,
        store: ExpertStore,
        slots: int,
        reader: _native.Reader,
        ops: Ops,
        stats: ExpertStats,
        residency: str,
        verify: str,
    ) -> None:
        """residency "os": experts that came entirely from the page cache count as hits."""
        self.store, self.reader, self.arena = store, reader, _native.Arena(slots * store.slot_bytes)
        self.memory = self.arena.view()
        reader.register_memory(self.arena)
        ops.attach(self.arena)
        self.ops, self._stats, self._os, self._verify = ops, stats, residency == "os", verify
        self._parts = [len(layout.format.parts) for layout in store.layouts]
        self._offsets = np.zeros((slots, max(self._parts)), np.int64)
        self._loads: dict[int, Load] = {}  # by read tag
        self._next_tag = 0
        self._verified: list[set[int]] = [set() for _ in store.layouts]

    @property
    def pending(self) -> int:
        """Reads in flight."""
        return self.reader.pending

    def offsets(self, layer: int, slot: int) -> list[int]:
        """Where the parts of the expert in a slot begin in the arena."""
        found: list[int] = self._offsets[slot, : self._parts[layer]].tolist()
        return found

    def table(self, layer: int, slots: Sequence[int]) -> I64:
        """The same for several slots, (slots, parts)."""
        return self._offsets[list(slots), : self._parts[layer]]

    def block(self, layer: int, slots: Sequence[int]) -> ExpertBlock:
        """The experts in these slots, for the ops."""
        return ExpertBlock(self.store.layouts[layer].format, self.arena, self.table(layer, slots))

    def start(self, layer: int, loads: Sequence[Load]) -> None:
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
        """Loads whose last read is done or that have failed; blocks until at least `at_least` reads are done. The time is charged to
        `layer`."""
        if not self.reader.pending:
            raise RuntimeError("a fetch is waiting but nothing is being read")
        begin = time.perf_counter()
        completions = self.reader.wait(at_least)
        counters = self._stats.layers[layer]
        counters.stall_seconds += time.perf_counter() - begin
        done = []
        for tag, error, count, cached_count in completions:
            load = self._loads.pop(tag)
            load.pending -= 1
            load.bytes += count
            load.cached_bytes += cached_count
            load.error = load.error or error
            self._stats.layers[load.layer].bytes_read += count
            if load.pending == 0 or load.error:
                done.append(load)
        counters.max_in_flight = max(counters.max_in_flight, self.reader.take_peak())
        return done

    def drain(self) -> None:
        """Waits for all reads in flight and discards their results."""
        while self.reader.pending:
            for tag, *_ in self.reader.wait(self.reader.pending):
                self._loads.pop(tag, None)
        self._loads.clear()

    def admit(self, load: Load) -> None:
        """Checks a requested expert that has arrived. Raises ReadError."""
        layer, counters = load.layer, self._stats.layers[load.layer]
        if load.error:
            reason = "the file ends too early" if load.error == _native.SHORT_READ else os.strerror(load.error)
            raise ReadError(f"{self._where(layer, load.expert)}: read failed: {reason}")
        self._check(layer, load)
        if not self.store.layouts[layer].tiled:
            self._arrange(self.store.layouts[layer], load.slot)
        if self._os and load.cached_bytes == load.bytes:
            counters.hits += 1
        else:
            counters.misses += 1

    def release(self, slot: int) -> None:
        """Releases a slot's memory to the system; it is allocated again when it is written to."""
        self.arena.release(slot * self.store.slot_bytes, self.store.slot_bytes)

    def register(self, whole: bool) -> None:
        """Registers the arena with the kernel, or unregisters it while parts of it are released."""
        if not whole:
            self.reader.unregister_memory()
            self.ops.detach(self.arena)
            return
        if not self.reader.registered_buffers:
            self.reader.register_memory(self.arena)
        self.ops.attach(self.arena)

    def room(self, layer: int, slot: int, sizes: Sequence[int]) -> list[Bytes]:
        """The memory of a slot for an expert's parts, as kernels read them."""
        begin, memory = slot * self.store.slot_bytes, self.memory
        places = [begin + at for at in record_pieces(self.store.layouts[layer].format)[0]]
        self._offsets[slot, : len(places)] = places
        return [memory[at : at + size] for at, size in zip(places, sizes, strict=True)]

    def settle(self) -> None:
        """Waits until the backend has read what it was given: slots may then be written again."""
        self.ops.wait()

    def close(self) -> None:
        """Ends the backend's access to the arena."""
        self.ops.detach(self.arena)

    def _arrange(self, layout: ExpertLayout, slot: int) -> None:
        """Converts an expert's parts to the kernels' layout: in place if possible, otherwise as a pack's record."""
        offsets = self._offsets[slot, : len(layout.format.parts)]
        if layout.in_place:
            if layout.format.quantized:
                self.ops.tile(layout.format, self.arena, offsets)
            return
        memory, begin = self.arena.view(), slot * self.store.slot_bytes
        record = make_record(layout.format, layout.stored_parts(memory, offsets.tolist()), self.ops.tiled)
        memory[begin : begin + record.shape[0]] = record
        offsets[:] = record_pieces(layout.format)[0]
        offsets += begin

    def _check(self, layer: int, load: Load) -> None:
        layout = self.store.layouts[layer]
        known = self._verify == "first" and load.expert in self._verified[layer]
        if layout.checksums is None or self._verify == "never" or known:
            return
        begin = load.slot * self.store.slot_bytes
        record = self.arena.view()[begin : begin + layout.lengths[0]]
        if xxhash.xxh3_64_intdigest(record.data) != layout.checksums[load.expert]:
            raise ReadError(
                f"{self._where(layer, load.expert)}: checksum mismatch; the file is damaged, convert it again"
            )
        self._verified[layer].add(load.expert)

    def _where(self, layer: int, expert: int) -> str:
        layout = self.store.layouts[layer]
        files = ", ".join(str(layout.files[i]) for i in sorted(set(layout.file_index[expert])))
        return f"{files}: layer {layer}, expert {expert}"
