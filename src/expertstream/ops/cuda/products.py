"""Products on a GPU: with the trunk's matrices, with the router's, and with experts wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cuda.device import DeviceArray, Kernel
from ...formats import ExpertFormat, KernelFormat, MatrixFormat
from ...formats.numbers import DTYPE_BYTES, F32, I64
from .. import ExpertBlock, Weight
from .rows import CODES, DTYPES, MOST_RECORDED, Rows, bound, cdiv, three

__all__ = ["Products"]

_FEW = 4  # tokens that share a pass over a matrix without tensor cores
_STATIC_SHARED = 48 << 10  # bytes a block has on every card
_TOKENS, _TILES = 32, 8  # of a block of multiply_many


@dataclass
class _Activations:
    """Quantized activations: products.cu's."""

    q: DeviceArray
    scale: DeviceArray
    sum: DeviceArray
    codes: DeviceArray

    def pointers(self) -> tuple[int, int, int, int]:
        return self.q.address, self.scale.address, self.sum.address, self.codes.address


class Products(Rows):
    """Implements the products of `ops.Ops`."""

    # The last array that was quantized, after how many changes of it, for which group, and the result.
    _last: tuple[DeviceArray, int, int, _Activations] | None = None
    _normed: tuple[DeviceArray, int] | None = None  # the last norm's output and its weight's identity

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._after_norm: dict[int, KernelFormat] = {}  # which matrices follow a norm, by its weight's identity

    def rms_norm(self, x: DeviceArray, weight: F32, eps: float) -> DeviceArray:
        y, n = self.device.empty(x.shape), x.shape[1]
        # If matrices of one kind followed this norm the last time, their activations are made at once.
        k = self._after_norm.get(id(weight))
        if k is None:
            self._rows["rms_norm"]((x.shape[0], 1, 1), 256, 8 * n, x.address, self._vector(weight), n, eps, y.address)
            self._normed = y, id(weight)
            return y
        acts = self._room_for(x.shape[0], n, k)
        threads = min(1024, max(128, 32 * (n // k.group_size)))
        self._products(k)["norm_rows"](
            (x.shape[0], 1, 1), threads, 8 * n, x.address, self._vector(weight), n, eps, y.address, *acts.pointers()
        )
        self._last = y, y.changes, k.group_size, acts
        return y

    def _products(self, k: KernelFormat) -> dict[str, Kernel]:
        return self.device.kernels(
            "products.cu",
            BITS=k.bits, GROUP=k.group_size, CODES=CODES[k.codes], DTYPE=DTYPES[k.dtype], PLANES=self.planes,
        )  # fmt: skip

    def _room_for(self, tokens: int, cols: int, k: KernelFormat) -> _Activations:
        groups, empty = cols // k.group_size, self.device.empty
        return _Activations(
            empty((tokens, self.planes, cols), np.int8),
            empty((tokens, groups)),
            empty((tokens, groups)),
            empty((tokens, self.planes, groups), np.int32),
        )

    def _quantize(self, x: DeviceArray, k: KernelFormat) -> _Activations:
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

    def _threads(self, cols: int, k: KernelFormat) -> int:
        """Threads of a block of multiply_tile: enough that all of a tile is read at once, if it is small."""
        units = cdiv(cols * k.bits // 32, max(8, k.group_size * k.bits // 32))
        return 32 * min(8, max(2, cdiv(units, 4)))

    def project(self, x: DeviceArray, weights: list[Weight]) -> list[DeviceArray]:
        tokens, found = x.shape[0], dict[int, DeviceArray]()
        # Matrices of one format are multiplied by one launch; `many` tokens by one for each.
        by_format: dict[tuple[Any, ...], list[Weight]] = {}
        for weight in weights:
            by_format.setdefault((weight.format.quantized, *weight.format.kernel), []).append(weight)
        made: dict[int, _Activations] = {}
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
            else:
                acts = made.get(k.group_size) or self._quantize(x, k)
                made[k.group_size] = acts
                self._multiply(group, acts, tokens, y)
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

    def _multiply(self, weights: list[Weight], acts: _Activations, tokens: int, results: list[DeviceArray]) -> None:
        """Quantized matrices of one format by the same activations."""
        f, k = weights[0].format, weights[0].format.kernel
        kernels, shared = self._products(k), self._shared(tokens, f.cols, k)
        if tokens == 1 or (tokens <= _FEW and shared <= _STATIC_SHARED):
            tiles = sum(cdiv(w.format.rows, 16) for w in weights)
            kernels["multiply_few"](
                (tiles, 1, 1), self._threads(f.cols, k), shared, *self._places(weights), len(weights), f.cols, *acts.pointers(), tokens,
                results[0].address,
            )  # fmt: skip
            return
        blocks = cdiv(tokens, _TOKENS)
        tasks = self._tasks.get(tokens)
        if tasks is None:
            first = np.arange(blocks) * _TOKENS
            table = np.stack([np.zeros_like(first), first, np.minimum(tokens - first, _TOKENS)], -1)
            for old in [count for count in self._tasks if count > MOST_RECORDED][64:]:
                del self._tasks[old]  # those of recordings stay
            tasks = self._tasks[tokens] = self.device.send(table.astype(np.int32))
        for weight, y in zip(weights, results, strict=True):
            m = bound(weight)
            kernels["multiply_many"](
                (cdiv(cdiv(weight.format.rows, 16), _TILES), blocks, 1), 256, 0, m.table.address, 0, 0, int(m.bias != 0), tasks.address, 0,
                weight.format.rows, f.cols, *acts.pointers(), y.address,
            )  # fmt: skip

    def shared_expert(self, x: DeviceArray, gate: Weight, up: Weight, down: Weight, scale: Weight) -> DeviceArray:
        inner, outer, factor = self.project(x, [gate, up, scale])
        tokens, k = x.shape[0], down.format.kernel
        if down.format.quantized:
            acts = self._activate(inner, outer, k, 1.0, 0.0)
            (y,) = self._results(tokens, [down.format.rows])
            self._multiply([down], acts, tokens, [y])
        else:
            count = tokens * inner.shape[1]
            self._rows["activate_dense"](
                (cdiv(count, 256), 1, 1), 256, 0, inner.address, outer.address, count, 1.0, 0.0
            )
            (y,) = self.project(inner, [down])
        self._rows["scale_by_sigmoid"](
            (cdiv(y.shape[1], 256), tokens, 1), 256, 0, y.address, factor.address, y.shape[1]
        )
        return y

    def _activate(
        self, gate: DeviceArray, up: DeviceArray, k: KernelFormat, alpha: float, limit: float
    ) -> _Activations:
        pairs, inner = gate.shape
        acts = self._room_for(pairs, inner, k)
        units = pairs * (inner // k.group_size)
        self._products(k)["activate_rows"](
            (cdiv(units, 8), 1, 1), 256, 0, gate.address, up.address, pairs, inner, alpha, limit, *acts.pointers()
        )
        return acts

    def route(self, x: DeviceArray, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[Any, Any]:
        (logits,) = self.project(x, [weight])
        tokens, experts = logits.shape
        weights, recording = self.device.empty((tokens, top_k)), self.recording
        selected = self.device.empty((tokens, top_k), np.int64) if recording is None else recording.selection(top_k)
        self._rows["route"](
            (tokens, 1, 1), min(1024, cdiv(4 * experts, 32) * 32), 4 * experts + 8 * top_k, logits.address, experts, top_k,
            int(renormalize),
            weights.address, selected.address,
        )  # fmt: skip
        if recording is None and tokens <= MOST_RECORDED:
            self._starts(tokens, top_k)
            self._constant("order", tokens, top_k)  # what a recording of such a pass needs must be there before
        return weights, selected

    def routed(
        self,
        format: ExpertFormat,
        table: DeviceArray,
        acc: DeviceArray,
        x: DeviceArray,
        weights: DeviceArray,
        selected: DeviceArray,
    ) -> None:
        """In place: acc (T, H) += Σ weights·expert(x) for experts that the card chose, which it finds in a table (experts, P) of
        addresses."""
        tokens, top_k = selected.shape
        pairs, hidden, experts = tokens * top_k, acc.shape[1], table.shape[0]
        if pairs <= _FEW * experts and tokens <= MOST_RECORDED:  # hardly any expert has several tokens
            pair_token, order = (self._constant(what, tokens, top_k) for what in ("pair_token", "order"))
            y = self._experts(format, table, x, selected.address, pair_token.address, pairs, None)
        else:
            pair_expert, pair_token, order, tasks = self._group(selected, experts)
            y = self._experts(format, table, x, pair_expert.address, pair_token.address, pairs, tasks)
        start = self._starts(tokens, top_k)
        acc.changes += 1
        self._rows["accumulate"](
            (cdiv(hidden, 256), tokens, 1), 256, 0, acc.address, y.address, start.address, order.address, weights.address, 1, hidden
        )  # fmt: skip

    def _group(self, selected: DeviceArray, experts: int) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """Pairs grouped by expert, as products.cu's multiply_many takes them: each grouped pair's expert and token, where each pair
        stands among them, and the blocks."""
        device, (tokens, top_k) = self.device, selected.shape
        pairs = tokens * top_k
        capacity = pairs // _TOKENS + experts
        counts, starts = device.empty((experts,), np.int32), device.empty((experts + 1,), np.int32)
        tasks = device.empty((capacity, 3), np.int32)
        place, token = device.empty((pairs,), np.int32), device.empty((pairs,), np.int32)
        expert = device.empty((pairs,), np.int64)
        self._rows["count_pairs"]((experts, 1, 1), 256, 0, selected.address, pairs, counts.address)
        self._rows["plan_pairs"](
            (1, 1, 1), 256, 8 * (experts + 1), counts.address, experts, _TOKENS, capacity, starts.address, tasks.address
        )
        self._rows["place_pairs"](
            (experts, 1, 1), 256, 0, selected.address, pairs, top_k, starts.address, place.address, token.address,
            expert.address,
        )  # fmt: skip
        return expert, token, place, tasks

    def experts(self, x: DeviceArray, block: ExpertBlock, pair_start: I64, pair_token: I64) -> DeviceArray:
        f, device = block.format, self.device
        pairs = pair_token.shape[0]
        base = 0 if block.on_device else device.registered(block.arena.view())
        table = device.send((np.asarray(block.offsets, np.int64) + base).astype(np.uint64))
        counts = np.diff(pair_start)
        of_pair = device.send(np.repeat(np.arange(counts.shape[0]), counts))
        of_token = device.send(pair_token.astype(np.int32))
        tasks = None if int(counts.max(initial=0)) <= _FEW else device.send(_tasks(pair_start))
        if pairs == 0:
            return device.empty((0, x.shape[1]))
        return self._experts(f, table, x, of_pair.address, of_token.address, pairs, tasks)

    def _experts(
        self,
        f: ExpertFormat,
        table: DeviceArray,
        x: DeviceArray,
        pair_expert: int,
        pair_token: int,
        pairs: int,
        tasks: DeviceArray | None,
    ) -> DeviceArray:
        """(pairs, H): each pair's expert, whose parts lie at the addresses table[expert], applied to its token. pair_expert, pair_token:
        addresses of (pairs,) int64 and int32. tasks: the blocks of multiply_many, for many pairs of an expert."""
        device, (gate, up, down), stride = self.device, f.matrices, table.shape[1]
        biased = int(bool(f.bias_dtype))
        firsts = np.cumsum([0, *(len(m.parts) + biased for m in f.matrices)]).tolist()

        def dense(m: MatrixFormat, first: int, x: DeviceArray, gathered: bool) -> DeviceArray:
            y = device.empty((pairs, m.rows))
            for begin in range(0, pairs, 65535):
                self._rows["dense_pairs"](
                    (cdiv(m.rows, 16), min(pairs - begin, 65535), 1), 256, 0, table.address, stride, first, biased, pair_expert + 8 * begin,
                    pair_token + 4 * begin if gathered else 0, DTYPES[m.kernel.dtype], m.rows, m.cols,
                    x.address if gathered else x[begin:].address, y[begin:].address,
                )  # fmt: skip
            return y

        def quantized(m: MatrixFormat, first: list[int], acts: _Activations, gathered: bool) -> list[DeviceArray]:
            """Matrices of one format by the same activations: gate and up, or down."""
            whole, token, kernels = (
                device.empty((len(first) * pairs, m.rows)),
                pair_token if gathered else 0,
                self._products(m.kernel),
            )
            found = [whole[i * pairs : (i + 1) * pairs] for i in range(len(first))]
            if tasks is None:
                kernels["multiply_pairs"](
                    (cdiv(m.rows, 16), pairs, len(first)), self._threads(m.cols, m.kernel), self._shared(1, m.cols, m.kernel),
                    table.address,
                    stride, first[0], first[-1] - first[0], biased, pair_expert, token, m.rows, m.cols, *acts.pointers(), whole.address,
                )  # fmt: skip
                return found
            for begin, y in zip(first, found, strict=True):
                kernels["multiply_many"](
                    (cdiv(cdiv(m.rows, 16), _TILES), tasks.shape[0], 1), 256, 0, table.address, stride, begin, biased, tasks.address, token,
                    m.rows, m.cols, *acts.pointers(), y.address,
                )  # fmt: skip
            return found

        if gate.quantized and gate.kernel == up.kernel:
            inner, outer = quantized(gate, firsts[:2], self._quantize(x, gate.kernel), True)
        else:
            inner, outer = (
                quantized(m, [first], self._quantize(x, m.kernel), True)[0] if m.quantized else dense(m, first, x, True)
                for m, first in ((gate, firsts[0]), (up, firsts[1]))
            )
        alpha, limit = f.activation
        if down.quantized:
            return quantized(down, [firsts[2]], self._activate(inner, outer, down.kernel, alpha, limit), False)[0]
        count = pairs * inner.shape[1]
        self._rows["activate_dense"](
            (cdiv(count, 256), 1, 1), 256, 0, inner.address, outer.address, count, alpha, limit
        )
        return dense(down, firsts[2], inner, False)

    def moe(
        self, acc: DeviceArray, x: DeviceArray, block: ExpertBlock, pair_start: I64, pair_token: I64, weights: Any
    ) -> None:
        self.accumulate(acc, self.experts(x, block, pair_start, pair_token), pair_token, weights)

    def accumulate(self, acc: DeviceArray, y: DeviceArray, pair_token: I64, weights: Any) -> None:
        tokens, hidden = acc.shape
        order = np.argsort(pair_token, kind="stable")
        start = np.searchsorted(pair_token[order], np.arange(tokens + 1))
        lists = self.device.send(np.concatenate([start, order]).astype(np.int32))
        given = (
            weights if isinstance(weights, DeviceArray) else self.device.send(np.ascontiguousarray(weights, np.float32))
        )
        acc.changes += 1
        self._rows["accumulate"](
            (cdiv(hidden, 256), tokens, 1), 256, 0, acc.address, y.address, lists.address, lists.address + 4 * (tokens + 1), given.address,
            0, hidden,
        )  # fmt: skip


def _tasks(pair_start: I64) -> NDArray[np.int32]:
    """(blocks, 3): the expert, the first pair and the number of pairs of each block of multiply_many."""
    counts = np.diff(pair_start)
    blocks = -(-counts // _TOKENS)
    expert = np.repeat(np.arange(counts.shape[0]), blocks)
    within = np.arange(expert.shape[0]) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first = pair_start[expert] + within * _TOKENS
    return np.stack([expert, first, np.minimum(pair_start[expert + 1] - first, _TOKENS)], -1).astype(np.int32)
