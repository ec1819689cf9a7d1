"""Measures a GPU in seconds: its memory, its link to the host, a large product, and how long small kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cuda import driver as drivers
from ..formats import Affine
from ..ops import Weight
from ..ops.cuda import CudaOps
from .machine import timed

__all__ = ["Card", "measure_card", "rates_of"]

# Norms of one token that take as long as the kernels of a layer do besides reading weights (docs/log.md).
_LAYER_KERNELS = 16


@dataclass(frozen=True)
class Card:
    """A GPU's rates, in bytes and multiply-adds per second, and its memory."""

    name: str
    free_bytes: int
    memory_rate: float  # of a copy, both ways counted
    link_rate: float  # from registered host memory
    arithmetic_rate: float  # of a prompt's products with 4-bit weights
    layer_seconds: float  # that the kernels of a layer take for one token, if their weights are small


def measure_card(number: int, size: int = 256 << 20, width: int = 4096, tokens: int = 2048) -> Card:
    """size: of what is copied, in bytes; width, tokens: of the product. Raises DeviceError, BudgetError."""
    ops = CudaOps(drivers.open_driver(number), 1)
    try:
        return rates_of(ops, size, width, tokens)
    finally:
        ops.close()


def rates_of(ops: CudaOps, size: int, width: int, tokens: int) -> Card:
    """The same by ops that are open."""
    device, driver = ops.device, ops.device.driver
    free = driver.free_bytes()
    host, (a, b) = device.pinned(size), (device.empty((size,), np.uint8) for _ in range(2))

    def link() -> None:
        driver.upload_beside(a.address, host.ctypes.data, size, None)
        driver.join()
        driver.synchronize()

    def memory() -> None:
        for _ in range(4):
            driver.copy(b.address, a.address, size)
        driver.synchronize()

    link_rate, memory_rate = size / timed(link), 8 * size / timed(memory)
    device.unpin([host])
    rng = np.random.default_rng(0)
    format = Affine(width, width, 4, 64, "bf16")
    weight = ops.bind(Weight(format, tuple(rng.integers(0, 1, n, np.uint8) for n in format.part_bytes)))
    x = device.send(rng.standard_normal((tokens, width), np.float32))

    def product() -> None:
        ops.project(x, [weight])
        driver.synchronize()

    arithmetic_rate = tokens * width * width / timed(product)
    row, scale = device.send(rng.standard_normal((1, 2048), np.float32)), np.ones(2048, np.float32)
    ops.rms_norm(row, scale, 1e-6)
    rounds = 200
    with device.private_memory() as pool:
        driver.begin_capture()
        try:
            y: Any = row
            for _ in range(rounds):
                y = ops.rms_norm(y, scale, 1e-6)
        finally:
            graph = driver.end_capture()

    def chain() -> None:
        driver.replay(graph)
        driver.synchronize()

    seconds = timed(chain) / rounds
    driver.drop(graph)
    del y
    device.absorb(pool)
    return Card(driver.name, free, memory_rate, link_rate, arithmetic_rate, _LAYER_KERNELS * seconds)
