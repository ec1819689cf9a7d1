"""Products with the trunk's matrices on a GPU, and the activations that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...cuda.device import Addition, DeviceArray, Kernel
from ...formats import KernelFormat
from ...formats.numbers import DTYPE_BYTES, F32
from .. import Weight
from .rows import CODES, DTYPES, MOST_RECORDED, Rows, bound, cdiv, three

__all__ = ["TILES", "TOKENS", "Activations", "Combination", "Products"]

_BATCH = 16  # tokens that are multiplied by a matrix without tensor cores, up to _TOGETHER of them in one pass over it
_TOGETHER = 8
_NARROW = 256  # tiles: no more than two for each multiprocessor of a large card
_WIDE = 512  # tiles, from which on those that run at once matter more than each one's registers
TOKENS, TILES = 32, 8  # of a block of multiply_many


@dataclass
class Activations:
    """Quantized activations: products.cu's."""

    q: DeviceArray
    scale: DeviceArray
    sum: DeviceArray
    codes: DeviceArray

    def pointers(self) -> tuple[int, int, int, int]:
        return self.q.address, self.scale.address, self.sum.address, self.codes.address


@dataclass
class Combination:
    """The weighted sum of few tokens' experts, which was put off: the next norm computes it. Of common.cuh's Sum."""

    acc: int
    y: DeviceArray
    weights: DeviceArray
    shared: DeviceArray | None
    factor: DeviceArray | None
    top_k: int

    def numbers(self) -> tuple[int, ...]:
        shared, factor = (0 if part is None else part.address for part in (self.shared, self.factor))
        return self.acc, self.y.address, self.weights.address, shared, factor, self.top_k

    def __call__(self, acc: DeviceArray) -> None:
        tokens, hidden = acc.shape
        combine = acc.device.kernels("rows.cu")["combine"]
        combine((cdiv(hidden, 256), tokens, 1), 256, 0, acc.address, *self.numbers(), hidden)


