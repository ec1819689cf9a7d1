"""The ops on an NVIDIA GPU: launches here, loops in cuda/kernels. Every value has the bits that the CPU's ops give it; cuda/kernels say in
which order sums run. Arrays are on the card, and so is the trunk; experts are read where they lie, there or in registered host memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...batch import Batch
from ...cuda.device import DeviceArray, StateArray
from ...cuda.recording import SEGMENT, Recording
from ...errors import BudgetError, DeviceError
from ...formats import Bytes, ExpertFormat, MatrixFormat
from ...formats.numbers import F32, I64
from .. import Arena, Elsewhere, Weight
from .experts import Experts
from .mixers import Mixers
from .rows import MOST_RECORDED, BoundMatrix, cdiv

__all__ = ["CudaOps"]

_MOST_RECORDINGS = 12  # each has its own memory for what passes through a step


class CudaOps(Experts, Mixers):
    """Implements `ops.Ops`, which documents every method, with DeviceArrays in place of NumPy's. Not thread-safe."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        itself = weakref.ref(self)  # the device must not keep its ops alive

        def make_room() -> None:
            ops = itself()
            if ops is not None and ops.recording is None:
                ops._drop_recordings(0)

        self.device.make_room = make_room

    def close(self) -> None:
        with suppress(DeviceError):
            self._drop_recordings(0)
        self.device.close()

    def _drop_recordings(self, keep: int) -> None:
        """Frees the memory of all recordings but the `keep` that were used last."""
        self._last = self._normed = self._routed = None  # they may lie there
        self._gates.clear()
        while len(self._recordings) > keep:
            self._recordings.pop(next(iter(self._recordings))).close()

    def bind(self, weight: Weight) -> Weight:
        parts = self.cpu.tiled(weight.format, weight.parts)
        kept = [self.device.send(np.ascontiguousarray(part).view(np.uint8)) for part in parts]
        bias = None if weight.bias is None else self.device.send(weight.bias)
        if bias is not None:
            kept.append(bias)
        addresses = [part.address for part in kept]
        table = self.device.send(np.array([addresses], np.uint64))
        weight.handle = BoundMatrix(weight.format, addresses, 0 if bias is None else bias.address, table, kept)
        weight.parts = ()  # the card has them
        return weight

    def tile(self, format: ExpertFormat, arena: Arena, offsets: I64) -> None:
        self.cpu.tile(format, arena, offsets)

    def tiled(self, format: MatrixFormat, parts: Sequence[Bytes]) -> tuple[Bytes, ...]:
        return self.cpu.tiled(format, parts)

    def attach(self, arena: Arena) -> None:
        self.device.register(arena.view())
        base = self.device.registered(arena.view())
        if self._bases.setdefault(id(arena), base) != base:  # recordings have it
            self._bases[id(arena)] = base
            self._drop_recordings(0)

    def detach(self, arena: Arena) -> None:
        with suppress(DeviceError):  # a card that has failed reads nothing any more
            self.device.driver.synchronize()
            self.device.unregister(arena.view())

    def free_bytes(self) -> int:
        return self.device.driver.free_bytes()

    def trim(self) -> None:
        self.device.trim()

    def memory(self, size: int) -> DeviceArray:
        return self.device.empty((size,), np.uint8)

    def copy_in(self, to: int, source: Bytes) -> None:
        self.device.upload(to, source)

    def mark(self) -> Any:
        return self.device.driver.mark()

    def copies_beside(self, to: Sequence[int], sources: Sequence[int], sizes: Sequence[int], after: Any) -> None:
        upload = self.device.driver.upload_beside
        for at, source, size in zip(to, sources, sizes, strict=True):
            upload(at, source, size, after)
            after = None  # the others follow the first

    def copy_out_beside(self, address: int, to: Bytes, after: Any) -> None:
        self.device.driver.bring_beside(to.ctypes.data, address, to.nbytes, after)

    def join(self) -> None:
        self.device.driver.join()

    def readable(self, arena: Arena) -> int | None:
        memory = arena.view()
        return self.device.registered(memory) if self.device.is_registered(memory) else None

    def send(self, values: NDArray[Any]) -> DeviceArray:
        return self.device.send(values)

    def state(self, shape: Sequence[int], dtype: Any) -> Any:
        return StateArray(self.device, shape, dtype)

    def recorded(self, batch: Batch, run: Callable[[Batch], Any], elsewhere: Elsewhere) -> tuple[F32, I64, I64] | None:
        """By a recording of run(batch) made at its second use; None at the first, which loads what a recording must not."""
        longest = max(segment.position for segment in batch.segments) + 1
        if len(batch.segments) > MOST_RECORDED:
            return None
        key = len(batch.segments), 1 << max(0, (cdiv(longest, SEGMENT) - 1).bit_length()), elsewhere.partial
        if self._seen.get(key) != "recordable":
            self._seen.setdefault(key, "recordable")
            return None
        found = self._recordings.pop(key, None)
        if found is None:
            self._drop_recordings(_MOST_RECORDINGS - 1)
            try:
                found = self._record(key, batch, run)
            except BudgetError:  # such a pass is launched kernel by kernel from now on
                self._seen[key] = "too large"
                return None
        self._recordings[key] = found  # the last that was used
        found.launch(batch)
        found.answer(self.cpu.engine, partial(self.compute, elsewhere))
        elsewhere.meanwhile()
        logits = found.finish()
        return logits, found.ids, found.computed

    def _record(self, key: tuple[int, int, bool], batch: Batch, run: Callable[[Batch], Any]) -> Recording:
        self._constant("blocks", key[0], 1)
        found = Recording(self.device, *key[:2], self.cpu.rotary)
        self.recording = found
        try:
            found.record(batch, run)
        finally:
            self.recording = None
        return found
