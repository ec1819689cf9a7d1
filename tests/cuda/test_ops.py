"""The ops on a GPU have the bits of the CPU's, op by op. Without a GPU the kernels run in an emulator, as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from expertstream.batch import Batch
from expertstream.cuda.device import DeviceArray
from expertstream.cuda.driver import Driver
from expertstream.formats import MXFP4, Activation, Affine, Dense, ExpertFormat, MatrixFormat
from expertstream.kv_cache import AttentionSpec, DeltaSpec, make_cache
from expertstream.ops import AttentionWeights, DeltaWeights, ExpertBlock, Weight
from expertstream.ops.cpu import CpuOps
from expertstream.ops.cuda import CudaOps

from ..ops.test_cpu import expert_arena, normal, stored

Both = tuple[CudaOps, CpuOps]


@pytest.fixture(scope="module")
def backends(driver: Driver) -> dict[int, Both]:
    """By bits of the activations."""
    return {bits: (CudaOps(driver, 1, "", bits), CpuOps(1, "", bits)) for bits in (8, 16)}


def equal(got: Any, expected: np.ndarray) -> None:
    """Bit by bit; any NaN is a NaN."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if got.dtype == np.float32:
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(got), nan)
        got, expected = got[~nan].view(np.uint32), expected[~nan].view(np.uint32)
    differing = int((got != expected).sum())
    assert differing == 0, f"{differing} of {expected.size} differ"


def pair(both: Both, m: MatrixFormat, seed: int, biased: bool) -> list[Weight]:
    bias = normal(seed + 9, m.rows) if biased else None
    return [ops.bind(Weight(m, stored(seed, m), bias)) for ops in both]


QUANTIZED = [
    Affine(40, 64, 4, 64, "bf16"), Affine(129, 832, 4, 64, "bf16"), Affine(24, 96, 4, 32, "f16"), Affine(33, 384, 4, 128, "f32"),
    Affine(17, 320, 8, 64, "bf16"), Affine(48, 160, 8, 32, "bf16", True), Affine(20, 256, 8, 128, "bf16"),
    Affine(31, 288, 2, 32, "bf16", True), Affine(64, 192, 2, 64, "bf16"), Affine(16, 128, 2, 128, "bf16"),
    Affine(30, 192, 4, 64, "bf16", True), MXFP4(50, 96), MXFP4(16, 1024),
]  # fmt: skip


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("m", QUANTIZED, ids=str)
def test_products_and_embedding(backends: dict[int, Both], m: MatrixFormat, bits: int) -> None:
    both = gpu, cpu = backends[bits]
    for seed, tokens in enumerate((1, 3, 13, 16, 33, 70)):
        ours, expected = pair(both, m, seed, bool(seed % 2))
        x = normal(seed + 1, tokens, m.cols, scale=3)
        if seed == 2:
            x[1, 5], x[2, 40] = np.inf, np.nan
            x[0, :] = 0
        got = gpu.project(gpu.device.send(x), [ours, ours])
        for y in got:
            equal(gpu.host(y), cpu.project(x, [expected])[0])
    ids = np.random.default_rng(0).integers(0, m.rows, 9)
    equal(gpu.host(gpu.embed(ours, ids)), cpu.embed(expected, ids))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_dense_products(backends: dict[int, Both], dtype: str) -> None:
    both = gpu, cpu = backends[8]
    for seed, (rows, cols, tokens) in enumerate([(1, 1, 1), (37, 70, 3), (16, 128, 20)]):
        ours, expected = pair(both, Dense(rows, cols, dtype), seed, bool(seed % 2))
        x = normal(seed + 1, tokens, cols)
        equal(gpu.host(gpu.project(gpu.device.send(x), [ours])[0]), cpu.project(x, [expected])[0])
        ids = np.arange(rows)
        equal(gpu.host(gpu.embed(ours, ids)), cpu.embed(expected, ids))


def test_half_precision_values_of_every_kind(backends: dict[int, Both]) -> None:
    gpu, cpu = backends[8]
    bits = np.arange(1 << 16, dtype=np.uint16)
    ours, expected = (ops.bind(Weight(Dense(512, 128, "f16"), (bits.view(np.uint8).copy(),))) for ops in (gpu, cpu))
    equal(gpu.host(gpu.embed(ours, np.arange(512))), cpu.embed(expected, np.arange(512)))


@pytest.mark.parametrize("n", [1, 16, 100, 2048])
def test_rms_norm_and_sums(backends: dict[int, Both], n: int) -> None:
    gpu, cpu = backends[8]
    x, w = normal(n, 5, n, scale=3), normal(n + 1, n)
    on_gpu = gpu.device.send(x)
    equal(gpu.host(gpu.rms_norm(on_gpu, w, 1e-6)), cpu.rms_norm(x, w, 1e-6))
    on_gpu += gpu.device.send(x[::-1])
    equal(gpu.host(on_gpu), x + x[::-1])
    equal(gpu.host(gpu.rows(on_gpu, [3, 1])), (x + x[::-1])[[3, 1]])
    equal(gpu.host(gpu.rows(on_gpu, [4])), (x + x[::-1])[[4]])


