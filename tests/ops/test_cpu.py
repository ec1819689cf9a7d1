"""The native ops against the specification, op by op, on shapes that do and do not fit the vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import UsageError, _native
from expertstream.ops import ExpertBlock, ExpertFormat, MatrixFormat, Weight, from_bf16, make_ops, to_bf16
from expertstream.ops.cpu import CpuOps
from expertstream.ops.reference import ReferenceOps

NATIVE, REFERENCE = CpuOps(2), ReferenceOps()
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


def weight(seed: int, rows: int, cols: int, bits: int, group: int, dtype: str) -> tuple[Weight, Weight]:
    """The same random matrix for both."""
    rng = np.random.default_rng(seed)
    f = MatrixFormat(rows, cols, bits, group if bits < 16 else 0, dtype)

    def values(count: int, scale: float) -> np.ndarray:
        v = (rng.standard_normal(count) * scale).astype(np.float32)
        return (to_bf16(v) if dtype == "bf16" else v.astype(np.float16) if dtype == "f16" else v).view(np.uint8)

    if bits < 16:
        groups = rows * cols // group
        parts = rng.integers(0, 256, f.data_bytes, np.uint8), values(groups, 0.05), values(groups, 0.2)
    else:
        empty = np.empty(0, np.uint8)
        parts = values(rows * cols, 1.0), empty, empty
    return NATIVE.bind(Weight(f, *parts)), REFERENCE.bind(Weight(f, *parts))


@examples
@given(
    seed=seeds,
    t=tokens,
    rows=sizes,
    groups=st.integers(1, 40),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["bf16", "f16", "f32"]),
)
def test_linear_and_embed_quantized(
    seed: int, t: int, rows: int, groups: int, bits: int, group: int, dtype: str
) -> None:
    ours, spec = weight(seed, rows, group * groups, bits, group, dtype)
    x = normal(seed + 1, t, group * groups)
    # Activations become 16-bit: an error of at most 2^-16 of a group's largest value, against what the products add up to.
    error = NATIVE.linear(x, ours) - REFERENCE.linear(x, spec)
    bound = np.abs(x).max() * 2.0**-15 * np.linalg.norm(spec.handle, axis=1) + 1e-5 * (
        np.abs(x) @ np.abs(spec.handle).T
    )
    assert (np.abs(error) <= bound).all()
    ids = np.random.default_rng(seed).integers(0, rows, 5)
    close(NATIVE.embed(ours, ids), REFERENCE.embed(spec, ids))


@examples
@given(seed=seeds, t=tokens, rows=sizes, cols=sizes, dtype=st.sampled_from(["bf16", "f16", "f32"]))
def test_linear_and_embed_dense(seed: int, t: int, rows: int, cols: int, dtype: str) -> None:
    ours, spec = weight(seed, rows, cols, 32 if dtype == "f32" else 16, 0, dtype)
    x = normal(seed + 1, t, cols)
    assert (
        np.abs(NATIVE.linear(x, ours) - REFERENCE.linear(x, spec)) <= 1e-6 * (np.abs(x) @ np.abs(spec.handle).T)
    ).all()
    ids = np.random.default_rng(seed).integers(0, rows, 5)
    assert np.array_equal(NATIVE.embed(ours, ids), REFERENCE.embed(spec, ids))


@examples
@given(seed=seeds, t=tokens, n=sizes)
def test_rows(seed: int, t: int, n: int) -> None:
    x, z, w = normal(seed, t, n, scale=3), normal(seed + 1, t, n, scale=4), normal(seed + 2, n)
    close(NATIVE.rms_norm(x, w, 1e-6), REFERENCE.rms_norm(x, w, 1e-6))
    close(NATIVE.gated_rms_norm(x, z, w, 1e-6), REFERENCE.gated_rms_norm(x, z, w, 1e-6))
    close(NATIVE.l2_norm(x, 1e-6, 0.25), REFERENCE.l2_norm(x, 1e-6, 0.25))
    close(NATIVE.swiglu(x, z), REFERENCE.swiglu(x, z))
    for ours, spec in zip(NATIVE.gates(x, z, w, w), REFERENCE.gates(x, z, w, w), strict=True):
        close(ours, spec)
    gate = normal(seed + 3, t, 1)
    a, b = x.copy(), x.copy()
    NATIVE.add_shared(a, z, x, gate)
    REFERENCE.add_shared(b, z, x, gate)
    close(a, b)


@examples
@given(seed=seeds, t=tokens, heads=st.integers(1, 4), half=st.integers(1, 20), rest=st.integers(0, 9))
def test_rotary(seed: int, t: int, heads: int, half: int, rest: int) -> None:
    x = normal(seed, t, heads, 2 * half + rest)
    angle = normal(seed + 1, t, half, scale=10)
    a, b = x.copy(), x.copy()
    NATIVE.rotary(a, np.cos(angle), np.sin(angle))
    REFERENCE.rotary(b, np.cos(angle), np.sin(angle))
    close(a, b)
    assert np.array_equal(a[..., 2 * half :], x[..., 2 * half :])


@examples
@given(seed=seeds, t=tokens, channels=sizes, kernel=st.integers(2, 8))
def test_conv(seed: int, t: int, channels: int, kernel: int) -> None:
    x, w, state = normal(seed, t, channels), normal(seed + 1, kernel, channels), normal(seed + 2, kernel - 1, channels)
    a, b = state.copy(), state.copy()
    close(NATIVE.conv(x, w, a), REFERENCE.conv(x, w, b))
    assert np.array_equal(a, b)


@examples
@given(
    seed=seeds,
    t=tokens,
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 9),
    d=sizes,
    position=st.integers(0, 30),
    bf16=st.booleans(),
)
def test_attention(seed: int, t: int, kv_heads: int, share: int, d: int, position: int, bf16: bool) -> None:
    heads, capacity = kv_heads * share, position + t + 3
    q, gate = normal(seed, t, heads, d), normal(seed + 1, t, heads, d)
    k, v = normal(seed + 2, t, kv_heads, d), normal(seed + 3, t, kv_heads, d)
    past = normal(seed + 4, kv_heads, capacity, d)
    caches = [[(to_bf16(past) if bf16 else past).copy() for _ in range(2)] for _ in range(2)]
    close(
        NATIVE.attention(q, k, v, gate, *caches[0], position), REFERENCE.attention(q, k, v, gate, *caches[1], position)
    )
    for ours, spec in zip(caches[0], caches[1], strict=True):
        assert np.array_equal(ours, spec)


@examples
@given(
    seed=seeds,
    t=st.integers(1, 150),
    key_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    dk=sizes,
    dv=st.integers(1, 140),
    chunked=st.booleans(),
)
def test_gated_delta(seed: int, t: int, key_heads: int, share: int, dk: int, dv: int, chunked: bool) -> None:
    value_heads = key_heads * share
    q, k = (REFERENCE.l2_norm(normal(seed + i, t, key_heads, dk), 1e-6, 1.0) for i in range(2))
    v, state = normal(seed + 2, t, value_heads, dv), normal(seed + 3, value_heads, dk, dv, scale=0.1)
    g, beta = -np.abs(normal(seed + 4, t, value_heads)), 1 / (1 + np.exp(-normal(seed + 5, t, value_heads)))
    results = []
    for ops, form in ((NATIVE, chunked), (REFERENCE, chunked), (REFERENCE, not chunked)):
        s = state.copy()
        results.append((ops.gated_delta(q, k, v, g, beta, s, form), s))
    for out, s in results[1:]:
        close(results[0][0], out, 5e-6)
        close(results[0][1], s, 5e-6)


@examples
@given(seed=seeds, t=tokens, experts=st.integers(1, 40), data=st.data())
def test_route(seed: int, t: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    logits = np.round(normal(seed, t, experts, scale=2), data.draw(st.sampled_from([0, 6])))  # rounded: with ties
    ours, spec = NATIVE.route(logits, top_k), REFERENCE.route(logits, top_k)
    assert np.array_equal(ours[1], spec[1])
    close(ours[0], spec[0])


@examples
@given(seed=seeds, t=tokens, count=st.integers(1, 4), bits=st.sampled_from([2, 4, 8, 16]))
def test_experts_and_accumulate(seed: int, t: int, count: int, bits: int) -> None:
    hidden, inner = 96, 64
    group = 32 if bits < 16 else 0
    formats = [
        MatrixFormat(*shape, bits, group, "bf16") for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    ]
    rng = np.random.default_rng(seed)
    arena = _native.Arena(count * 200000)
    memory, offsets, at = arena.view(), np.zeros((count, 9), np.int64), 4
    for e in range(count):
        for i, m in enumerate(formats):
            values = (
                [rng.integers(0, 256, m.data_bytes, np.uint8)]
                if bits < 16
                else [to_bf16(normal(seed + i, m.rows * m.cols, scale=0.1)).view(np.uint8)]
            )
            values += [to_bf16(normal(seed + 9, m.scale_bytes // 2, scale=0.05)).view(np.uint8)] * 2
            for j, v in enumerate(values):
                offsets[e, 3 * i + j] = at
                memory[at : at + v.size] = v
                at += v.size + 3
    block = ExpertBlock(ExpertFormat(*formats), arena, offsets)
    x = normal(seed + 5, t, hidden)
    lengths = rng.integers(0, t + 1, count)
    pair_start = np.concatenate([[0], np.cumsum(lengths)])
    pair_token = np.concatenate([rng.choice(t, n, replace=False) for n in lengths] or [[]]).astype(np.int64)
    ours, spec = (ops.experts(x, block, pair_start, pair_token) for ops in (NATIVE, REFERENCE))
    if pair_token.size:
        close(ours, spec, 1e-4 if bits < 16 else EPSILON)
    weights, sums = np.abs(normal(seed + 6, pair_token.size)), [normal(seed + 7, t, hidden) for _ in range(2)]
    NATIVE.accumulate(sums[0], ours, pair_token, weights)
    REFERENCE.accumulate(sums[1], ours, pair_token, weights)
    close(sums[0], sums[1])


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_rounds_to_even(values: list[float]) -> None:
    import torch

    x = np.array(values, np.float32)
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    assert np.array_equal(from_bf16(to_bf16(x)), expected, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_is_not_a_number_stays_visible(bad: float, bits: int) -> None:
    ours, _ = weight(3, 5, 128, bits, 32, "bf16")
    for isa in _native.available_isas():
        x = normal(1, 2, 128)
        x[1, 70] = bad
        ops = CpuOps(1, isa)
        y = ops.linear(x, ours)
        assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).any(), isa


def test_wrong_shapes_and_places_are_refused() -> None:
    ours, _ = weight(0, 4, 64, 4, 32, "bf16")
    with pytest.raises(ValueError, match="linear: shapes"):
        NATIVE.linear(normal(0, 2, 63), ours)
    with pytest.raises(ValueError, match="row out of range"):
        NATIVE.embed(ours, np.array([4]))
    with pytest.raises(ValueError, match="bytes of a matrix"):
        NATIVE.bind(Weight(ours.format, ours.data[:-1], ours.scales, ours.biases))
    with pytest.raises(ValueError, match="past the cache's capacity"):
        x = normal(0, 2, 1, 8)
        NATIVE.attention(x, x, x, x, np.zeros((1, 3, 8), np.float32), np.zeros((1, 3, 8), np.float32), 2)
    for args, message in (
        ((4, 64, 4, 48, "bf16"), "group_size"),
        ((4, 64, 3, 32, "bf16"), "bits"),
        ((4, 65, 4, 32, "bf16"), "multiple"),
        ((4, 4, 16, 0, "x"), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.Format(*args)
    arena = _native.Arena(4096)
    f = MatrixFormat(32, 32, 4, 32, "bf16")
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
    x = normal(0, 3, 2, 8)
    with pytest.raises(TypeError):
        NATIVE.engine.rotary(x[:, ::2], np.ones((3, 2), np.float32), np.ones((3, 2), np.float32))
    with pytest.raises(TypeError):
        NATIVE.engine.accumulate(normal(0, 4, 6).T, normal(1, 1, 4), np.array([0]), np.ones(1, np.float32))
