"""Which experts of the next layer to read before its router has spoken. Advisory: a wrong guess costs a read, never a value.

The next layer's router, asked about this layer's hidden state, names many of the experts that it will name in earnest. How many, is
measured for each rank of its list, whether or not anything is read on its word: a rank is followed while it has been right
more often than not, since then its reads, done while the disk would be idle, take more from the wait than wrong ones add.
"""

from __future__ import annotations

__all__ = ["Prefetcher"]


class Prefetcher:
    """One for all layers. `most`: experts to read ahead of one layer, 0 for none."""

    def __init__(self, most: int, threshold: float = 0.5, memory: float = 0.02) -> None:
        self.most, self.threshold, self._memory = most, threshold, memory
        self.accuracy: list[float] = []  # by rank: how often it was right, lately
        self._guess: tuple[int, list[int]] | None = None  # layer, experts, likeliest first

    def guess(self, layer: int, ranked: list[int]) -> list[int]:
        """Notes what the router was heard to say; returns the experts whose ranks have earned a read."""
        self._guess = layer, ranked
        self.accuracy += [0.0] * (len(ranked) - len(self.accuracy))
        return [expert for rank, expert in enumerate(ranked) if self.accuracy[rank] >= self.threshold]

    def learn(self, layer: int, experts: list[int]) -> None:
        """What the layer really asked for."""
        if self._guess is None or self._guess[0] != layer:
            return
        actual = set(experts)
        for rank, expert in enumerate(self._guess[1]):
            self.accuracy[rank] += self._memory * ((expert in actual) - self.accuracy[rank])
        self._guess = None
