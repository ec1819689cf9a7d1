"""Which experts are on the GPU and which in the host's memory: filled when a model is opened, if the two hold all experts, and changed
between decode steps as experts are used.

Kernels find experts in the GPU's table, so a step needs nothing of this. Copies run beside the next step, which still finds experts where
they were; the table is changed between the two steps after it, in the order of the card's work, so that nothing waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats.numbers import I64
from .fetch import Load
from .stats import ExpertStats
from .vram import Vram

if TYPE_CHECKING:
    from .cache import ExpertCache

__all__ = ["Shares"]

_AT_ONCE = 8  # experts that come to the card between two steps in place of others, at most
_FILL = 64  # and into slots that have none
_GROWTH = 1.0005  # of what a use counts, from step to step: the last 1,400 steps count as much as all before
_MARGIN = 2  # uses by which an expert must be ahead of the one whose place it takes


@dataclass
class _Move:
    """An expert that is being copied to a slot of the card: a spare one, if a `victim` leaves the card. That goes to a slot of the arena,
    if given; otherwise it is there already, or lost."""

    layer: int
    expert: int
    victim: int | None
    spare: int
    slot: int | None


class Shares:
    """Of one model."""

    def __init__(self, cache: ExpertCache, vram: Vram) -> None:
        self._cache, self._vram = cache, vram
        self._moves: list[_Move] = []
        self._entered: list[_Move] = []  # whose copies are done when the next step has begun
        self._heat = np.zeros(vram.near.shape)  # how often each expert was used, newer uses counting more
        self._unit = 1.0
        self._layers = np.arange(vram.near.shape[0])[:, None]
        self._last: I64 | None = None  # (layers, T·top_k): what the last recorded step selected
        self._computed: I64 = np.zeros(0, np.int64)  # (layers,): experts that the host computed for it
        self.moved = 0

    def fill(self) -> None:
        """Reads what neither memory has, if they can hold all experts. If the arena alone can, it gets them all, and the card has copies of
        some; otherwise each expert is in one of them. Raises ReadError."""
        cache, vram = self._cache, self._vram
        near, below = vram.tier, cache.tier
        counts = [layout.num_experts for layout in cache.store.layouts]
        sizes = list(zip(near.quotas, below.quotas, counts, strict=True))
        only = all(card >= count for card, _, count in sizes)
        twice = not only and all(arena >= count for _, arena, count in sizes)
        if vram.complete or vram.partial:
            return
        if any(card + arena < count for card, arena, count in sizes):
            vram.make_table(None)
            return
        before = [(layer.hits, layer.misses) for layer in cache.stats.layers]
        cache.begin()
        for layer, (card, _, count) in enumerate(sizes):
            here, there = near.resident[layer], below.resident[layer]
            if twice:
                self._read(layer, [e for e in range(count) if e not in there])
                wanted = [e for e in range(count) if e not in here][: card - len(here)]
                for expert in wanted:
                    vram.bring(layer, expert, there[expert], set(), False)
                continue
            for expert in [e for e in there if e in here]:
                below.drop(layer, expert)
            missing = [e for e in range(count) if e not in here and e not in there]
            room = card - len(here)
            self._read_to_card(layer, missing[:room])
            self._read(layer, missing[room:])
        cache.finish()
        for counters, (hits, misses) in zip(cache.stats.layers, before, strict=True):
            counters.hits, counters.misses = hits, misses
        vram.make_table(below.resident)
        if vram.complete and not vram.holds_all:
            vram.rate(below.resident)

    def _read(self, layer: int, experts: list[int]) -> None:
        """Reads experts into cached slots of the arena."""
        loads = []
        for expert in experts:
            taken = self._cache.tier.take(layer, set(), False, 0)
            assert taken is not None and taken[1], "a layer's share holds its experts"
            loads.append(Load(layer, 0, expert, taken[0], True, 1))
        self._arrive(layer, loads)

    def _read_to_card(self, layer: int, experts: list[int]) -> None:
        """Reads experts through the arena's ring slots."""
        tier, link = self._cache.tier, self._cache.link
        for first in range(0, len(experts), tier.ring):
            some = experts[first : first + tier.ring]
            loads = [Load(layer, 0, expert, tier.free_ring.pop(), False, 1) for expert in some]
            self._arrive(layer, loads)
            for load in loads:
                self._vram.bring(layer, load.expert, load.slot, set(), False)
            link.settle()
            tier.free_ring += [load.slot for load in loads]

    def _arrive(self, layer: int, loads: list[Load]) -> None:
        self._cache.link.start(layer, loads)
        left = len(loads)
        while left:
            left -= len(self._cache.wait(layer, 1))

    def count(self, experts: I64, computed: I64, stats: ExpertStats) -> None:
        """Counts what a recorded step selected (layers, T, top_k), and how many experts of each layer the host computed."""
        flat = experts.reshape(experts.shape[0], -1)
        layers, once = self._layers[: experts.shape[0]], experts.shape[1] == 1
        _add(self._cache.uses, layers, flat, 1, once)
        for layer, counters in enumerate(stats.layers):
            if not self._vram.partial:
                counters.hits += flat.shape[1]
            else:  # what the host computed was counted when it was fetched
                counters.hits += (flat.shape[1] if once else len(set(flat[layer].tolist()))) - int(computed[layer])
        if self._vram.holds_all:
            return
        self._unit *= _GROWTH
        _add(self._heat, layers, flat, self._unit, once)
        if self._unit > 1e9:
            self._heat /= self._unit
            self._unit = 1.0
        self._last, self._computed = flat, computed

    def copying(self, layer: int) -> set[int]:
        """Experts of the arena that are being copied to the card: their slots must not be written."""
        return {move.expert for move in (*self._moves, *self._entered) if move.layer == layer}

    def move(self) -> None:
        """Enters in the table what was copied during the last step, and begins to bring some of what kernels read from the arena then to
        the card, in place of what is used less. Call when the next step was launched: all of it takes effect after that one."""
        vram, cache, flat = self._vram, self._cache, self._last
        if flat is None or not (vram.complete or vram.partial):
            return
        cache.begin()
        vram.mark()
        self._enter_moves()
        layers, self._last = self._layers[: flat.shape[0]], None
        far = ~vram.near[layers, flat]
        vram.count_far(far.sum(1), self._computed)
        if vram.partial:
            far = self._fill_up(flat, far)
        if far.any():
            on_card = np.where(vram.near, self._heat, np.inf)
            victims = on_card.argmin(1)
            wanted = np.where(far, self._heat[layers, flat], -1.0)
            best, rows = wanted.argmax(1), layers[:, 0]
            ahead = wanted[rows, best] - on_card[rows, victims]
            for layer in np.argsort(-ahead)[:_AT_ONCE].tolist():
                enough = ahead[layer] > _MARGIN * self._unit
                if not enough or not self._begin(layer, int(flat[layer, best[layer]]), int(victims[layer])):
                    break
        cache.finish()

    def _fill_up(self, flat: Any, far: Any) -> Any:
        """Starts to copy experts that the host has into slots without one; which of the far ones (layers, n) may take another's place."""
        tier, vram = self._cache.tier, self._vram
        movable, busy = far.copy(), {(move.layer, move.expert) for move in (*self._moves, *self._entered)}
        for layer, at in np.argwhere(far).tolist():
            expert = int(flat[layer, at])
            below = tier.resident[layer].get(expert)
            if below is None or (layer, expert) in busy:
                movable[layer, at] = False
                continue
            slot = vram.take(layer) if len(self._moves) < _FILL else None
            if slot is not None:
                self._moves.append(_Move(layer, expert, None, slot, None))
                busy.add((layer, expert))
                vram.copy_beside(layer, below, slot)
                movable[layer, at] = False
            elif vram.tier.owned[layer] < vram.tier.quotas[layer]:
                movable[layer, at] = False  # later
        return movable

    def _begin(self, layer: int, expert: int, victim: int) -> bool:
        """Starts to copy; False if there is no room."""
        tier, vram = self._cache.tier, self._vram
        twice = vram.partial or victim in tier.resident[layer]
        if not vram.spares or not (twice or tier.free_ring):
            return False
        move = _Move(layer, expert, victim, vram.spares.pop(), None if twice else tier.free_ring.pop())
        self._moves.append(move)
        if move.slot is not None:
            vram.give_back(layer, victim, move.slot)
        vram.copy_beside(layer, tier.resident[layer][expert], move.spare)
        return True

    def _enter_moves(self) -> None:
        """Enters what was copied: an expert is in its new place before it leaves the old one."""
        self._entered.clear()
        if not self._moves:
            return
        tier, vram = self._cache.tier, self._vram
        vram.join()
        for m in self._moves:
            if m.victim is None:
                vram.add(m.layer, m.expert, m.spare)
            else:
                if m.slot is not None:
                    tier.free_ring.append(tier.replace(m.layer, m.expert, m.victim, m.slot))
                slot = None if vram.partial else tier.resident[m.layer][m.victim]
                vram.swap(m.layer, m.expert, m.victim, m.spare, slot)
            self.moved += 1
        self._entered, self._moves = self._moves, []
        vram.update_table()

    def abandon(self) -> None:
        """Forgets copies that are under way; both memories are as if they had not begun."""
        if self._moves:
            self._vram.join()
            self._cache.link.settle()
        for move in self._moves:
            if move.victim is None:
                self._vram.untake(move.layer, move.spare)
            else:
                self._vram.spares.append(move.spare)
            if move.slot is not None:
                self._cache.tier.free_ring.append(move.slot)
        self._moves.clear()
        self._entered.clear()


def _add(counts: Any, layers: I64, flat: I64, value: float, once: bool) -> None:
    """counts[layer, expert] += value for layers (L, 1) and their experts (L, n). once: no expert is there twice in a layer."""
    if once:
        counts[layers, flat] += value
    else:
        np.add.at(counts, (layers, flat), value)
