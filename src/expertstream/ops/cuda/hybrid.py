"""Which experts in host memory a GPU's kernels compute, reading them over its link, and which the host computes where they lie."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...cuda.device import DeviceArray
from .. import ExpertBlock

if TYPE_CHECKING:
    from .experts import Experts

__all__ = ["Split", "measure"]

_ROUND_TRIP = 15e-6  # seconds that a question to the host and its answer take besides the computation
_ALWAYS = 20e-6  # seconds that a layer takes longer if it may ask at all
_USUAL = 0.25  # of a token's experts are in host memory, if the card is worth having
_SECONDS = 0.1  # that measuring takes, about


@dataclass(frozen=True)
class Split:
    """Seconds that an expert takes on either side, while the other is working too."""

    card: float
    host: float

    def share(self, most: int) -> NDArray[np.int32]:
        """Of n experts, 0 to `most`, how many the host computes, so that both are done as soon as possible."""
        found = np.zeros(most + 1, np.int32)
        for n in range(1, most + 1):
            ours = np.arange(n + 1)
            seconds = np.maximum(self.card * (n - ours), (ours > 0) * _ROUND_TRIP + self.host * ours)
            found[n] = int(seconds.argmin())
        return found

    def worth(self, top_k: int) -> bool:
        """Whether asking the host is faster than not asking it."""
        n = max(1, round(_USUAL * top_k))
        ours = int(self.share(n)[n])
        if ours == 0:
            return False
        return _ALWAYS + max(self.card * (n - ours), _ROUND_TRIP + self.host * ours) < self.card * n


def measure(ops: Experts, some: Sequence[tuple[DeviceArray, ExpertBlock]]) -> Split:
    """some: tables (n, P) of the addresses of experts in host memory, and the same experts. The host is timed while the card works, since
    they share the memory's bandwidth. Medians."""
    device, given = ops.device, []
    count = sum(block.offsets.shape[0] for _, block in some)
    for table, block in some:
        n, hidden = block.offsets.shape[0], block.format.matrices[0].cols
        x = np.random.default_rng(0).standard_normal((1, hidden), np.float32)
        ids = device.send(np.arange(n)), device.send(np.zeros(n, np.int32))
        given.append((table, block, x, device.send(x), ids, np.arange(n + 1), np.zeros(n, np.int64)))

    def launch() -> None:
        for table, block, _, x, (experts, tokens), _, _ in given:
            ops._experts(block.format, table, x, experts.address, tokens.address, block.offsets.shape[0], None)

    def seconds(work: Callable[[], None]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def on_card() -> None:
        launch()
        device.wait()

    def on_host() -> None:
        for _, block, x, _, _, starts, zeros in given:
            ops.cpu.experts(x, block, starts, zeros)

    cards, hosts = [seconds(on_card)], [seconds(on_host)]  # the first time is slower
    end = time.perf_counter() + _SECONDS
    while len(cards) < 2 or time.perf_counter() < end:
        cards.append(seconds(on_card))
        for _ in range(min(8, 1 + int(min(hosts) / cards[-1]))):  # so that the card is busy meanwhile
            launch()
        hosts.append(seconds(on_host))
        device.wait()
    return Split(median(cards[1:]) / count, median(hosts[1:]) / count)
