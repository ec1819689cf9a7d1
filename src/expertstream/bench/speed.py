"""Measures the engine on this machine: decode and prefill, cold and warm, by memory budget and context length."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..config import EngineConfig
from ..cuda.driver import device_number
from ..engine import LLM
from ..errors import BudgetError, UsageError
from ..formats import MatrixFormat
from ..formats.numbers import F32, I64, to_bf16
from ..generate import prefill
from ..kv_cache import AttentionState, KVCache, WindowState
from ..layers import DecoderConfig
from ..models import config_of, weight_map
from ..ops import Ops, Weight
from ..ops.cuda import CudaOps
from ..units import format_bytes
from .card import Card, rates_of
from .costs import TokenCost, token_cost
from .geometry import TRACE
from .machine import arithmetic_peak, disk_rates, memory_bandwidth
from .traces import load_trace

__all__ = [
    "bench_decode", "bench_prefill", "checkpoint_cost", "decode_header", "describe_decode", "describe_prefill", "drop_page_cache",
    "prefill_header",
]  # fmt: skip

Row = dict[str, Any]


def drop_page_cache(folder: Path) -> None:
    """Drops a folder's files from the page cache, so that the next reads come from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def trunk_formats_of(checkpoint: Checkpoint, c: DecoderConfig) -> dict[str, MatrixFormat]:
    return {n: checkpoint.matrix_format(n, *s.shape) for n, s in weight_map(c).items() if s.kind == "matrix"}


def checkpoint_cost(llm: LLM) -> TokenCost:
    """The cost of a token of the open checkpoint."""
    layouts = llm.experts.store.layouts
    expert = sum(m.nbytes for layout in layouts for m in layout.format.matrices) // len(layouts)
    return token_cost(llm.model_config, trunk_formats_of(llm.checkpoint, llm.model_config), expert, llm.top_k)


def _expert_bytes(llm: LLM) -> int:
    return sum(layout.num_experts * layout.bytes_per_expert for layout in llm.experts.store.layouts)


