"""The bench command."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import UsageError
from ..files import read_text
from ..text.visible import one_line
from ..units import format_bytes, parse_bytes

__all__ = ["add_bench"]


def add_bench(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    bench = commands.add_parser(
        "bench",
        usage="expertstream bench io|mem|kernels|decode|prefill|cache [OPTIONS] [PATH]",
        help="measure this machine and the engine on it",
        description=(
            "io PATH        the disk with the engine's access pattern; the best setting is saved for later runs\n"
            "mem            memory bandwidth by number of threads\n"
            "kernels        every instruction set, format and shape compared with its roofline and with plain C++\n"
            "decode MODEL   tokens per second by memory budget and context, cold and warm, with the hardware limits\n"
            "prefill MODEL  the same for prompts\n"
            "cache TRACE    hit rates of every cache policy and of the optimum on a routing trace (see `expertstream trace`)"
        ),
        **style,
    )
    bench.add_argument(
        "what",
        choices=("io", "mem", "kernels", "decode", "prefill", "cache"),
        metavar="WHAT",
        help="io, mem, kernels, decode, prefill or cache",
    )
    bench.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="a checkpoint folder; for io, any folder; for cache, a trace"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="compute threads (one per available processor)")
    bench.add_argument(
        "--device",
        metavar="NAME",
        help="decode, prefill: cpu, cuda or cuda:N (the first NVIDIA GPU if there is one, else the CPU)",
    )
    bench.add_argument(
        "--memory",
        metavar="SIZE",
        help="decode, prefill: with a GPU, the budget of the host's memory (what is available)",
    )
    bench.add_argument(
        "--budgets",
        default="10,25,50,75,100",
        metavar="LIST",
        help="percentages of the experts that fit in memory, or in the GPU's (10,25,50,75,100)",
    )
    bench.add_argument("--contexts", default="1024", metavar="LIST", help="decode: tokens of context (1024)")
    bench.add_argument("--lengths", default="512,2048", metavar="LIST", help="prefill: tokens of the prompt (512,2048)")
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="decode: tokens to time (64)")
    bench.add_argument("--exact", action="store_true", help="decode, prefill: 16-bit activations")
    bench.add_argument(
        "--record", default="1728KiB", metavar="SIZE", help="io: size of one expert, if PATH is not a pack (1728KiB)"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every number as JSON")
    bench.add_argument("--csv", type=Path, metavar="FILE", help="write every number as CSV")
    bench.set_defaults(function=_bench)


def _numbers(text: str, name: str, least: int, most: int) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value <= most for value in values):
        raise UsageError(
            f"{name} must be a list of whole numbers from {least} to {most}, such as {least},{min(most, 4 * least)}; got {text!r}"
        )
    return values


def _bench(options: argparse.Namespace) -> int:
    threads = EngineConfig.from_options({"threads": options.threads}).thread_count
    for file in (options.json, options.csv):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise UsageError(f"{file}: {'is a folder' if file.is_dir() else 'no such folder'}")
    paths = {
        "io": "a folder",
        "decode": "a checkpoint folder",
        "prefill": "a checkpoint folder",
        "cache": "a routing trace",
    }
    if options.what in paths:
        if options.path is None:
            raise UsageError(
                f"bench {options.what} needs {paths[options.what]}: expertstream bench {options.what} PATH"
            )
        if not options.path.exists():
            raise UsageError(f"{options.path}: no such file or folder")
    elif options.path is not None:
        raise UsageError(f"bench {options.what} takes no path; got {options.path}")
    rows: list[dict[str, Any]] = {
        "io": _bench_io, "mem": _bench_mem, "kernels": _bench_kernels, "decode": _bench_decode, "prefill": _bench_prefill,
        "cache": _bench_cache,
    }[options.what](options, threads)  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps({"bench": options.what, "rows": rows}, indent=1))
    if options.csv is not None:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    return 0


def _bench_io(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.machine import disk_rates, remember

    record = parse_bytes(options.record)
    if (options.path / "expertstream.json").is_file():
        record = json.loads(read_text(options.path / "expertstream.json"))["layers"][0]["record_bytes"]
    print(f"records of {format_bytes(record)}\n{'kind':9} {'in flight':>9} {'pieces of':>9} {'GB/s':>6}")

    def show(rate: Any) -> None:
        kind = "O_DIRECT" if rate.direct else "buffered"
        print(
            f"{kind:9} {rate.queue_depth:9} {format_bytes(rate.split_bytes):>9} {rate.bytes_per_second / 1e9:6.2f}",
            flush=True,
        )

    rates = disk_rates(options.path, record, report=show)
    print(f"saved for this disk: {remember(options.path, rates)}")
    return [vars(rate) for rate in rates]


def _bench_mem(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.machine import memory_bandwidth, thread_counts

    rows = []
    print(f"{'threads':>7} {'GB/s':>6}")
    for count in thread_counts(threads):
        rows.append({"threads": count, "memory_bytes_per_second": memory_bandwidth(count)})
        print(f"{count:7} {rows[-1]['memory_bytes_per_second'] / 1e9:6.1f}", flush=True)
    return rows


def _bench_kernels(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.kernels import bench_kernels

    print(
        f"{'isa':12} {'act':>3} {'format':32} {'shape':>11} {'tokens':>6} {'GB/s':>6} {'G mul/s':>7} {'roof':>5}  bits"
    )

    def show(row: dict[str, Any]) -> None:
        print(
            f"{row['isa']:12} {row['activation_bits']:3} {row['format']:32} {row['rows']:>6}×{row['cols']:<4} {row['tokens']:6} "
            f"{row['weight_bytes_per_second'] / 1e9:6.1f} {row['multiply_adds_per_second'] / 1e9:7.1f} {row['roofline_share']:5.0%}  "
            f"{'same' if row['same_bits'] else 'DIFFERENT'}",
            flush=True,
        )

    rows = bench_kernels(threads, report=show)
    if not all(row["same_bits"] for row in rows):
        raise UsageError(
            "the results of a kernel differ from plain C++; please report this with the name of your processor"
        )
    return rows


def _shared_options(options: argparse.Namespace) -> dict[str, Any]:
    from ..cuda.driver import device_number

    given = {"threads": options.threads, "exact": options.exact or None, "memory": options.memory}
    engine = EngineConfig.from_options({"device": options.device})
    number = device_number(engine.device)
    if options.memory is not None and number is None:
        raise UsageError("--memory is for a GPU; on the CPU, --budgets sets the memory")
    given["device"] = "cpu" if number is None else f"cuda:{number}"
    return {name: value for name, value in given.items() if value is not None}


def _bench_decode(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.speed import bench_decode, decode_header, describe_decode

    budgets = [value / 100 for value in _numbers(options.budgets, "--budgets", 1, 100)]
    contexts = _numbers(options.contexts, "--contexts", 1, 1 << 20)
    if options.tokens < 1:
        raise UsageError(f"--tokens must be at least 1; got {options.tokens}")
    shared = _shared_options(options)
    print(decode_header(shared["device"] != "cpu"))
    return bench_decode(
        options.path,
        budgets,
        contexts,
        options.tokens,
        shared,
        lambda row: print(describe_decode(row), flush=True),
        _say_skipped,
    )


def _say_skipped(fraction: float) -> None:
    print(f"{fraction:5.0%} of the experts do not fit in this machine's memory: skipped", flush=True)


def _bench_prefill(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.speed import bench_prefill, describe_prefill, prefill_header

    budgets = [value / 100 for value in _numbers(options.budgets, "--budgets", 1, 100)]
    lengths = _numbers(options.lengths, "--lengths", 1, 1 << 20)
    shared = _shared_options(options)
    print(prefill_header(shared["device"] != "cpu"))
    return bench_prefill(
        options.path,
        budgets,
        lengths,
        shared,
        lambda row: print(describe_prefill(row), flush=True),
        _say_skipped,
    )


def _bench_cache(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..bench.traces import BELADY, SHARES, hit_rate, load_trace
    from ..config import POLICIES

    trace = load_trace(options.path)
    tokens, layers, top_k = trace.experts.shape
    print(f"{one_line(str(options.path))}: {tokens:,} tokens, {layers} layers, {top_k} of {trace.num_experts} experts")
    names = (*POLICIES, BELADY)
    print(f"{'experts that fit':>16} {'slots/layer':>13} " + " ".join(f"{name:>7}" for name in names))
    rows = []
    for share in SHARES:
        slots = round(share * trace.num_experts)
        if slots < 1:
            continue
        rates = {name: hit_rate(trace, name, slots) for name in names}
        rows.append({"trace": options.path.stem, "share": share, "slots": slots, **rates})
        print(f"{share:16.1%} {slots:13} " + " ".join(f"{rates[name]:7.1%}" for name in names), flush=True)
    return rows
