"""Every kernel table of this machine on typical shapes: results compared bit for bit with the plain C++ table, speed with the roofline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import _native
from ..formats import MXFP4, Affine, Dense, MatrixFormat
from ..formats.numbers import F32, to_bf16
from ..ops import Weight
from ..ops.cpu import CpuOps
from .machine import arithmetic_peak, memory_bandwidth, timed

__all__ = ["bench_kernels"]

FORMATS = {
    "4 bits, groups of 64": (4, 64, "bf16", False),
    "4 bits, symmetric, groups of 32": (4, 32, "f16", True),
    "8 bits, groups of 64": (8, 64, "bf16", False),
    "2 bits, groups of 64": (2, 64, "bf16", False),
    "MXFP4": (4, 32, "e8m0", True),
    "bfloat16": (16, 0, "bf16", False),
}
SHAPES = (
    (512, 2048),
    (2048, 512),
    (8192, 2048),
    (32768, 2048),
)  # an expert's gate and down, a projection, a matrix larger than the caches


def _format(rows: int, cols: int, bits: int, group: int, dtype: str, symmetric: bool) -> MatrixFormat:
    if dtype == "e8m0":
        return MXFP4(rows, cols)
    return Affine(rows, cols, bits, group, dtype, symmetric) if bits < 16 else Dense(rows, cols, dtype)


def _weight(m: MatrixFormat, rng: np.random.Generator) -> Weight:
    data, *others = m.part_bytes
    if isinstance(m, MXFP4):
        codes = np.resize(rng.integers(0, 256, min(data, 1 << 22), np.uint8), data)
        return Weight(m, (codes, rng.integers(118, 122, others[0], np.uint8)))
    if not isinstance(m, Affine):
        values = to_bf16(rng.standard_normal(min(m.rows * m.cols, 1 << 20), np.float32)).view(np.uint8)
        return Weight(m, (np.resize(values, data),))
    count = m.rows * m.cols // m.group_size
    scale = (rng.random(count, np.float32) * np.float32(0.01)).astype(np.float16)
    values = scale.view(np.uint8) if m.dtype == "f16" else to_bf16(scale.astype(np.float32)).view(np.uint8)
    packed = np.resize(rng.integers(0, 256, min(data, 1 << 22), np.uint8), data)
    return Weight(m, (packed, *(values.copy() for _ in others)))


def _run(ops: CpuOps, x: F32, weight: Weight, runs: int) -> None:
    for _ in range(runs):
        ops.project(x, [weight])


def bench_kernels(
    threads: int,
    tokens: tuple[int, ...] = (1, 12, 64, 512),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """One row per instruction set, format, shape and number of tokens; `same_bits` says whether the table's results equal the scalar
    table's. The roofline is the lower of arithmetic peak and bandwidth times products per byte."""
    rng, rows = np.random.default_rng(0), []
    bandwidth = memory_bandwidth(threads)
    for isa in _native.available_isas()[::-1]:
        peak = arithmetic_peak(threads, isa)
        for activation_bits in (8, 16):
            ops, plain = CpuOps(threads, isa, activation_bits), CpuOps(threads, "scalar", activation_bits)
            for name, (bits, group, dtype, symmetric) in FORMATS.items():
                if bits == 16 and activation_bits == 16:
                    continue  # dense weights use float32 activations either way
                small = _format(48, 256, bits, group, dtype, symmetric)
                x = rng.standard_normal((13, 256), np.float32)
                check = [o.project(x, [o.bind(_weight(small, np.random.default_rng(1)))])[0] for o in (ops, plain)]
                same = bool(np.array_equal(check[0], check[1]))
                for shape in SHAPES if isa != "scalar" else SHAPES[:1]:
                    m = _format(*shape, bits, group, dtype, symmetric)
                    weight = ops.bind(_weight(m, rng))
                    for count in tokens if isa != "scalar" else tokens[:1]:
                        if count * m.rows * m.cols > 2 << 30:
                            continue
                        x = rng.standard_normal((count, m.cols), np.float32)
                        # Small matrices stay in the cache: repeat until the time is measurable.
                        runs = max(1, int(2e7 / (m.rows * m.cols * count)))
                        seconds = timed(partial(_run, ops, x, weight, runs), 3) / runs
                        products = m.rows * m.cols * count
                        roof = min(peak, bandwidth * products / m.nbytes)
                        row = {
                            "isa": isa, "threads": threads, "activation_bits": activation_bits, "format": name, "rows": m.rows,
                            "cols": m.cols, "tokens": count, "same_bits": same, "seconds": seconds,
                            "weight_bytes_per_second": m.nbytes / seconds, "multiply_adds_per_second": products / seconds,
                            "roofline_share": products / seconds / roof, "peak_multiply_adds_per_second": peak,
                            "memory_bytes_per_second": bandwidth,
                        }  # fmt: skip
                        rows.append(row)
                        report(row)
    return rows
