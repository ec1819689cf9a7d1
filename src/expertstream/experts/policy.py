"""Which resident expert of a layer makes room. One policy object a layer; experts are numbers.

A policy changes how often the disk is read, never what is computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import Protocol

__all__ = ["LFU", "LRU", "Policy", "make_policy"]


class Policy(Protocol):
    """What a cache asks of one layer's policy."""

    def touch(self, experts: Iterable[int]) -> None:
        """Resident experts were used."""

    def insert(self, expert: int) -> None:
        """An expert became resident."""

    def evict(self, keep: Set[int]) -> int | None:
        """Forgets and returns the expert that should go, never one of `keep`; None if only those are left."""


class LRU:
    """The least recently used goes."""

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
    """The least often used goes, the least recently used among equals. Counts are halved every `period` uses, so that an old
    favourite does not stay for ever; an evicted expert keeps its count."""

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


def make_policy(name: str) -> Policy:
    """ "lru" or "lfu"."""
    return LRU() if name == "lru" else LFU()
