"""Fetches the experts of one layer from disk and yields them as they become ready."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from ..ops import ExpertBlock

if TYPE_CHECKING:
    from .cache import ExpertCache

__all__ = ["Fetch", "Load", "Part"]


@dataclass(frozen=True)
class Part:
    """Experts that are ready: their positions in the requested list, ascending, and their memory."""

    positions: list[int]
    block: ExpertBlock


@dataclass
class Load:
    """An expert that is being read into a slot."""

    layer: int
    position: int
    expert: int
    slot: int
    cached: bool  # becomes resident when it has arrived
    pending: int  # outstanding reads
    cached_bytes: int = 0
    bytes: int = 0
    error: int = 0  # of a prefetch: raised when the expert is requested


@dataclass
class Fetch:
    """A running fetch of one layer's experts. Iterating yields Parts: in ascending order if `ordered`; otherwise resident experts first,
    then the others as they arrive. Leaving the context frees the ring slots."""

    cache: ExpertCache
    layer: int
    experts: list[int]
    prompt: bool = False
    here: bool = False  # into host memory, whatever a GPU has
    ordered: bool = field(init=False)
    _slots: dict[int, int] = field(default_factory=dict)  # position → slot, ready
    _loads: list[Load] = field(default_factory=list)
    _issued: int = 0  # ordered: positions looked at so far

    def __post_init__(self) -> None:
        # All at once if the ring can hold them all; otherwise in order, through the available slots.
        together = min(self.cache.tier.ring - self.cache.prefetcher.most, self.cache.most_together)
        self.ordered = len(self.experts) > together
        self._issue()
        self.cache.drop_predictions(self.layer)

    def __enter__(self) -> Fetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an exception, recovery is left to the next fetch, whatever was interrupted. But the reads end now, so
        # that nothing is written after the caller has the error.
        if kind is not None:
            self.cache.drain()
            return
        self._release(self._loads)
        self.cache.finish()

    def __iter__(self) -> Iterator[Part]:
        return self._in_order() if self.ordered else self._as_ready()

    def _issue(self) -> None:
        """Looks up the next experts and starts reading the missing ones, as long as there are slots."""
        keep, loads, missing = set(self.experts), [], False
        while self._issued < len(self.experts):
            position, expert = self._issued, self.experts[self._issued]
            slot = self.cache.lookup(self.layer, expert, self.here)
            if slot is not None:
                self._slots[position] = slot
            else:
                taken = self.cache.take_slot(self.layer, keep, evict=not self.prompt)
                if taken is None:
                    break
                if not missing:  # also if all were prefetched: prefetching does not check the file
                    self.cache.store.check_unchanged(self.layer)
                    missing = True
                load = self.cache.take_prefetched(self.layer, expert, position, *taken)
                if load is None:
                    load = Load(self.layer, position, expert, *taken, pending=1)
                    loads.append(load)
                elif load.pending == 0:
                    self.cache.admit(load)
                    self._slots[position] = load.slot
                self._loads.append(load)
            self._issued += 1
        self.cache.link.start(self.layer, loads)

    def _part(self, positions: list[int]) -> Part:
        if self.here:
            return Part(positions, self.cache.link.block(self.layer, [self._slots[p] for p in positions]))
        slots = {self.experts[p]: self._slots[p] for p in positions}
        return Part(positions, self.cache.block(self.layer, slots, self.experts, self.prompt))

    def _wait(self) -> None:
        for load in self.cache.wait(self.layer, 1):
            self._slots[load.position] = load.slot

    def _as_ready(self) -> Iterator[Part]:
        done: set[int] = set()
        while len(done) < len(self.experts):
            ready = sorted(self._slots.keys() - done)
            if ready:
                done.update(ready)
                yield self._part(ready)
            else:
                self._wait()

    def _in_order(self) -> Iterator[Part]:
        position = 0
        while position < len(self.experts):
            ready: list[int] = []
            while position in self._slots and len(ready) < self.cache.most_together:
                ready.append(position)
                position += 1
            if not ready:
                self._wait()
                continue
            yield self._part(ready)
            finished = [load for load in self._loads if load.position < position]
            self._loads = [load for load in self._loads if load.position >= position]
            if finished and not self.here:  # the host has read them; a GPU may be waiting for it
                self.cache.link.settle()
            self._release(finished)
            self._issue()

    def _release(self, loads: list[Load]) -> None:
        for load in loads:
            self.cache.release(load)
