"""The cost of the experts: counted where it occurs, per layer, never estimated."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["ExpertStats", "LayerStats"]


@dataclass
class LayerStats:
    """One layer's counters. A hit is an expert that was resident when it was requested; with `--residency os`, one that the page cache
    supplied without waiting."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bytes_read: int = 0  # requested from the file system; with `--residency os` that includes the page cache
    stall_seconds: float = 0.0  # waiting for reads with nothing else to do
    prefetched: int = 0  # misses that had been prefetched
    prefetch_wasted: int = 0  # prefetched but not requested; neither hit nor miss
    max_in_flight: int = 0  # most reads in flight at once

    def add(self, other: LayerStats) -> None:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(mine, theirs) if f.name == "max_in_flight" else mine + theirs)

    def since(self, earlier: LayerStats) -> LayerStats:
        """The counts since `earlier`, a copy of these counters; max_in_flight is not a sum and stays as it is."""
        return LayerStats(
            **{
                f.name: getattr(self, f.name) - (0 if f.name == "max_in_flight" else getattr(earlier, f.name))
                for f in fields(self)
            }
        )

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0


class ExpertStats:
    """One LayerStats per layer; copies and differences give the counts of an interval."""

    def __init__(self, layers: int) -> None:
        self.layers = [LayerStats() for _ in range(layers)]

    def total(self) -> LayerStats:
        total = LayerStats()
        for layer in self.layers:
            total.add(layer)
        return total

    def copy(self) -> ExpertStats:
        return self.since(ExpertStats(len(self.layers)))

    def since(self, earlier: ExpertStats) -> ExpertStats:
        result = ExpertStats(0)
        result.layers = [now.since(then) for now, then in zip(self.layers, earlier.layers, strict=True)]
        return result
