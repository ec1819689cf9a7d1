"""The native ops against the specification, op by op, on shapes that do and do not fit the vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import UsageError, _native
from expertstream.formats import MXFP4, Activation, Affine, Dense, ExpertFormat, MatrixFormat
from expertstream.formats.numbers import from_bf16, from_int8_rows, to_bf16, to_int8_rows
from expertstream.ops import AttentionWeights, DeltaWeights, ExpertBlock, Weight, make_ops
from expertstream.ops.cpu import CpuOps
from expertstream.ops.reference import ReferenceOps

NATIVE, EXACT, REFERENCE = CpuOps(2), CpuOps(2, "", 16), ReferenceOps()
EPSILON = 2e-6  # float32 sums in another order

examples = settings(max_examples=40, deadline=None)
seeds, tokens, sizes = st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 70)


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = EPSILON) -> None:
    # What is added up is of size 1; where it cancels, the rounding of what was added stays.
    size = np.linalg.norm(expected) + np.sqrt(expected.size)
    assert np.abs(got - expected).max() <= tolerance * 40 * size / np.sqrt(expected.size)
    assert np.linalg.norm(got - expected) <= tolerance * 4 * size


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def stored(seed: int, m: MatrixFormat, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """A random matrix's flat bytes, as checkpoints have them."""
    rng, dtype = np.random.default_rng(seed), m.kernel.dtype

    def values(nbytes: int, size: float) -> np.ndarray:
        if dtype == "e8m0":
            return rng.integers(120, 124, nbytes, np.uint8)
        v = (rng.standard_normal(nbytes // (4 if dtype == "f32" else 2)) * size).astype(np.float32)
        return (to_bf16(v) if dtype == "bf16" else v.astype(np.float16) if dtype == "f16" else v).view(np.uint8)

    data, *others = m.part_bytes
    if not m.quantized:
        return (values(data, scale),)
    sizes = (0.05 * scale, 0.2 * scale)
    return (rng.integers(0, 256, data, np.uint8), *map(values, others, sizes))


def weight(seed: int, m: MatrixFormat, biased: bool = False) -> tuple[Weight, Weight]:
    """The same random matrix for both."""
    bias = normal(seed + 9, m.rows) if biased else None
    return NATIVE.bind(Weight(m, stored(seed, m), bias)), REFERENCE.bind(Weight(m, stored(seed, m), bias))


def dense(rows: int, cols: int, dtype: str = "f32") -> Dense:
    return Dense(rows, cols, dtype)


def rounding(x: np.ndarray, w: np.ndarray, group: int, bits: int) -> np.ndarray:
    """What rounding activations (T, cols) to `bits` bits a group can change of x·wᵀ: half a step each."""
    most = np.abs(x).reshape(x.shape[0], -1, group).max(-1)  # (T, groups)
    weights = np.abs(w).reshape(w.shape[0], -1, group).sum(-1)  # (rows, groups)
    return most @ weights.T / (254 if bits == 8 else 65024) * 1.0001


@examples
@given(
    seed=seeds,
    t=st.integers(1, 30),
    rows=sizes,
    groups=st.integers(1, 20),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
    symmetric=st.booleans(),
)
def test_project_and_embed_quantized(
    seed: int, t: int, rows: int, groups: int, bits: int, group: int, dtype: str, symmetric: bool
) -> None:
    check_quantized(seed, t, Affine(rows, group * groups, bits, group, dtype, symmetric), group)


@examples
@given(seed=seeds, t=st.integers(1, 30), rows=sizes, groups=st.integers(1, 20))
def test_project_and_embed_mxfp4(seed: int, t: int, rows: int, groups: int) -> None:
    check_quantized(seed, t, MXFP4(rows, 32 * groups), 32)


def check_quantized(seed: int, t: int, m: MatrixFormat, group: int) -> None:
    ours, spec = weight(seed, m, biased=bool(seed % 2))
    x = normal(seed + 1, t, m.cols)
    expected = REFERENCE.project(x, [spec])[0]
    sums = 2e-6 * (np.abs(x) @ np.abs(spec.handle).T) + 1e-6
    for ops, activation_bits in ((NATIVE, 8), (EXACT, 16)):
        error = np.abs(ops.project(x, [ours])[0] - expected)
        assert (error <= rounding(x, spec.handle, group, activation_bits) + sums).all()
    ids = np.random.default_rng(seed).integers(0, m.rows, 5)
    close(NATIVE.embed(ours, ids), REFERENCE.embed(spec, ids))


@examples
@given(seed=seeds, t=tokens, rows=sizes, cols=sizes, dtype=st.sampled_from(["bf16", "f16", "f32"]))
def test_project_and_embed_dense(seed: int, t: int, rows: int, cols: int, dtype: str) -> None:
    ours, spec = weight(seed, dense(rows, cols, dtype))
    x = normal(seed + 1, t, cols)
    assert (
        np.abs(NATIVE.project(x, [ours])[0] - REFERENCE.project(x, [spec])[0])
        <= 1e-6 * (np.abs(x) @ np.abs(spec.handle).T)
    ).all()
    ids = np.random.default_rng(seed).integers(0, rows, 5)
    assert np.array_equal(NATIVE.embed(ours, ids), REFERENCE.embed(spec, ids))


FORMATS = st.one_of(
    st.builds(
        Affine,
        sizes,
        st.sampled_from([64, 192]),
        st.sampled_from([2, 4, 8]),
        st.just(32),
        st.just("bf16"),
        st.booleans(),
    ),
    st.builds(MXFP4, sizes, st.sampled_from([64, 192])),
)


@examples
@given(seed=seeds, m=FORMATS)
def test_tiles_hold_what_the_rows_held(seed: int, m: MatrixFormat) -> None:
    parts = stored(seed, m)
    tiles = NATIVE.tiled(m, parts)
    for ours, spec in zip(tiles, m.tile(parts), strict=True):
        assert np.array_equal(ours, spec)
    for back, before in zip(m.untile(tiles), parts, strict=True):
        assert np.array_equal(back, before)


@examples
@given(seed=seeds, t=tokens, n=sizes)
def test_rms_norm(seed: int, t: int, n: int) -> None:
    x, w = normal(seed, t, n, scale=3), normal(seed + 2, n)
    close(NATIVE.rms_norm(x, w, 1e-6), REFERENCE.rms_norm(x, w, 1e-6))


ATTENTION_KINDS = {
    "f32": (np.asarray, np.asarray, EPSILON), "bf16": (to_bf16, from_bf16, 2e-4), "int8": (to_int8_rows, from_int8_rows, 1.2e-2),
}  # fmt: skip


@examples
@given(
    seed=seeds,
    t=tokens,
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 9),
    d=sizes,
    rotated=st.integers(1, 35),
    position=st.integers(0, 230),
    kind=st.sampled_from(list(ATTENTION_KINDS)),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    window=st.sampled_from([0, 1, 5, 64, 100]),
)
def test_attention(
    seed: int,
    t: int,
    kv_heads: int,
    share: int,
    d: int,
    rotated: int,
    position: int,
    kind: str,
    parts: tuple[bool, bool, bool],
    window: int,
) -> None:
    gated, normed, with_sinks = parts
    heads, half = kv_heads * share, min(rotated, d // 2)
    first = max(0, position + 1 - window) // 64 * 64 if window else 0  # rows before it are gone
    capacity, at = position + t + 3 - first, position - first
    q, angle = normal(seed, t, heads * d * (2 if gated else 1)), normal(seed + 1, t, half, scale=10)
    k, v = normal(seed + 2, t, kv_heads * d), normal(seed + 3, t, kv_heads * d)
    norms = (normal(seed + 5, d), normal(seed + 6, d)) if normed else (None, None)
    sinks = normal(seed + 7, heads) if with_sinks else None
    w = AttentionWeights(heads, kv_heads, d, 1e-6, *norms, gated, sinks, window)
    past = normal(seed + 4, kv_heads, capacity, d)
    encode, decode, near = ATTENTION_KINDS[kind]
    caches = [[encode(past).copy() for _ in range(2)] for _ in range(2)]
    ours, spec = (
        ops.attention(w, q, k, v, np.cos(angle), np.sin(angle), *cache, position, first)
        for ops, cache in zip((NATIVE, REFERENCE), caches, strict=True)
    )
    # A key that rounds to the other of two neighbouring values moves what attends to it.
    close(ours, spec, {"f32": EPSILON, "bf16": 1e-3, "int8": 2e-2}[kind])
    for mine, expected in zip(caches[0], caches[1], strict=True):
        assert np.array_equal(mine[:, at + t :], expected[:, at + t :])
        close(decode(mine), decode(expected), near)


@examples
@given(
    seed=seeds,
    t=st.integers(1, 150),
    key_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    dk=sizes,
    dv=st.integers(1, 140),
    kernel=st.integers(2, 8),
    chunked=st.booleans(),
)
def test_delta_net(seed: int, t: int, key_heads: int, share: int, dk: int, dv: int, kernel: int, chunked: bool) -> None:
    heads = key_heads * share
    channels = 2 * key_heads * dk + heads * dv
    w = DeltaWeights(
        conv=normal(seed, kernel, channels),
        a_log=normal(seed + 1, heads),
        dt_bias=normal(seed + 2, heads),
        norm=normal(seed + 3, dv),
        key_heads=key_heads,
        value_heads=heads,
        key_dim=dk,
        eps=1e-6,
    )
    qkv, z = normal(seed + 4, t, channels), normal(seed + 5, t, heads * dv)
    a, b = normal(seed + 6, t, heads), normal(seed + 7, t, heads)
    window, state = normal(seed + 8, kernel - 1, channels), normal(seed + 9, heads, dk, dv, scale=0.1)
    results = []
    for ops, form in ((NATIVE, chunked), (REFERENCE, chunked), (REFERENCE, not chunked)):
        states = window.copy(), state.copy()
        results.append((ops.delta_net(w, qkv.copy(), z, a, b, *states, form), *states))
    for out, conv_state, s in results[1:]:
        assert np.array_equal(results[0][1], conv_state)
        close(results[0][2], s, 5e-6)
        # The norm divides by a head's size, and so an error counts the more the smaller its output was.
        close(results[0][0], out, 2e-4)


@examples
@given(seed=seeds, t=tokens, experts=st.integers(1, 40), data=st.data())
def test_route(seed: int, t: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    # Small whole numbers: products are exact, and there are ties.
    x, w = (np.round(normal(seed + i, n, 8)) for i, n in enumerate((t, experts)))
    bias = np.round(normal(seed + 3, experts)) if seed % 2 else None
    for renormalize in (True, False):
        ours, spec = (
            ops.route(x, ops.bind(Weight(dense(experts, 8), (w.view(np.uint8).ravel(),), bias)), top_k, renormalize)
            for ops in (NATIVE, REFERENCE)
        )
        assert np.array_equal(ours[1], spec[1])
        close(ours[0], spec[0])


def expert_arena(seed: int, count: int, format: ExpertFormat) -> tuple[object, np.ndarray]:
    """An arena with `count` random experts, row after row, at odd places."""
    arena = _native.Arena(count * 200000)
    memory, offsets, at = arena.view(), np.zeros((count, len(format.parts)), np.int64), 4
    for e in range(count):
        parts: list[np.ndarray] = []
        for i, m in enumerate(format.matrices):
            parts += stored(seed + 10 * e + i, m, 0.3)
            if format.bias_dtype:
                parts.append(normal(seed + 10 * e + 5 + i, m.rows).view(np.uint8))
        for j, v in enumerate(parts):
            at = -(-at // 4) * 4
            offsets[e, j] = at
            memory[at : at + v.size] = v
            at += format.parts[j].nbytes + 3
    return arena, offsets


def expert_formats(bits: int, symmetric: bool, clamped: bool, mxfp4: bool) -> ExpertFormat:
    hidden, inner = 96, 64
    matrices: list[MatrixFormat] = []
    for shape in ((inner, hidden), (inner, hidden), (hidden, inner)):
        affine = Affine(*shape, bits, 32, "bf16", symmetric) if bits < 16 else dense(*shape, "bf16")
        matrices.append(MXFP4(*shape) if mxfp4 else affine)
    gate, up, down = matrices
    return ExpertFormat(gate, up, down, Activation(1.702, 0.5) if clamped else Activation(), "f32" if clamped else "")


@examples
@given(
    seed=seeds,
    t=tokens,
    count=st.integers(1, 4),
    format=st.builds(expert_formats, st.sampled_from([2, 4, 8, 16]), st.booleans(), st.booleans(), st.booleans()),
)
def test_experts_and_accumulate(seed: int, t: int, count: int, format: ExpertFormat) -> None:
    hidden = 96
    arena, offsets = expert_arena(seed, count, format)
    for e in range(count):
        NATIVE.tile(format, arena, offsets[e])
    block = ExpertBlock(format, arena, offsets)
    x, rng = normal(seed + 5, t, hidden), np.random.default_rng(seed)
    lengths = rng.integers(0, t + 1, count)
    pair_start = np.concatenate([[0], np.cumsum(lengths)])
    pair_token = np.concatenate([rng.choice(t, n, replace=False) for n in lengths] or [[]]).astype(np.int64)
    ours, exact, spec = (ops.experts(x, block, pair_start, pair_token) for ops in (NATIVE, EXACT, REFERENCE))
    if pair_token.size:
        close(exact, spec, 1e-4 if format.quantized else EPSILON)
        close(ours, spec, 2e-2 if format.quantized else EPSILON)
    weights, sums = np.abs(normal(seed + 6, pair_token.size)), [normal(seed + 7, t, hidden) for _ in range(2)]
    NATIVE.accumulate(sums[0], ours, pair_token, weights)
    REFERENCE.accumulate(sums[1], ours, pair_token, weights)
    close(sums[0], sums[1])
    at_once = normal(seed + 7, t, hidden)
    NATIVE.moe(at_once, x, block, pair_start, pair_token, weights)
    assert np.array_equal(at_once, sums[0])


@examples
@given(seed=seeds, t=tokens, bits=st.sampled_from([8, 16]))
def test_shared_expert(seed: int, t: int, bits: int) -> None:
    hidden, inner = 96, 64
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner), (1, hidden))
    formats = [
        Affine(*shape, 8, 32, "bf16") if bits == 8 and shape[0] > 1 else dense(*shape, "bf16") for shape in shapes
    ]
    weights = [
        [ops.bind(Weight(m, stored(seed + i, m, 0.1))) for i, m in enumerate(formats)] for ops in (EXACT, REFERENCE)
    ]
    x = normal(seed + 5, t, hidden)
    close(EXACT.shared_expert(x, *weights[0]), REFERENCE.shared_expert(x, *weights[1]), 1e-4 if bits == 8 else EPSILON)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_rounds_to_even(values: list[float]) -> None:
    import torch

    x = np.array(values, np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    assert np.array_equal(from_bf16(to_bf16(x)), expected, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_what_is_not_a_number_stays_visible(bad: float, bits: int, activation_bits: int) -> None:
    m = Affine(5, 128, bits, 32, "bf16") if bits < 16 else dense(5, 128, "bf16")
    for isa in _native.available_isas():
        x = normal(1, 2, 128)
        x[1, 70] = bad
        ops = CpuOps(1, isa, activation_bits)
        y = ops.project(x, [ops.bind(Weight(m, stored(3, m)))])[0]
        assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any(), isa


def test_wrong_shapes_and_places_are_refused() -> None:
    m = Affine(4, 64, 4, 32, "bf16")
    ours, _ = weight(0, m)
    with pytest.raises(ValueError, match="project: shapes"):
        NATIVE.project(normal(0, 2, 63), [ours])
    with pytest.raises(ValueError, match="row out of range"):
        NATIVE.embed(ours, np.array([4]))
    data, *rest = stored(0, m)
    with pytest.raises(ValueError, match="bytes of a matrix"):
        NATIVE.bind(Weight(m, (data[:-1], *rest)))
    w = AttentionWeights(1, 1, 8, 1e-6, normal(0, 8), normal(1, 8))
    with pytest.raises(ValueError, match="past the cache's capacity"):
        x, angle = normal(0, 2, 8), normal(0, 2, 2)
        caches = np.zeros((1, 3, 8), np.float32), np.zeros((1, 3, 8), np.float32)
        NATIVE.attention(w, x, x, x, angle, angle, *caches, 2)
    for args, message in (
        ((4, 64, 4, 48, "bf16", "affine"), "group_size"),
        ((4, 64, 3, 32, "bf16", "affine"), "bits"),
        ((4, 65, 4, 32, "bf16", "symmetric"), "multiple"),
        ((4, 4, 16, 0, "x", "dense"), "dtype"),
        ((4, 4, 16, 0, "bf16", "symmetric"), "bits"),
        ((4, 4, 16, 0, "bf16", "other"), "codes"),
        ((4, 48, 4, 32, "e8m0", "e2m1"), "e2m1"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.Format(*args)
    arena = _native.Arena(4096)
    f = Affine(32, 32, 4, 32, "bf16")
    with pytest.raises(ValueError, match="outside the arena"):
        NATIVE.experts(
            normal(0, 1, 32),
            ExpertBlock(ExpertFormat(f, f, f), arena, np.full((1, 9), 4000)),
            np.array([0, 1]),
            np.array([0]),
        )


def test_instruction_sets() -> None:
    isas = _native.available_isas()
    assert isas[0] == "scalar"
    for isa in isas:
        ops = make_ops("cpu", 1, isa)
        assert isinstance(ops, CpuOps) and ops.engine.isa == isa
    # A cap, not a demand: what is above it is not taken, what this machine lacks is no error.
    known = _native.known_isas()
    for i, isa in enumerate(known):
        chosen = make_ops("cpu", 1, isa).engine.isa  # type: ignore[attr-defined]
        assert known.index(chosen) <= i and chosen in isas
    with pytest.raises(UsageError, match="unknown instruction set 'mmx'"):
        make_ops("cpu", 1, "mmx")


def test_results_are_never_written_into_a_copy() -> None:
    with pytest.raises(TypeError):
        NATIVE.engine.accumulate(normal(0, 4, 6).T, normal(1, 1, 4), np.array([0]), np.ones(1, np.float32))
    with pytest.raises(TypeError):
        NATIVE.engine.rms_norm(normal(0, 3, 4), normal(1, 4), 1e-6, normal(2, 4, 3).T)
