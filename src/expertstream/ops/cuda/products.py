"""Products on a GPU: with the trunk's matrices, with the router's, and with experts wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cuda.device import DeviceArray, Kernel
from ...formats import ExpertFormat, KernelFormat, MatrixFormat
from ...formats.numbers import I64
from .. import ExpertBlock, Weight
from .rows import CODES, DTYPES, MOST_RECORDED, BoundMatrix, Rows, bound, cdiv, three

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
        tokens, cols = x.shape
        acts = self._room_for(tokens, cols, k)
        units = tokens * (cols // k.group_size)
        self._products(k)["quantize_rows"]((cdiv(units, 8), 1, 1), 256, 0, x.address, tokens, cols, *acts.pointers())
        return acts

    def _shared(self, tokens: int, cols: int, k: KernelFormat) -> int:
        """Bytes that a block of multiply_few takes."""
        return tokens * (self.planes * cols + cols // k.group_size * 64)

    def project(self, x: DeviceArray, weights: list[Weight]) -> list[DeviceArray]:
        found, made = [], dict[int, _Activations]()
        for weight in weights:
            m, f, k = bound(weight), weight.format, weight.format.kernel
            y = self.device.empty((x.shape[0], f.rows))
            if not f.quantized:
                self._dense(x, m, y)
            else:
                # Integers depend on the group alone, so that matrices of one input share them.
                acts = made.get(k.group_size) or self._quantize(x, k)
                made[k.group_size] = acts
                self._multiply(m, acts, x.shape[0], y)
            found.append(y)
        return found

    def _dense(self, x: DeviceArray, m: BoundMatrix, y: DeviceArray) -> None:
        f = m.format
        for first in range(0, x.shape[0], 65535):
            count = min(x.shape[0] - first, 65535)
            self._rows["multiply_dense"](
                (cdiv(f.rows, 16), count, 1), 256, 0, 0, 0, 0, 0, 0, 0, m.addresses[0], m.bias, DTYPES[f.kernel.dtype], f.rows, f.cols,
                x[first:].address, y[first:].address,
            )  # fmt: skip

    def _multiply(self, m: BoundMatrix, acts: _Activations, tokens: int, y: DeviceArray) -> None:
        f, k = m.format, m.format.kernel
        kernels, shared = self._products(k), self._shared(tokens, f.cols, k)
        if tokens == 1 or (tokens <= _FEW and shared <= _STATIC_SHARED):
            kernels["multiply_few"](
                (cdiv(f.rows, 16), 1, 1), 128, shared, *three(m), m.bias, f.rows, f.cols, *acts.pointers(), tokens, y.address
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
        kernels["multiply_many"](
            (cdiv(cdiv(f.rows, 16), _TILES), blocks, 1), 256, 0, m.table.address, 0, 0, int(m.bias != 0), tasks.address, 0, f.rows, f.cols,
            *acts.pointers(), y.address,
        )  # fmt: skip

    def shared_expert(self, x: DeviceArray, gate: Weight, up: Weight, down: Weight, scale: Weight) -> DeviceArray:
        inner, outer, factor = self.project(x, [gate, up, scale])
        tokens, k = x.shape[0], down.format.kernel
        if down.format.quantized:
            acts = self._activate(inner, outer, k, 1.0, 0.0)
            y = self.device.empty((tokens, down.format.rows))
            self._multiply(bound(down), acts, tokens, y)
        else:
            count = tokens * inner.shape[1]
            self._rows["activate_dense"](
                (cdiv(count, 256), 1, 1), 256, 0, inner.address, outer.address, count, 1.0, 0.0
            )
            (y,) = self.project(inner, [down])
        self._rows["scale_by_sigmoid"]((tokens, 1, 1), 256, 0, y.address, factor.address, y.shape[1])
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
        weights, selected = self.device.empty((tokens, top_k)), self.device.empty((tokens, top_k), np.int64)
        self._rows["route"](
            (tokens, 1, 1), min(512, cdiv(experts, 32) * 32), 4 * experts + 8 * top_k, logits.address, experts, top_k, int(renormalize),
            weights.address, selected.address,
        )  # fmt: skip
        if self.recording is not None:
            self.recording.selects(selected)
        elif tokens <= MOST_RECORDED:
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

        def multiply(
            m: MatrixFormat, first: int, x: DeviceArray, acts: _Activations | None, gathered: bool
        ) -> DeviceArray:
            y = device.empty((pairs, m.rows))
            token = pair_token if gathered else 0
            if acts is None:
                for begin in range(0, pairs, 65535):
                    count = min(pairs - begin, 65535)
                    self._rows["multiply_dense"](
                        (cdiv(m.rows, 16), count, 1), 256, 0, table.address, stride, first, biased, pair_expert + 8 * begin,
                        token + 4 * begin if token else 0, 0, 0, DTYPES[m.kernel.dtype], m.rows, m.cols,
                        x.address if token else x[begin:].address, y[begin:].address,
                    )  # fmt: skip
            elif tasks is None:
                self._products(m.kernel)["multiply_pairs"](
                    (cdiv(m.rows, 16), pairs, 1), 128, self._shared(1, m.cols, m.kernel), table.address, stride, first, biased,
                    pair_expert, token, m.rows, m.cols, *acts.pointers(), y.address,
                )  # fmt: skip
            else:
                self._products(m.kernel)["multiply_many"](
                    (cdiv(cdiv(m.rows, 16), _TILES), tasks.shape[0], 1), 256, 0, table.address, stride, first, biased, tasks.address,
                    token, m.rows, m.cols, *acts.pointers(), y.address,
                )  # fmt: skip
            return y

        acts = self._quantize(x, gate.kernel) if gate.quantized else None
        inner, outer = multiply(gate, firsts[0], x, acts, True), multiply(up, firsts[1], x, acts, True)
        alpha, limit = f.activation
        if down.quantized:
            return multiply(down, firsts[2], inner, self._activate(inner, outer, down.kernel, alpha, limit), False)
        count = pairs * inner.shape[1]
        self._rows["activate_dense"](
            (cdiv(count, 256), 1, 1), 256, 0, inner.address, outer.address, count, alpha, limit
        )
        return multiply(down, firsts[2], inner, None, False)

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
