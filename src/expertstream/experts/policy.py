"""Eviction policies: which resident expert of a layer makes room. One policy object per layer; experts are numbers.

A policy changes how often the disk is read, never what is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import Protocol

__all__ = ["LFU", "LRU", "S3FIFO", "Policy", "make_policy"]


class Policy(Protocol):
    """The eviction policy of one layer."""

    def touch(self, experts: Iterable[int]) -> None:
        """Resident experts were used."""

    def insert(self, expert: int) -> None:
        """An expert became resident."""

    def evict(self, keep: Set[int]) -> int | None:
        """Removes and returns the expert to evict, never one of `keep`; None if there is no other."""


class LRU:
    """Evicts the least recently used expert."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, experts: Iterable[int]) -> None:
        move_to_end = self._order.move_to_end
        for expert in experts:
            move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._order[expert] = None

    def evict(self, keep: Set[int]) -> int | None:
        victim = next((expert for expert in self._order if expert not in keep), None)
        if victim is not None:
            del self._order[victim]
        return victim


class LFU:
    """Evicts the least frequently used expert, the least recently used among equals. Counts are halved every `period` uses, so that old
    counts decay; an evicted expert keeps its count."""

    def __init__(self, period: int = 1024) -> None:
        self._counts: dict[int, float] = {}
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._period, self._uses = period, 0

    def _count(self, expert: int) -> None:
        self._counts[expert] = self._counts.get(expert, 0.0) + 1.0
        self._uses += 1
        if self._uses % self._period == 0:
            for key in self._counts:
                self._counts[key] /= 2

    def touch(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._count(expert)
            self._resident.move_to_end(expert)

    def insert(self, expert: int) -> None:
        self._count(expert)
        self._resident[expert] = None

    def evict(self, keep: Set[int]) -> int | None:
        candidates = [expert for expert in self._resident if expert not in keep]
        if not candidates:
            return None
        victim = min(candidates, key=lambda expert: self._counts[expert])
        del self._resident[victim]
        return victim


class S3FIFO:
    """Three queues (Yang et al., FIFO Queues are All You Need for Cache Eviction, 2023): new experts enter a small one, a tenth of the
    total, and move to the main one only if they are used again; experts evicted from the small one are remembered for a while, and enter
    the main one if they return."""

    def __init__(self) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}  # of residents since they were inserted or last spared, at most 3

    def touch(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._uses[expert] = min(3, self._uses[expert] + 1)

    def insert(self, expert: int) -> None:
        queue = self._main if expert in self._ghosts else self._small
        self._ghosts.pop(expert, None)
        queue[expert] = None
        self._uses[expert] = 0

    def evict(self, keep: Set[int]) -> int | None:
        total = len(self._small) + len(self._main)
        queues = (self._small, self._main) if 10 * len(self._small) >= total else (self._main, self._small, self._main)
        for queue in queues:  # the main queue again, since experts spared by the small one move there
            victim = self._from(queue, keep)
            if victim is not None:
                del self._uses[victim]
                while len(self._ghosts) > len(self._main):
                    self._ghosts.popitem(last=False)
                return victim
        return None

    def _from(self, queue: OrderedDict[int, None], keep: Set[int]) -> int | None:
        """The first expert of the queue that may be evicted; used ones before it are spared."""
        for expert in list(queue) * 4:  # each use spares an expert once, and at most 3 are counted
            if expert in keep or expert not in queue:
                continue
            if queue is self._small:
                del queue[expert]
                if self._uses[expert] == 0:
                    self._ghosts[expert] = None
                    return expert
                self._main[expert], self._uses[expert] = None, 0
            elif self._uses[expert] == 0:
                del queue[expert]
                return expert
            else:
                queue.move_to_end(expert)
                self._uses[expert] -= 1
        return None


def make_policy(name: str) -> Policy:
    """ "lru", "lfu" or "s3fifo"."""
    policies: dict[str, type[Policy]] = {"lru": LRU, "lfu": LFU, "s3fifo": S3FIFO}
    return policies[name]()
