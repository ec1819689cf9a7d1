"""Experts on a GPU: the router, the shared expert, and routed ones wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ... import _native
from ...cuda.device import DeviceArray
from ...cuda.exchange import Question
from ...formats import ExpertFormat, KernelFormat, MatrixFormat
from ...formats.numbers import I64
from .. import Below, Elsewhere, ExpertBlock, Weight
from .hybrid import Split, measure
from .products import TILES, TOKENS, Activations, Combination, Products
from .rows import DTYPES, MOST_RECORDED, cdiv

__all__ = ["Experts"]

_FEW = 4  # tokens of an expert that are computed without tensor cores
_FEW_PAIRS = 24  # pairs of a token and an expert, whose blocks each quantize what they multiply


@dataclass
class _Shared:
    """A shared expert whose output (T, H) was put off."""

    ops: Experts
    x: DeviceArray
    gate: Weight
    up: Weight
    down: Weight
    scale: Weight

    def like(self, f: ExpertFormat) -> bool:
        """Whether its matrices are those of a routed expert in another place."""
        own = (self.gate, self.up, self.down)
        biased = bool(f.bias_dtype) or any(w.bias is not None for w in own)
        same = all(w.format == m and m.quantized for w, m in zip(own, f.matrices, strict=True))
        return same and not biased and f.matrices[0].kernel == f.matrices[1].kernel and f.activation == (1.0, 0.0)

    def __call__(self, y: DeviceArray) -> None:
        """y ← sigmoid(x·scaleᵀ)·down(silu(gate(x))·up(x))."""
        ops, k, tokens = self.ops, self.down.format.kernel, self.x.shape[0]
        factor = ops.gate_of(self.x, self.scale)
        inner, outer = ops.project(self.x, [self.gate, self.up])
        if self.down.format.quantized:
            acts = ops.activated(inner, outer, k, 1.0, 0.0)
            ops.multiply([self.down], acts, tokens, [y])
            scaled = y
        else:
            ops.activate_dense(inner, outer, 1.0, 0.0)
            (scaled,) = ops.project(inner, [self.down])
        ops.scale_rows(y, scaled, factor)


class Experts(Products):
    """Implements the experts of `ops.Ops`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The shared expert's gate that follows a router, by its handle's identity; gates that were computed with one; the last router.
        self._gate_after: dict[int, tuple[Weight, Weight]] = {}
        self._gates: dict[int, tuple[DeviceArray, int, DeviceArray]] = {}
        self._routed: tuple[DeviceArray, Weight] | None = None
        self._guessing = False
        # Who computes experts in host memory in a recorded pass; None: kernels.
        self.split: Split | None = Split(card=1.0, host=0.0) if self.cpu_experts == "all" else None
        self.host_computes = self.cpu_experts != "none"
        self.device.kernels("exchange.cu")  # a recording must not load it

    def compute(self, elsewhere: Elsewhere, layer: int, question: Question) -> None:
        """Computes experts of a layer on the host, as they arrive. Raises ReadError."""
        experts, x, starts, tokens, y, guess = question
        for positions, block in elsewhere.fetched(layer, experts, guess):
            pairs = np.concatenate([np.arange(starts[p], starts[p + 1]) for p in positions])
            counts = np.diff(starts)[positions]
            y[pairs] = self.cpu.experts(x, block, np.concatenate([[0], np.cumsum(counts)]), tokens[pairs])

    def ahead(self, run: Callable[[], None]) -> None:
        """run() calls route() for the next layer, and guess() with what that returns."""
        kept = self._last, self._normed, self._routed, self._gates
        self._guessing = True
        try:
            run()
        finally:
            self._guessing = False
            self._last, self._normed, self._routed, self._gates = kept

    def guess(self, weights: DeviceArray, selected: DeviceArray) -> None:
        """What the next layer will probably select (T, top_k): the host is told with this layer's question."""
        assert self.recording is not None
        self.recording.guess = selected, weights

    def rate(self, some: Sequence[tuple[DeviceArray, ExpertBlock]]) -> None:
        if self.cpu_experts == "auto" and self.split is None:
            self.split = measure(self, some)

    def shared_expert(self, x: DeviceArray, gate: Weight, up: Weight, down: Weight, scale: Weight) -> DeviceArray:
        y = self.device.empty((x.shape[0], down.format.rows))
        work = _Shared(self, x, gate, up, down, scale)
        if self.recording is not None:  # routed() may compute it with its own
            y.put_off(work)
        else:
            work(y)
        return y

    def gate_of(self, x: DeviceArray, scale: Weight) -> DeviceArray:
        """x·scaleᵀ; from the second time on, route() computes it in passing."""
        found = self._gates.pop(id(scale.handle), None)
        if found is not None and found[0] is x and found[1] == x.changes:
            return found[2]
        if self._routed is not None and self._routed[0] is x:
            self._gate_after[id(self._routed[1].handle)] = self._routed[1], scale
        (gate,) = self.project(x, [scale])
        return gate

    def activated(
        self,
        gate: DeviceArray,
        up: DeviceArray,
        k: KernelFormat,
        alpha: float,
        limit: float,
        present: tuple[int, int, int] = (0, 0, 0),
    ) -> Activations:
        """act(gate)·up (pairs, inner), quantized. present: a table of experts, its width, and each pair's expert: those whose address is 0
        are left out."""
        pairs, inner = gate.shape
        acts = self._room_for(pairs, inner, k)
        units = pairs * (inner // k.group_size)
        self._products(k)["activate_rows"](
            (cdiv(units, 8), 1, 1), 256, 0, gate.address, up.address, pairs, inner, alpha, limit, *present, *acts.pointers()
        )  # fmt: skip
        return acts

    def activate_dense(self, gate: DeviceArray, up: DeviceArray, alpha: float, limit: float) -> None:
        """In place: gate ← act(gate)·up."""
        count = gate.shape[0] * gate.shape[1]
        self._rows["activate_dense"]((cdiv(count, 256), 1, 1), 256, 0, gate.address, up.address, count, alpha, limit)

    def scale_rows(self, y: DeviceArray, x: DeviceArray, factor: DeviceArray) -> None:
        """y ← sigmoid(factor)·x, a factor (T, 1) for each row."""
        grid = cdiv(y.shape[1], 256), y.shape[0], 1
        self._rows["scale_by_sigmoid"](grid, 256, 0, y.address, x.address, factor.address, y.shape[1])

    def route(self, x: DeviceArray, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[Any, Any]:
        self._routed = x, weight
        known = self._gate_after.get(id(weight.handle))
        if known is None:
            (logits,) = self.project(x, [weight])
        else:
            logits, gate = self.project(x, [weight, known[1]])
            self._gates = {id(known[1].handle): (x, x.changes, gate)}
        tokens, experts = logits.shape
        weights, recording = self.device.empty((tokens, top_k)), None if self._guessing else self.recording
        selected = self.device.empty((tokens, top_k), np.int64) if recording is None else recording.selection(top_k)
        self._rows["route"](
            (tokens, 1, 1), 32, 4 * experts + 8 * top_k, logits.address, experts, top_k, int(renormalize), weights.address,
            selected.address,
        )  # fmt: skip
        if self.recording is None and tokens <= MOST_RECORDED:
            self._starts(tokens, top_k)
            self._constant("pair_token", tokens, top_k)  # what a recording of such a pass needs must be there before
        return weights, selected

    def routed(
        self,
        format: ExpertFormat,
        table: DeviceArray,
        acc: DeviceArray,
        x: DeviceArray,
        weights: DeviceArray,
        selected: DeviceArray,
        in_turn: Callable[[], Iterator[DeviceArray]] | None = None,
        below: Below | None = None,
    ) -> None:
        """In place: acc (T, H) += Σ weights·expert(x) for experts that the card chose, which it finds in a table (experts, P) of
        addresses."""
        tokens, top_k = selected.shape
        pairs, hidden, experts = tokens * top_k, acc.shape[1], table.shape[0]
        # Hardly any expert has several tokens; or so few that no weights cross the link twice; or the host computes what the table lacks.
        asked = self.recording is not None and below is not None and below.partial
        few = (asked or pairs <= _FEW * experts) and tokens <= MOST_RECORDED
        if few and (self.recording is not None or in_turn is None or tokens <= _FEW):
            pair_token, own = self._constant("pair_token", tokens, top_k), acc.taken(_Shared)
            if own is not None and not own.like(format):
                own(acc)
                own = None
            recording, computed = self.recording, selected.address
            asks = below is not None and (below.partial or (self.split is not None and self.split.worth(top_k)))
            if recording is not None and below is not None and asks:
                share = _none if below.partial or self.split is None else self.split.share
                native, arena = self.cpu.native_format(format), cast(_native.Arena, below.arena)
                computed = recording.ask(below.layer, native, table, arena, selected, x, share, below.last)
            y = self._experts(format, table, x, computed, pair_token.address, pairs, None, own)
            if recording is not None and asks:
                recording.collect(y)
            shared = None if own is None else y[pairs:]
            factor = None if own is None else self.gate_of(x, own.scale)
            acc.changes += 1
            acc.put_off(Combination(acc.own_address, y, weights, shared, factor, top_k))
            return
        pair_expert, pair_token, order, tasks = self._group(selected, experts)
        y = self.device.empty((pairs, hidden))
        for some in in_turn() if in_turn is not None and self.recording is None and pairs >= experts else [table]:
            self._experts(format, some, x, pair_expert.address, pair_token.address, pairs, tasks, y=y)
        acc.changes += 1
        self._rows["accumulate"](
            (cdiv(hidden, 256), tokens, 1), 256, 0, acc.address, y.address, self._starts(tokens, top_k).address, order.address,
            weights.address, 1, hidden,
        )  # fmt: skip

    def _group(self, selected: DeviceArray, experts: int) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """Pairs grouped by expert, as products.cu's multiply_many takes them: each grouped pair's expert and token, where each pair
        stands among them, and the blocks."""
        device, (tokens, top_k) = self.device, selected.shape
        pairs = tokens * top_k
        capacity = pairs // TOKENS + experts
        counts, starts = device.empty((experts,), np.int32), device.empty((experts + 1,), np.int32)
        tasks = device.empty((capacity, 3), np.int32)
        place, token = device.empty((pairs,), np.int32), device.empty((pairs,), np.int32)
        expert = device.empty((pairs,), np.int64)
        self._rows["count_pairs"]((experts, 1, 1), 256, 0, selected.address, pairs, counts.address)
        self._rows["plan_pairs"](
            (1, 1, 1), 256, 8 * (experts + 1), counts.address, experts, TOKENS, capacity, starts.address, tasks.address
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
        shared: _Shared | None = None,
        y: DeviceArray | None = None,
    ) -> DeviceArray:
        """(pairs, H): each pair's expert, whose parts lie at the addresses table[expert], applied to its token. pair_expert, pair_token:
        addresses of (pairs,) int64 and int32. tasks: the blocks of multiply_many, for many pairs of an expert. shared: an expert of the
        same format for all T tokens, without tasks: its T rows follow. y: what to fill; rows of experts whose addresses are 0 are
        left alone."""
        device, (gate, up, down), stride = self.device, f.matrices, table.shape[1]
        biased, routed = int(bool(f.bias_dtype)), pairs
        pairs += 0 if shared is None else x.shape[0]
        firsts = np.cumsum([0, *(len(m.parts) + biased for m in f.matrices)]).tolist()

        def dense(m: MatrixFormat, first: int, x: DeviceArray, gathered: bool, y: DeviceArray) -> DeviceArray:
            for begin in range(0, pairs, 65535):
                self._rows["dense_pairs"](
                    (cdiv(m.rows, 16), min(pairs - begin, 65535), 1), 256, 0, table.address, stride, first, biased, pair_expert + 8 * begin,
                    pair_token + 4 * begin if gathered else 0, DTYPES[m.kernel.dtype], m.rows, m.cols,
                    x.address if gathered else x[begin:].address, y[begin:].address,
                )  # fmt: skip
            return y

        def quantized(
            m: MatrixFormat, first: list[int], acts: Activations, gathered: bool, own: list[Weight], whole: DeviceArray
        ) -> list[DeviceArray]:
            """Matrices of one format by the same activations: gate and up, or down. own: the shared expert's. whole: for the results."""
            token, kernels = pair_token if gathered else 0, self._products(m.kernel)
            found = [whole[i * pairs : (i + 1) * pairs] for i in range(len(first))]
            if tasks is None:
                kernels["multiply_pairs"](
                    (cdiv(m.rows, 16), pairs, len(first)), self._threads(m.cols, m.kernel), self._shared(1, m.cols, m.kernel),
                    table.address,
                    stride, first[0], first[-1] - first[0], biased, pair_expert, token, *self._places(own), routed, m.rows, m.cols,
                    *acts.pointers(), whole.address,
                )  # fmt: skip
                return found
            for begin, to in zip(first, found, strict=True):
                kernels["multiply_many"](
                    (cdiv(cdiv(m.rows, 16), TILES), tasks.shape[0], 1), 256, 0, table.address, stride, begin, biased, tasks.address, token,
                    m.rows, m.cols, *acts.pointers(), to.address,
                )  # fmt: skip
            return found

        if gate.quantized and gate.kernel == up.kernel:
            own, room = [] if shared is None else [shared.gate, shared.up], device.empty((2 * pairs, gate.rows))
            inner, outer = quantized(gate, firsts[:2], self._quantize(x, gate.kernel), True, own, room)
        else:
            inner, outer = (
                quantized(m, [first], self._quantize(x, m.kernel), True, [], device.empty((pairs, m.rows)))[0]
                if m.quantized
                else dense(m, first, x, True, device.empty((pairs, m.rows)))
                for m, first in ((gate, firsts[0]), (up, firsts[1]))
            )
        y = device.empty((pairs, down.rows)) if y is None else y
        if down.quantized and tasks is None and pairs <= _FEW_PAIRS and gate.quantized:
            k = down.kernel
            self._products(k)["multiply_down"](
                (cdiv(down.rows, 16), pairs, 1), self._threads(down.cols, k), self._shared_raw(down.cols, k), table.address, stride,
                firsts[2], biased, pair_expert, *self._places([] if shared is None else [shared.down]), routed, down.rows, down.cols,
                inner.address, outer.address, *f.activation, y.address,
            )  # fmt: skip
            return y
        if down.quantized:
            present = (0, 0, 0) if tasks is None else (table.address, stride, pair_expert)
            acts = self.activated(inner, outer, down.kernel, *f.activation, present)
            own = [] if shared is None else [shared.down]
            return quantized(down, [firsts[2]], acts, False, own, y)[0]
        self.activate_dense(inner, outer, *f.activation)
        return dense(down, firsts[2], inner, False, y)

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


def _none(most: int) -> NDArray[np.int32]:
    """A share: no expert that kernels can read."""
    return np.zeros(most + 1, np.int32)


def _tasks(pair_start: I64) -> NDArray[np.int32]:
    """(blocks, 3): the expert, the first pair and the number of pairs of each block of multiply_many."""
    counts = np.diff(pair_start)
    blocks = -(-counts // TOKENS)
    expert = np.repeat(np.arange(counts.shape[0]), blocks)
    within = np.arange(expert.shape[0]) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    first = pair_start[expert] + within * TOKENS
    return np.stack([expert, first, np.minimum(pair_start[expert + 1] - first, TOKENS)], -1).astype(np.int32)