class Products(Rows):
    """Implements the products of `ops.Ops`."""

    # The last array that was quantized, after how many changes of it, for which group, and the result.
    _last: tuple[DeviceArray, int, int, Activations] | None = None
    _normed: tuple[DeviceArray, int] | None = None  # the last norm's output and its weight's identity

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._after_norm: dict[int, KernelFormat] = {}  # which matrices follow a norm, by its weight's identity

    def rms_norm(self, x: DeviceArray, weight: F32, eps: float) -> DeviceArray:
        y, n = self.device.empty(x.shape), x.shape[1]
        addition = x.taken(Addition)
        combination = None if addition is None else addition.other.taken(Combination)
        added = (
            combination.numbers() if combination is not None
            else (0 if addition is None else addition.other.address, 0, 0, 0, 0, 0)
        )  # fmt: skip
        # If matrices of one kind followed this norm the last time, their activations are made at once.
        k = self._after_norm.get(id(weight))
        if k is None:
            self._rows["rms_norm"](
                (x.shape[0], 1, 1), 256, 8 * n, x.address, *added, self._vector(weight), n, eps, y.address
            )
            self._normed = y, id(weight)
            return y
        acts = self._room_for(x.shape[0], n, k)
        threads = min(1024, max(128, 32 * (n // k.group_size)))
        self._products(k)["norm_rows"](
            (x.shape[0], 1, 1), threads, 8 * n, x.address, *added, self._vector(weight), n, eps, y.address, *acts.pointers()
        )  # fmt: skip
        self._last = y, y.changes, k.group_size, acts
        return y

    def _products(self, k: KernelFormat) -> dict[str, Kernel]:
        return self.device.kernels(
            "products.cu",
            BITS=k.bits, GROUP=k.group_size, CODES=CODES[k.codes], DTYPE=DTYPES[k.dtype], PLANES=self.planes,
        )  # fmt: skip

    def _room_for(self, tokens: int, cols: int, k: KernelFormat) -> Activations:
        groups, empty = cols // k.group_size, self.device.empty
        return Activations(
            empty((tokens, self.planes, cols), np.int8),
            empty((tokens, groups)),
            empty((tokens, groups)),
            empty((tokens, self.planes, groups), np.int32),
        )

    def _quantize(self, x: DeviceArray, k: KernelFormat) -> Activations:
        """The activations of x for matrices of a format; those of the last x are kept, which several ops may have as their input."""
        last = self._last
        if last is not None and last[0] is x and last[1:3] == (x.changes, k.group_size):
            return last[3]
        tokens, cols = x.shape
        if self._normed is not None and self._normed[0] is x:
            self._after_norm[self._normed[1]] = k  # _vector() keeps the weight, so that its identity stays its own
        acts = self._room_for(tokens, cols, k)
        units = tokens * (cols // k.group_size)
        self._products(k)["quantize_rows"]((cdiv(units, 8), 1, 1), 256, 0, x.address, tokens, cols, *acts.pointers())
        self._last = x, x.changes, k.group_size, acts
        return acts

    def _shared(self, tokens: int, cols: int, k: KernelFormat) -> int:
        """Bytes of shared memory that multiply_tile takes."""
        groups = cols // k.group_size
        values = 16 * groups * DTYPE_BYTES[k.dtype] * (2 if k.codes == "affine" else 1)
        return tokens * (self.planes * cols + groups * 68) + values

    def _shared_raw(self, cols: int, k: KernelFormat) -> int:
        """The same for one token that the block quantizes."""
        return self._shared(1, cols, k) + (1 + self.planes) * 4 * (cols // k.group_size)

    def _threads(self, cols: int, k: KernelFormat, tiles: int = _WIDE) -> int:
        """Threads of a block of multiply_tile: enough that all of a tile is read at once, if it is small. tiles: of how many."""
        units = cdiv(cols * k.bits // 32, max(8, k.group_size * k.bits // 32))
        return 32 * min(8 if tiles > _NARROW else 16, max(2, cdiv(units, 4)))

    def _raw(self, x: DeviceArray, weights: list[Weight]) -> bool:
        """Whether each block of a product is to quantize its only token: if no kernel did, and there are few blocks."""
        last, norm = self._last, self._normed
        if (last is not None and last[0] is x) or (norm is not None and norm[0] is x):
            return False
        return sum(cdiv(w.format.rows, 16) for w in weights) <= _NARROW

    def project(self, x: DeviceArray, weights: list[Weight]) -> list[DeviceArray]:
        tokens, found = x.shape[0], dict[int, DeviceArray]()
        # Matrices of one format are multiplied by one launch; `many` tokens by one for each.
        by_format: dict[tuple[Any, ...], list[Weight]] = {}
        for weight in weights:
            by_format.setdefault((weight.format.quantized, *weight.format.kernel), []).append(weight)
        made: dict[int, Activations] = {}
        groups = [same[i : i + 4] for same in by_format.values() for i in range(0, len(same), 4)]
        for group in groups:
            k, cols = group[0].format.kernel, group[0].format.cols
            results = self._results(tokens, [w.format.rows for w in group])
            first, y = results[0].address, results
            if not group[0].format.quantized:
                few = tokens < 4 or 16 * cols > self.device.driver.shared_bytes
                tiles = sum(cdiv(w.format.rows, 16) for w in group)
                grid, threads, shared = (
                    ((4 * tiles, tokens, 1), 128, 0) if few else ((tiles, cdiv(tokens, 4), 1), 256, 16 * cols)
                )
                self._rows["dense_few" if few else "dense_many"](
                    grid, threads, shared, *self._places(group), len(group), DTYPES[k.dtype], cols, x.address, tokens, first
                )  # fmt: skip
            elif tokens == 1 and self._raw(x, group):
                tiles = sum(cdiv(w.format.rows, 16) for w in group)
                self._products(k)["multiply_raw"](
                    (tiles, 1, 1), self._threads(cols, k, tiles), self._shared_raw(cols, k), *self._places(group), len(group), cols,
                    x.address, first,
                )  # fmt: skip
            else:
                acts = made.get(k.group_size) or self._quantize(x, k)
                made[k.group_size] = acts
                self.multiply(group, acts, tokens, y)
            found |= {id(w): result for w, result in zip(group, results, strict=True)}
        return [found[id(weight)] for weight in weights]

    def _results(self, tokens: int, rows: list[int]) -> list[DeviceArray]:
        """Arrays (tokens, rows), one after another in memory."""
        whole, arrays, at = self.device.empty((tokens * sum(rows),)), [], 0
        for n in rows:
            arrays.append(whole.part(at, (tokens, n)))
            at += tokens * n
        return arrays

    def _places(self, weights: list[Weight]) -> tuple[int, ...]:
        """Up to four matrices as the kernels' parameter Places."""
        key = tuple(id(weight.handle) for weight in weights)
        known = self._lists.get(key)
        if known is None:
            numbers: list[int] = []
            tile = row = 0
            for weight in weights:
                m = bound(weight)
                numbers += [*three(m), m.bias, weight.format.rows, tile, row]
                tile += cdiv(weight.format.rows, 16)
                row += weight.format.rows
            numbers += [0] * (28 - len(numbers))
            # The handles are kept, so that their identities stay theirs.
            known = self._lists[key] = tuple(numbers), [weight.handle for weight in weights]
        return known[0]

    def multiply(self, weights: list[Weight], acts: Activations, tokens: int, results: list[DeviceArray]) -> None:
        """Quantized matrices of one format by the same activations."""
        f, k = weights[0].format, weights[0].format.kernel
        kernels = self._products(k)
        passes = cdiv(tokens, _TOGETHER)
        while passes < tokens and self._shared(cdiv(tokens, passes), f.cols, k) > self.device.driver.shared_bytes:
            passes += 1
        if tokens <= _BATCH:
            tiles, together = sum(cdiv(w.format.rows, 16) for w in weights), cdiv(tokens, passes)
            kernels["multiply_few" if tiles <= _WIDE else "multiply_wide"](
                (tiles, cdiv(tokens, together), 1), self._threads(f.cols, k, tiles), self._shared(together, f.cols, k),
                *self._places(weights),
                len(weights), f.cols, *acts.pointers(), tokens, together, results[0].address,
            )  # fmt: skip
            return
        blocks = cdiv(tokens, TOKENS)
        tasks = self._tasks.get(tokens)
        if tasks is None:
            first = np.arange(blocks) * TOKENS
            table = np.stack([np.zeros_like(first), first, np.minimum(tokens - first, TOKENS)], -1)
            for old in [count for count in self._tasks if count > MOST_RECORDED][64:]:
                del self._tasks[old]  # those of recordings stay
            tasks = self._tasks[tokens] = self.device.send(table.astype(np.int32))
        for weight, y in zip(weights, results, strict=True):
            m = bound(weight)
            kernels["multiply_many"](
                (cdiv(cdiv(weight.format.rows, 16), TILES), blocks, 1), 256, 0, m.table.address, 0, 0, int(m.bias != 0), tasks.address, 0,
                weight.format.rows, f.cols, *acts.pointers(), y.address,
            )  # fmt: skip