@pytest.mark.parametrize("experts", [1, 7, 64, 512, 600])
def test_routes(backends: dict[int, Both], experts: int) -> None:
    both = gpu, cpu = backends[8]
    for seed in range(4):
        x = normal(seed, 9, 64)
        m = Dense(experts, 64, "f32")
        w = np.round(normal(seed + 3, experts, 64)) if seed == 3 else normal(seed + 3, experts, 64)  # ties
        if seed == 3:
            x = np.round(x)
        ours, expected = (ops.bind(Weight(m, (w.view(np.uint8).ravel(),))) for ops in both)
        for top_k in {1, min(10, experts), experts} if experts < 100 else {10}:
            for renormalize in (True, False):
                got = gpu.route(gpu.device.send(x), ours, top_k, renormalize)
                for y, e in zip(got, cpu.route(x, expected, top_k, renormalize), strict=True):
                    equal(gpu.host(y), e)


def formats() -> list[ExpertFormat]:
    found = []
    for hidden, inner, make in (
        (128, 64, lambda r, c: Affine(r, c, 4, 64, "bf16")),
        (192, 96, lambda r, c: Affine(r, c, 8, 32, "bf16", True)),
        (96, 64, MXFP4),
        (96, 40, lambda r, c: Dense(r, c, "bf16")),
    ):
        three = make(inner, hidden), make(inner, hidden), make(hidden, inner)
        found += [ExpertFormat(*three), ExpertFormat(*three, Activation(1.702, 0.5), "f32")]
    found.append(ExpertFormat(Dense(64, 128, "bf16"), Dense(64, 128, "bf16"), Affine(128, 64, 4, 64, "bf16")))
    return found


