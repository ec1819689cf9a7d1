"""The slots of one memory: which experts they hold, and which make room. Independent of reading.

There are two kinds of slots. Cached slots keep experts from token to token, an equal share for each layer, so that one token's pass through
all layers cannot evict what the next one needs. Ring slots hold the other experts while one layer is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from .policy import make_policy

__all__ = ["Tier"]


class Tier:
    """`resident` is the only structure that is always consistent: an expert is added to it only after its bytes were read and checked, and
    removed before its slot is reused. rebuild() restores all the others from it."""

    def __init__(
        self, slots: int, ring: int, num_experts: Sequence[int], policy: str, give_up: Callable[[int], None]
    ) -> None:
        """slots: the total, including `ring` ring slots. num_experts: of each layer. give_up: releases a slot's memory."""
        self.slots, self.ring, self._num_experts, self._policy, self._give_up = (
            slots,
            ring,
            num_experts,
            policy,
            give_up,
        )
        # Cached slots: planned, current, and the fewest so far.
        self.planned = self.cached = self.least = slots - ring
        self.quotas = self._shares(self.cached)
        self.free_ring = list(range(ring))[::-1]
        self.free = list(range(ring, slots))[::-1]
        self.parked: list[int] = []  # slots whose memory is released for now
        self.withdrawn: set[int] = set()  # slots without memory, see withdraw()
        self.resident: list[dict[int, int]] = [{} for _ in num_experts]  # of each layer, expert → slot
        self.owned = [0] * len(num_experts)  # cached slots of each layer, resident or being read into
        self._policies = [make_policy(policy) for _ in num_experts]

    def _shares(self, cached: int) -> list[int]:
        """Each layer's share of the cached slots."""
        share, extra = divmod(cached, len(self._num_experts))
        return [min(share + (i < extra), count) for i, count in enumerate(self._num_experts)]

    def lookup(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of experts (distinct) if all of them are resident, counted as a use of each; otherwise None."""
        resident = self.resident[layer]
        slots = [resident.get(expert, -1) for expert in experts]
        if -1 in slots:
            return None
        self._policies[layer].touch(experts)
        return slots

    def take(self, layer: int, keep: Set[int], evict: bool, spare: int) -> tuple[int, bool, bool] | None:
        """A slot for a miss, whether it is a cached one, and whether an expert was evicted: the layer's share first, then the ring; None if
        all are in use. `evict`: evicts a resident expert that is not in `keep` if needed, and leaves `spare` ring slots free."""
        if self.owned[layer] < self.quotas[layer]:
            self.owned[layer] += 1
            return self.free.pop(), True, False
        if evict:
            victim = self._policies[layer].evict(keep)
            if victim is not None:
                return self.resident[layer].pop(victim), True, True
        if len(self.free_ring) > (spare if evict else 0):
            return self.free_ring.pop(), False, False
        return None

    def insert(self, layer: int, expert: int, slot: int) -> None:
        """Makes an expert that has arrived in a cached slot resident."""
        self.resident[layer][expert] = slot
        self._policies[layer].insert(expert)

    def replace(self, layer: int, expert: int, other: int, slot: int) -> int:
        """`other` becomes resident in `slot` in place of an expert, whose slot is returned."""
        policy, resident = self._policies[layer], self.resident[layer]
        policy.evict(resident.keys() - {expert})
        self.insert(layer, other, slot)
        return resident.pop(expert)

    def drop(self, layer: int, expert: int) -> None:
        """Frees the slot of a resident expert."""
        self._policies[layer].evict(self.resident[layer].keys() - {expert})
        self.free.append(self.resident[layer].pop(expert))
        self.owned[layer] -= 1

    def resize(self, cached: int) -> list[int]:
        """Sets the number of cached slots, from 0 to the planned number; returns how many experts of each layer were evicted."""
        self.cached, self.quotas, self.least = cached, self._shares(cached), min(self.least, cached)
        evictions = [0] * len(self.quotas)
        for layer, quota in enumerate(self.quotas):
            while self.owned[layer] > quota:
                victim = self._policies[layer].evict(set())
                assert victim is not None
                self._park(self.resident[layer].pop(victim))
                self.owned[layer] -= 1
                evictions[layer] += 1
        while self.free and sum(self.owned) + len(self.free) > cached:
            self._park(self.free.pop())
        while self.parked and sum(self.owned) + len(self.free) < cached:
            self.free.append(self.parked.pop())
        return evictions

    def withdraw(self, slots: Sequence[int]) -> None:
        """Removes slots, and the experts in them; rebuild() follows."""
        gone = set(slots)
        for layer in self.resident:
            for expert in [expert for expert, slot in layer.items() if slot in gone]:
                del layer[expert]
        self.withdrawn |= gone
        self.cached = self.planned - len(self.withdrawn)

    def restore(self, slots: Sequence[int]) -> None:
        """Undoes withdraw(); rebuild() follows."""
        self.withdrawn -= set(slots)
        self.cached = self.planned - len(self.withdrawn)

    def _park(self, slot: int) -> None:
        self.parked.append(slot)
        self._give_up(slot)

    def rebuild(self) -> None:
        """Recovers after an exception at any point: resident experts stay, up to their layer's share; all other structures are rebuilt."""
        self.quotas = self._shares(self.cached)
        for layer, quota in zip(self.resident, self.quotas, strict=True):
            while len(layer) > quota:
                layer.popitem()
        used = {slot for layer in self.resident for slot in layer.values()}
        free = [slot for slot in range(self.slots) if slot not in used and slot not in self.withdrawn]
        room = max(0, self.cached - len(used))
        self.free_ring, self.free = free[: self.ring][::-1], free[self.ring : self.ring + room][::-1]
        self.parked = []
        for slot in free[self.ring + room :]:
            self._park(slot)
        self.owned = [len(layer) for layer in self.resident]
        self._policies = [make_policy(self._policy) for _ in self.resident]
        for policy, layer in zip(self._policies, self.resident, strict=True):
            for expert in layer:
                policy.insert(expert)
