"""Predicts which experts of the next layer to prefetch. Advisory: a wrong prediction costs a read, never a value.

The next layer's router, applied to this layer's hidden state, selects many of the experts that it will select in the end. Its accuracy is
measured for each rank of its list, whether or not anything is prefetched: a rank is used while it is right more often than not, since its
reads, done while the disk would be idle, then save more waiting than wrong ones add.
"""

from __future__ import annotations

__all__ = ["Prefetcher"]


class Prefetcher:
    """One for all layers. `most`: experts to prefetch for one layer, 0 for none."""

    def __init__(self, most: int, threshold: float = 0.5, memory: float = 0.02) -> None:
        self.most, self.threshold, self._memory = most, threshold, memory
        self.accuracy: list[float] = []  # by rank: how often it was right recently
        self._guess: tuple[int, list[int]] | None = None  # layer; experts, most likely first

    def guess(self, layer: int, ranked: list[int]) -> list[int]:
        """Records the predicted experts; returns those worth prefetching."""
        self._guess = layer, ranked
        self.accuracy += [0.0] * (len(ranked) - len(self.accuracy))
        return [expert for rank, expert in enumerate(ranked) if self.accuracy[rank] >= self.threshold]

    def learn(self, layer: int, experts: list[int]) -> None:
        """Compares the prediction with the experts that the layer requested."""
        if self._guess is None or self._guess[0] != layer:
            return
        actual = set(experts)
        for rank, expert in enumerate(self._guess[1]):
            self.accuracy[rank] += self._memory * ((expert in actual) - self.accuracy[rank])
        self._guess = None