def aligned_arena(seed: int, count: int, format: ExpertFormat) -> tuple[Any, np.ndarray]:
    """expert_arena(), with parts at multiples of 16."""
    arena, offsets = expert_arena(seed, count, format)
    memory = arena.view()
    copies = [[memory[at : at + p.nbytes].copy() for at, p in zip(row, format.parts, strict=True)] for row in offsets]
    at = 0
    for e, parts in enumerate(copies):
        for j, part in enumerate(parts):
            offsets[e, j] = at
            memory[at : at + part.size] = part
            at += -(-part.size // 64) * 64
    return arena, offsets


@pytest.mark.parametrize("format", formats(), ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_experts(backends: dict[int, Both], format: ExpertFormat, bits: int) -> None:
    gpu, cpu = backends[bits]
    hidden = format.gate.cols
    for seed, (tokens, count) in enumerate([(1, 3), (4, 5), (50, 3)]):
        arena, offsets = aligned_arena(seed, count, format)
        for e in range(count):
            cpu.tile(format, arena, offsets[e])
        gpu.attach(arena)
        block, rng = ExpertBlock(format, arena, offsets), np.random.default_rng(seed)
        lengths = rng.integers(0, tokens + 1, count)
        lengths[0] = tokens
        pair_start = np.concatenate([[0], np.cumsum(lengths)])
        pair_token = np.concatenate([np.sort(rng.choice(tokens, n, replace=False)) for n in lengths]).astype(np.int64)
        x, acc = normal(seed + 5, tokens, hidden), normal(seed + 7, tokens, hidden)
        weights = np.abs(normal(seed + 6, pair_token.size))
        on_gpu = gpu.device.send(x)
        equal(
            gpu.host(gpu.experts(on_gpu, block, pair_start, pair_token)),
            cpu.experts(x, block, pair_start, pair_token),
        )
        sums = gpu.device.send(acc)
        gpu.moe(sums, on_gpu, block, pair_start, pair_token, weights)
        cpu.moe(acc, x, block, pair_start, pair_token, weights)
        equal(gpu.host(sums), acc)
        gpu.detach(arena)


@pytest.mark.parametrize("down", [Affine(96, 64, 8, 32, "bf16"), Dense(96, 64, "bf16")], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_shared_expert(backends: dict[int, Both], down: MatrixFormat, tokens: int) -> None:
    both = gpu, cpu = backends[8]
    x = normal(1, tokens, 96)
    matrices = Affine(64, 96, 8, 32, "bf16"), Affine(64, 96, 8, 32, "bf16"), down, Dense(1, 96, "bf16")
    ours, expected = zip(*(pair(both, m, i, False) for i, m in enumerate(matrices)), strict=True)
    equal(gpu.host(gpu.shared_expert(gpu.device.send(x), *ours)), cpu.shared_expert(x, *expected))


HEADS = [(64, "bf16"), (24, "f32"), (40, "int8"), (272, "bf16")]


@pytest.mark.parametrize("head_dim, kv_dtype", HEADS)
def test_attention(backends: dict[int, Both], head_dim: int, kv_dtype: str) -> None:
    both = gpu, _ = backends[8]
    d = head_dim
    for seed, (kv_heads, share, window, counts) in enumerate(
        [
            (2, 4, 0, (3, 70, 1, 1)),
            (1, 20, 0, (5, 1)),
            (2, 3, 40, (130, 1, 7)),
            (1, 1, 0, (1000, 60, 1)),
            (3, 2, 1, (66, 1)),
        ]
    ):
        heads, half = kv_heads * share, min(8 * (seed + 1), d // 2)
        gated, normed, sinks = seed % 2 == 0, seed != 1, seed in (2, 4)
        norms = (normal(seed + 5, d), normal(seed + 6, d)) if normed else (None, None)
        w = [
            AttentionWeights(
                heads, kv_heads, d, 1e-6, *norms, gated, normal(seed + 7, heads) if sinks else None, window
            )
            for _ in both
        ]
        spec = AttentionSpec(kv_heads, d, window)
        caches = [make_cache([spec], 2048, kv_dtype, ops.state) for ops in both]
        for call, count in enumerate(counts):
            angle = normal(seed + call, count, half, scale=10)
            q = normal(seed + call + 20, count, heads * d * (2 if gated else 1))
            k, v = (normal(seed + call + i, count, kv_heads * d) for i in (40, 60))
            results = []
            for ops, cache, own in zip(both, caches, w, strict=True):
                with Batch(np.zeros(count, np.int64), [cache], True) as batch:
                    given = [gpu.device.send(a) if ops is gpu else a for a in (q, k, v, np.cos(angle), np.sin(angle))]
                    out = ops.attend(own, *given[:3], (given[3], given[4]), batch.states(0), batch)
                    results.append(ops.host(out))
            equal(*results)
        for ours, expected in zip(*(cache.layers[0].arrays for cache in caches), strict=True):
            equal(ours[:], expected)


def test_attention_of_several_sequences(backends: dict[int, Both]) -> None:
    both = gpu, _ = backends[8]
    heads, kv_heads, d = 4, 2, 64
    w = [AttentionWeights(heads, kv_heads, d) for _ in both]
    caches = [[make_cache([AttentionSpec(kv_heads, d)], 2048, "bf16", ops.state) for _ in range(3)] for ops in both]
    for call, counts in enumerate([(70, 1030, 3), (1, 1, 1)]):
        for which in [[0], [1], [2]] if call == 0 else [[0, 1, 2]]:
            count = counts[which[0]] if call == 0 else 3
            q, k, v = (normal(call + i, count, n * d) for i, n in ((1, heads), (2, kv_heads), (3, kv_heads)))
            angle = normal(call + 9, count, 8)
            results = []
            for ops, own, of_all in zip(both, w, caches, strict=True):
                with Batch(np.zeros(count, np.int64), [of_all[i] for i in which], call == 0) as batch:
                    given = [gpu.device.send(a) if ops is gpu else a for a in (q, k, v, np.cos(angle), np.sin(angle))]
                    results.append(ops.host(ops.attend(own, *given[:3], (given[3], given[4]), batch.states(0), batch)))
            equal(*results)


def test_attention_a_few_rows_at_a_time(backends: dict[int, Both], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scores of all rows would take too much memory."""
    monkeypatch.setattr("expertstream.ops.cuda.mixers._SCORE_BYTES", 60 << 10)
    test_attention_of_several_sequences(backends)
    test_attention(backends, 24, "f32")


@pytest.mark.parametrize("dk, dv", [(16, 16), (24, 40), (128, 128)])
def test_gated_delta(backends: dict[int, Both], dk: int, dv: int) -> None:
    both = gpu, _ = backends[8]
    for seed, (key_heads, share, kernel) in enumerate([(1, 1, 4), (2, 2, 2), (1, 3, 8)]):
        heads = key_heads * share
        channels = 2 * key_heads * dk + heads * dv
        w = DeltaWeights(
            conv=normal(seed, kernel, channels), a_log=normal(seed + 1, heads), dt_bias=normal(seed + 2, heads),
            norm=normal(seed + 3, dv), key_heads=key_heads, value_heads=heads, key_dim=dk, eps=1e-6,
        )  # fmt: skip
        spec = DeltaSpec((kernel - 1, channels), (heads, dk, dv))
        caches = [[make_cache([spec], 2048, "bf16", ops.state) for _ in range(2)] for ops in both]
        for call, (count, prompt, which) in enumerate(
            [(2, False, [0]), (130, True, [0]), (64, True, [1]), (2, False, [0, 1]), (5, True, [1]), (1, False, [0])]
        ):
            rows = [
                normal(seed + 10 * call + i, count, n)
                for i, n in ((4, channels), (5, heads * dv), (6, heads), (7, heads))
            ]
            results = []
            for ops, of_all in zip(both, caches, strict=True):
                if prompt and count == 130:
                    of_all[0].keep = frozenset({66})
                with Batch(np.zeros(count, np.int64), [of_all[i] for i in which], prompt) as batch:
                    given = [gpu.device.send(a) if ops is gpu else a.copy() for a in rows]
                    results.append(ops.host(ops.gated_delta(w, *given, batch.states(0), batch)))
            equal(*results)
        for ours, expected in zip(*caches, strict=True):
            for mine, other in zip(ours.layers[0].arrays, expected.layers[0].arrays, strict=True):
                equal(mine[:], other)
        mine, other = (of_all[0].layers[0].kept for of_all in caches)
        assert mine.keys() == other.keys() == {66}
        for a, b in zip(mine[66], other[66], strict=True):
            equal(a, b)


class Recorded:
    """What route() asks of a recording."""

    def __init__(self, gpu: CudaOps, tokens: int) -> None:
        self._gpu, self._tokens = gpu, tokens

    def selection(self, top_k: int) -> DeviceArray:
        return self._gpu.device.empty((self._tokens, top_k), np.int64)


def grouped(selected: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of (token, expert) by expert: pair_start, pair_token, weights."""
    order = np.argsort(selected, axis=None, kind="stable")
    starts = np.searchsorted(selected.ravel()[order], np.arange(count + 1))
    return starts, order // selected.shape[1], weights.ravel()[order]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("same", [True, False])
def test_an_expert_layer_as_it_is_recorded(backends: dict[int, Both], bits: int, tokens: int, same: bool) -> None:
    """The addition before each norm, the shared expert's gate, and its matrices if they are like the routed ones, are computed in passing;
    where many tokens wait for experts, they come in turn."""
    both = gpu, cpu = backends[bits]
    hidden, inner, count, top_k, group = 128, 64, 12, 3, 64
    three = (
        Affine(inner, hidden, 4, group, "bf16"),
        Affine(inner, hidden, 4, group, "bf16"),
        Affine(hidden, inner, 4, group, "bf16"),
    )
    format = ExpertFormat(*three)
    own = (
        three
        if same
        else (Affine(96, hidden, 8, 32, "bf16"), Affine(96, hidden, 8, 32, "bf16"), Affine(hidden, 96, 8, 32, "bf16"))
    )
    shared = list(zip(*(pair(both, m, i, False) for i, m in enumerate((*own, Dense(1, hidden, "bf16")))), strict=True))
    router = pair(both, Dense(count, hidden, "f32"), 9, False)
    arena, offsets = aligned_arena(3, count, format)
    for e in range(count):
        cpu.tile(format, arena, offsets[e])
    gpu.attach(arena)
    addresses = (offsets + gpu.readable(arena)).astype(np.uint64)
    table = gpu.device.send(addresses)
    norms = np.abs(normal(1, hidden)), np.abs(normal(2, hidden))

    def in_turn() -> Iterator[DeviceArray]:
        for part in range(3):
            yield gpu.device.send(np.where(np.arange(count)[:, None] % 3 == part, addresses, 0))

    for seed in range(3):  # what follows what is known from the second time on
        h, mixed = normal(seed + 20, tokens, hidden), normal(seed + 30, tokens, hidden)
        on_gpu = gpu.device.send(h)
        gpu.recording = Recorded(gpu, tokens) if seed < 2 else None  # type: ignore[assignment]
        on_gpu += gpu.device.send(mixed)
        x = gpu.rms_norm(on_gpu, norms[0], 1e-6)
        weights, selected = gpu.route(x, router[0], top_k)
        acc = gpu.shared_expert(x, *shared[0])
        gpu.routed(format, table, acc, x, weights, selected, in_turn if seed == 2 else None)
        on_gpu += acc
        y = gpu.rms_norm(on_gpu, norms[1], 1e-6)
        gpu.recording = None
        h += mixed
        expected = cpu.rms_norm(h, norms[0], 1e-6)
        own_weights, own_selected = cpu.route(expected, router[1], top_k)
        equal(gpu.host(selected), own_selected)
        total = cpu.shared_expert(expected, *shared[1])
        pair_start, pair_token, by_expert = grouped(own_selected, own_weights, count)
        cpu.moe(total, expected, ExpertBlock(format, arena, offsets), pair_start, pair_token, by_expert)
        h += total
        equal(gpu.host(y), cpu.rms_norm(h, norms[1], 1e-6))
        equal(gpu.host(on_gpu), h)
    gpu.detach(arena)