def _open_with_share(path: Path, share: float, context: int, options: dict[str, Any]) -> LLM | None:
    """A model with slots for this share of its experts, on the GPU if it has one; None if they do not fit this machine. Its other memory
    depends on the budget (the scratch of a long prompt shrinks with it), so the budget is adjusted until the share is right."""

    def spare(llm: LLM) -> int:
        tier = llm.experts.tier if llm.experts.vram is None else llm.experts.vram.tier
        return tier.planned - int(share * llm.plan.total_experts)

    with LLM(path, context_length=context, **options) as llm:
        on_card, plan = llm.vram_plan is not None, llm.vram_plan or llm.plan
        if spare(llm) < 0:
            return None  # does not fit this machine
        budget = plan.used_bytes - spare(llm) * plan.slot_bytes
    del llm  # frees its memory before the next model checks how much is available
    name = "vram_bytes" if on_card else "memory_bytes"
    for _ in range(6):
        try:
            llm = LLM(path, context_length=context, **{**options, name: budget})
        except BudgetError:
            return None
        wrong = spare(llm)
        if abs(wrong) <= max(1, llm.plan.total_experts // 200):
            return llm
        llm.close()
        budget -= wrong * plan.slot_bytes
        del llm
    return LLM(path, context_length=context, **{**options, name: budget})


def _card(llm: LLM) -> Card | None:
    """The rates of the GPU that a model uses, measured beside it."""
    if not isinstance(llm.ops, CudaOps):
        return None
    return rates_of(llm.ops, size=32 << 20, width=1024, tokens=1024)


def _over_link(llm: LLM) -> int:
    """Bytes of experts that have come to a GPU so far."""
    vram = llm.experts.vram
    return 0 if vram is None else vram.bytes_copied + vram.bytes_read


def _off_card(llm: LLM) -> int:
    """Uses of experts by decode steps so far that a GPU did not have."""
    vram = llm.experts.vram
    return 0 if vram is None else vram.far_reads + vram.host_computed


class _Traced:
    """Ops whose router selects the experts of a recorded trace, token by token; at its end the trace starts over."""

    def __init__(self, ops: Ops, experts: I64) -> None:
        self._ops, self._experts = ops, experts  # (tokens, layers, top_k)
        self._layers: dict[int, int] = {}  # router weight → layer, in the order of their first calls
        self._at: dict[int, int] = {}  # layer → tokens so far

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, x: F32, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[F32, I64]:
        layer = self._layers.setdefault(id(weight), len(self._layers))
        begin, count = self._at.get(layer, 0), x.shape[0]
        self._at[layer] = begin + count
        rows = np.arange(begin, begin + count) % self._experts.shape[0]
        selected = self._experts[rows, layer]
        return np.full(selected.shape, 1 / top_k, np.float32), np.ascontiguousarray(selected)


def read_trace(path: Path, c: DecoderConfig) -> I64:
    """The routing trace of a synthetic model: experts (tokens, layers, top_k), distinct in each row. Raises UsageError."""
    experts = load_trace(path).experts
    layers, top_k = c.num_hidden_layers, c.num_experts_per_tok
    if experts.shape[1] < layers or experts.shape[2] < top_k:
        raise UsageError(
            f"{path}: experts must have shape (tokens, layers, top-k), at least (1, {layers}, {top_k}); got {experts.shape}"
        )
    experts = experts[:, :layers, :top_k]
    if experts.max() >= c.num_experts:
        raise UsageError(f"{path}: expert numbers must be less than {c.num_experts}; got {experts.max()}")
    return experts


def _with_trace(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options that make a model follow the trace in its folder, if there is one. Prefetch is off: every prediction would be right. Raises
    UsageError with a GPU, whose router is not asked."""
    if not (path / TRACE).is_file():
        return options
    if device_number(EngineConfig.from_options({"device": options.get("device")}).device) is not None:
        raise UsageError(f"{path} follows a recorded trace, which is possible on the CPU only: use --device cpu")
    c = config_of(open_checkpoint(path))
    trace = read_trace(path / TRACE, c)

    def instrument(ops: Ops) -> Ops:
        traced: Any = _Traced(ops, trace)
        return traced  # type: ignore[no-any-return]

    return {**options, "instrument": instrument, "prefetch": 0}


def _fill_context(cache: KVCache, tokens: int, rng: np.random.Generator) -> None:
    """Fills the cache as if that many tokens had been read: attention time does not depend on their values."""
    for state in cache.layers:
        if isinstance(state, WindowState):
            state.restore(tokens, [np.zeros(shape, dtype) for dtype, shape in state.shapes()])
        elif isinstance(state, AttentionState):
            for values in (state.keys, state.values):
                some = rng.standard_normal(
                    (values.shape[0], min(tokens, 512), values.shape[2]), np.float32
                ) * np.float32(0.1)
                stored = to_bf16(some) if values.dtype == np.uint16 else some
                for at in range(0, tokens, 512):
                    values[:, at : min(at + 512, tokens)] = stored[:, : min(512, tokens - at)]
    cache.position = tokens


def _random_tokens(llm: LLM, count: int, rng: np.random.Generator) -> I64:
    return rng.integers(0, llm.model_config.vocab_size, count, np.int64)


def _decode(llm: LLM, cache: KVCache, tokens: I64) -> list[float]:
    seconds = []
    for token in tokens:
        begin = time.perf_counter()
        llm.model(np.array([token], np.int64), cache)
        seconds.append(time.perf_counter() - begin)
    return seconds


def bench_decode(
    path: Path,
    fractions: Sequence[float],
    contexts: Sequence[int],
    tokens: int = 64,
    options: dict[str, Any] | None = None,
    report: Callable[[Row], None] = lambda row: None,
    skipped: Callable[[float], None] = lambda fraction: None,
) -> list[Row]:
    """One row per budget and context; `skipped` is called for shares that do not fit this machine. Cold: the first tokens with only the
    trunk in memory. Warm: once the slots are full. Disk and memory are measured again for each budget, since shared machines drift."""
    options = _with_trace(path, dict(options or {}))
    rng, rows = np.random.default_rng(0), []
    longest = max(256, *contexts) + tokens + 320
    for fraction in fractions:
        llm = _open_with_share(path, fraction, longest, options)
        if llm is None:
            skipped(fraction)
            continue
        with llm:
            drop_page_cache(path)
            cost, slot = checkpoint_cost(llm), llm.plan.slot_bytes
            bandwidth, card = memory_bandwidth(llm.config.thread_count), _card(llm)
            disk = disk_rates(path, slot, depths=(16,), splits=(256 << 10,), seconds=0.7)[0].bytes_per_second
            # A GPU gets experts that are used more than others a few at a time.
            warm = 16 if card is None or llm.experts.vram is None or llm.experts.vram.holds_all else 300
            cache = llm.session().cache
            cold = _decode(llm, cache, _random_tokens(llm, 8, rng))
            # A prompt fills free slots; a few decoded tokens then establish the eviction order.
            cache.reset()
            prefill(llm.model, cache, _random_tokens(llm, 256, rng), llm.prefill_chunk)
            for context in contexts:
                cache.reset()
                _fill_context(cache, context, rng)
                _decode(llm, cache, _random_tokens(llm, warm, rng))
                before, link, off_card = llm.experts.stats.copy(), _over_link(llm), _off_card(llm)
                seconds = _decode(llm, cache, _random_tokens(llm, tokens, rng))
                spent = llm.experts.stats.since(before).total()
                read = spent.bytes_read / tokens
                row: Row = {
                    "fraction": fraction,
                    "budget_bytes": (llm.vram_plan or llm.plan).budget_bytes,
                    "model_bytes": llm.plan.trunk_bytes + _expert_bytes(llm),
                    "context": context,
                    "threads": llm.config.thread_count,
                    "cold_tps": len(cold) / sum(cold),
                    "warm_tps": tokens / sum(seconds),
                    "median_tps": 1 / statistics.median(seconds),
                    "hit_rate": spent.hit_rate,
                    "read_bytes_per_token": read,
                    "stall_share": spent.stall_seconds / sum(seconds),
                    "touched_bytes": cost.bytes + cost.kv_bytes * context,
                    "memory_bytes_per_second": bandwidth,
                    "disk_bytes_per_second": disk,
                }
                row["disk_limit_tps"] = disk / read if read else float("inf")
                if card is None:
                    row["memory_limit_tps"] = bandwidth / row["touched_bytes"]
                else:  # "memory" is the card's, hits are what it had
                    crossed, uses = (_over_link(llm) - link) / tokens, cost.experts * tokens
                    row["hit_rate"] = 1 - (_off_card(llm) - off_card) / uses
                    own = row["touched_bytes"] - (1 - row["hit_rate"]) * cost.experts * cost.expert_bytes
                    row |= {"card": card.name, "link_bytes_per_token": crossed, "link_bytes_per_second": card.link_rate}
                    row["link_limit_tps"] = card.link_rate / crossed if crossed else float("inf")
                    row |= {"memory_bytes_per_second": card.memory_rate, "memory_limit_tps": card.memory_rate / own}
                limits = [row[f"{what}_limit_tps"] for what in ("memory", "disk", "link") if f"{what}_limit_tps" in row]
                row["limit_share"] = row["warm_tps"] / min(limits)
                rows.append(row)
                report(row)
        del llm
    return rows


def bench_prefill(
    path: Path,
    fractions: Sequence[float],
    lengths: Sequence[int],
    options: dict[str, Any] | None = None,
    report: Callable[[Row], None] = lambda row: None,
    skipped: Callable[[float], None] = lambda fraction: None,
) -> list[Row]:
    """One row per budget and length; `skipped` is called for shares that do not fit this machine. Cold: only the trunk in memory.
    Warm: the same prompt again."""
    options = dict(options or {})
    rng, rows = np.random.default_rng(0), []
    for fraction in fractions:
        llm = _open_with_share(path, fraction, max(lengths) + 64, options)
        if llm is None:
            skipped(fraction)
            continue
        with llm:
            drop_page_cache(path)
            cost = checkpoint_cost(llm)
            card = _card(llm)
            peak = arithmetic_peak(llm.config.thread_count) if card is None else card.arithmetic_rate
            disk = disk_rates(path, llm.plan.slot_bytes, depths=(16,), splits=(256 << 10,), seconds=0.7)[
                0
            ].bytes_per_second
            for length in lengths:
                prompt, seconds, reads, crossed = _random_tokens(llm, length, rng), [], [], 0
                for _ in range(3):
                    cache, before, crossed = llm.session().cache, llm.experts.stats.total().bytes_read, _over_link(llm)
                    begin = time.perf_counter()
                    prefill(llm.model, cache, prompt, llm.prefill_chunk)
                    seconds.append(time.perf_counter() - begin)
                    reads.append(llm.experts.stats.total().bytes_read - before)
                warm, products = min(seconds[1:]), (cost.multiply_adds - cost.head_multiply_adds) * length
                row: Row = {
                    "fraction": fraction,
                    "budget_bytes": (llm.vram_plan or llm.plan).budget_bytes,
                    "tokens": length,
                    "threads": llm.config.thread_count,
                    "cold_tps": length / seconds[0],
                    "warm_tps": length / warm,
                    "read_bytes": reads[-1],
                    "disk_bytes_per_second": disk,
                    "disk_seconds": reads[-1] / disk,
                    "multiply_adds_per_second": products / warm,
                    "peak_multiply_adds_per_second": peak,
                    "peak_share": products / warm / peak,
                }
                if card is not None:
                    link = _over_link(llm) - crossed
                    row |= {"card": card.name, "link_bytes": link, "link_seconds": link / card.link_rate}
                rows.append(row)
                report(row)
        del llm
    return rows


def describe_decode(row: Row) -> str:
    """A row as a line of text."""
    link = f" {row['link_limit_tps']:7.1f}" if "link_limit_tps" in row else ""
    return (
        f"{row['fraction']:5.0%} {format_bytes(row['budget_bytes']):>9} {row['context']:7,} {row['cold_tps']:7.2f} "
        f"{row['warm_tps']:7.2f} {row['hit_rate']:6.1%} {format_bytes(row['read_bytes_per_token']):>10} "
        f"{row['memory_limit_tps']:7.1f} {row['disk_limit_tps']:7.1f}{link} {row['limit_share']:6.0%}"
    )


def decode_header(gpu: bool) -> str:
    """The heading of describe_decode()'s lines."""
    link = f" {'link':>7}" if gpu else ""
    what = "the GPU's memory, disk and link" if gpu else "memory and disk"
    return (
        f"{'share':>5} {'vram' if gpu else 'budget':>9} {'context':>7} {'cold':>7} {'warm':>7} {'hits':>6} {'read/token':>10} "
        f"{'memory':>7} {'disk':>7}{link} {'reach':>6}   (tokens per second; limits of {what}; reach: warm over the lowest limit)"
    )


def describe_prefill(row: Row) -> str:
    """A row as a line of text."""
    link = f" {row['link_seconds']:7.2f} s" if "link_seconds" in row else ""
    return (
        f"{row['fraction']:5.0%} {format_bytes(row['budget_bytes']):>9} {row['tokens']:7,} {row['cold_tps']:7.1f} "
        f"{row['warm_tps']:7.1f} {format_bytes(row['read_bytes']):>10} {row['disk_seconds']:7.2f} s{link} "
        f"{row['multiply_adds_per_second'] / 1e9:7.0f} {row['peak_share']:6.0%}"
    )


def prefill_header(gpu: bool) -> str:
    """The heading of describe_prefill()'s lines."""
    link = f" {'link':>9}" if gpu else ""
    alone, peak = (
        ("the disk and the link alone", "the rate of one large product")
        if gpu
        else ("the disk alone", "the arithmetic peak")
    )
    return (
        f"{'share':>5} {'vram' if gpu else 'budget':>9} {'tokens':>7} {'cold':>7} {'warm':>7} {'read':>10} {'disk':>9}{link} "
        f"{'G mul/s':>7} {'peak':>6}   (tokens per second; time for {alone}; share of {peak})"
    )
