"""The commands of the instruments: synth, bench, plan, report; trace has a file of its own."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from ..config import EngineConfig, format_bytes, parse_bytes
from ..errors import UsageError
from ..files import read_text
from ..visible import one_line
from .trace_cli import add_trace

__all__ = ["add_commands"]


def add_commands(commands: Any, formatter: Any, epilog: str) -> None:
    """Adds synth, bench, plan, report and trace to the command line's subcommands."""
    style = {"formatter_class": formatter, "epilog": epilog}
    _add_synth(commands, style)
    _add_bench(commands, style)
    _add_plan(commands, style)
    _add_report(commands, style)
    add_trace(commands, style)


def _bits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4, help="of the experts (4)")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="values that share a scale (64)"
    )
    parser.add_argument("--trunk-bits", type=int, choices=(4, 8, 16), default=8, help="of the trunk's matrices (8)")
    parser.add_argument("--symmetric", action="store_true", help="no bias beside each scale")


def _policy(options: argparse.Namespace) -> Any:
    from ..checkpoint.quantize import BitPolicy

    return BitPolicy(options.bits, options.group_size, options.trunk_bits, options.symmetric)


def _add_synth(commands: Any, style: dict[str, Any]) -> None:
    synth = commands.add_parser(
        "synth",
        usage="expertstream synth [OPTIONS] GEOMETRY OUT",
        help="write a checkpoint of a model's sizes with random weights, to measure with",
        description=(
            "Writes a pack with the sizes of a known model (qwen3.5-397b-a17b, qwen3.5-122b-a10b, qwen3.5-35b-a3b,\n"
            "qwen3-next-80b, qwen3-235b-a22b, qwen3-30b-a3b, gpt-oss-120b, gpt-oss-20b, small; a unique part of a name\n"
            "will do) or of a config.json, and random weights: so that a machine can be measured before the real model is\n"
            "downloaded. It writes no sense."
        ),
        **style,
    )
    synth.add_argument(
        "geometry", metavar="GEOMETRY", help="a known model, or a config.json, or a folder that holds one"
    )
    synth.add_argument("out", metavar="OUT", type=Path, help="a folder to be made")
    synth.add_argument("--layers", type=int, default=0, metavar="N", help="only the first N layers (all)")
    _bits(synth)
    synth.add_argument(
        "--routing", choices=("uniform", "zipf", "trace"), default="uniform",
        help="experts used alike, some far more than others, or as a recorded trace says (uniform)",
    )  # fmt: skip
    synth.add_argument(
        "--trace", type=Path, metavar="FILE", help="with --routing trace: an .npz with experts (tokens, layers, top-k)"
    )
    synth.add_argument(
        "--gguf", type=Path, metavar="FILE",
        help="also the same values as GGUF, for llama.cpp; implies --symmetric --group-size 32; needs the package gguf",
    )  # fmt: skip
    synth.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same weights (0)")
    synth.set_defaults(function=_synth)


def _synth(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from ..models import read_config
    from .geometry import geometry_config
    from .speed import read_trace
    from .synth import write_synthetic

    if (options.routing == "trace") != (options.trace is not None):
        raise UsageError("--routing trace and --trace go together")
    if options.gguf is not None:
        if options.gguf.exists():
            raise UsageError(f"{options.gguf}: exists already")
        options.symmetric, options.group_size = True, 32
    config = geometry_config(options.geometry, options.layers)
    if options.trace is not None:
        read_trace(options.trace, read_config(config, options.geometry))
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(f"writing {options.out}", total=None)

    def progress(done: int, total: int) -> None:
        bar.start()  # only now, so that a mistake is answered by its message alone
        bar.update(task, completed=done, total=total)

    try:
        size = write_synthetic(
            options.out,
            config,
            _policy(options),
            routing=options.routing,
            trace=options.trace,
            gguf=options.gguf,
            seed=options.seed,
            threads=EngineConfig.from_options({}).thread_count,
            progress=progress,
        )
    finally:
        if bar.live.is_started:
            bar.stop()
    print(f"{one_line(str(options.out))}: {format_bytes(size)}")
    return 0


def _add_bench(commands: Any, style: dict[str, Any]) -> None:
    bench = commands.add_parser(
        "bench",
        usage="expertstream bench io|mem|kernels|decode|prefill|cache [OPTIONS] [PATH]",
        help="measure this machine, and the engine on it",
        description=(
            "io PATH        the disk at the engine's own pattern of reads; the best setting is kept for later runs\n"
            "mem            memory bandwidth by number of threads\n"
            "kernels        every instruction set, format and shape against its roofline, and against plain C++\n"
            "decode MODEL   tokens a second by memory budget and context, cold and warm, beside the limits\n"
            "prefill MODEL  the same for prompts\n"
            "cache TRACE    hit rates of every cache policy on a routing trace (see `expertstream trace`), and of the optimum"
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
        "path", nargs="?", type=Path, metavar="PATH", help="a checkpoint folder; for io any folder; for cache a trace"
    )
    bench.add_argument("--threads", type=int, metavar="N", help="threads that compute (as many as the processor has)")
    bench.add_argument(
        "--budgets",
        default="10,25,50,75,100",
        metavar="LIST",
        help="percent of the experts that fit in memory (10,25,50,75,100)",
    )
    bench.add_argument("--contexts", default="1024", metavar="LIST", help="decode: tokens of context (1024)")
    bench.add_argument("--lengths", default="512,2048", metavar="LIST", help="prefill: tokens of the prompt (512,2048)")
    bench.add_argument("--tokens", type=int, default=64, metavar="N", help="decode: tokens that are timed (64)")
    bench.add_argument("--exact", action="store_true", help="decode, prefill: 16-bit activations")
    bench.add_argument(
        "--record", default="1728KiB", metavar="SIZE", help="io: bytes of one expert, where PATH is no pack (1728KiB)"
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
            f"{name} is a list of whole numbers from {least} to {most}, such as {least},{min(most, 4 * least)}, not {text!r}"
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
            raise UsageError(f"give {paths[options.what]}: expertstream bench {options.what} PATH")
        if not options.path.exists():
            raise UsageError(f"{options.path}: no such file or folder")
    elif options.path is not None:
        raise UsageError(f"bench {options.what} takes no path, but {options.path} was given")
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
    from .machine import disk_rates, remember

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
    print(f"kept for this disk: {remember(options.path, rates)}")
    return [vars(rate) for rate in rates]


def _bench_mem(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from .machine import memory_bandwidth, thread_counts

    rows = []
    print(f"{'threads':>7} {'GB/s':>6}")
    for count in thread_counts(threads):
        rows.append({"threads": count, "memory_bytes_per_second": memory_bandwidth(count)})
        print(f"{count:7} {rows[-1]['memory_bytes_per_second'] / 1e9:6.1f}", flush=True)
    return rows


def _bench_kernels(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from .kernels import bench_kernels

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
            "a kernel table gives other bits than plain C++: please report this, with your processor's name"
        )
    return rows


def _shared_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {"threads": options.threads, "exact": options.exact or None}
    return {name: value for name, value in given.items() if value is not None}


def _bench_decode(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from .speed import DECODE_HEADER, bench_decode, describe_decode

    budgets = [value / 100 for value in _numbers(options.budgets, "--budgets", 1, 100)]
    contexts = _numbers(options.contexts, "--contexts", 1, 1 << 20)
    if options.tokens < 1:
        raise UsageError(f"--tokens is at least 1, not {options.tokens}")
    print(DECODE_HEADER)
    return bench_decode(
        options.path,
        budgets,
        contexts,
        options.tokens,
        _shared_options(options),
        lambda row: print(describe_decode(row), flush=True),
        _say_skipped,
    )


def _say_skipped(fraction: float) -> None:
    print(f"{fraction:5.0%} of the experts is more than this machine has memory for: skipped", flush=True)


def _bench_prefill(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from .speed import PREFILL_HEADER, bench_prefill, describe_prefill

    budgets = [value / 100 for value in _numbers(options.budgets, "--budgets", 1, 100)]
    lengths = _numbers(options.lengths, "--lengths", 1, 1 << 20)
    print(PREFILL_HEADER)
    return bench_prefill(
        options.path,
        budgets,
        lengths,
        _shared_options(options),
        lambda row: print(describe_prefill(row), flush=True),
        _say_skipped,
    )


def _bench_cache(options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    from ..config import POLICIES
    from .traces import BELADY, SHARES, hit_rate, load_trace

    trace = load_trace(options.path)
    tokens, layers, top_k = trace.experts.shape
    print(f"{one_line(str(options.path))}: {tokens:,} tokens, {layers} layers, {top_k} of {trace.num_experts} experts")
    names = (*POLICIES, BELADY)
    print(f"{'experts that fit':>16} {'slots a layer':>13} " + " ".join(f"{name:>7}" for name in names))
    rows = []
    for share in SHARES:
        slots = round(share * trace.num_experts)
        if slots < 1:
            continue
        rates = {name: hit_rate(trace, name, slots) for name in names}
        rows.append({"trace": options.path.stem, "share": share, "slots": slots, **rates})
        print(f"{share:16.1%} {slots:13} " + " ".join(f"{rates[name]:7.1%}" for name in names), flush=True)
    return rows


def _add_plan(commands: Any, style: dict[str, Any]) -> None:
    plan = commands.add_parser(
        "plan",
        usage="expertstream plan [OPTIONS] MODEL|GEOMETRY",
        help="say what to expect of a model here, before any download",
        description=(
            "Measures this machine's memory, disk and arithmetic for some seconds, and says from these and the model's sizes\n"
            "what fits, how often experts will be found in memory, and how fast it will be; and what would help most."
        ),
        **style,
    )
    plan.add_argument(
        "model", metavar="MODEL|GEOMETRY", help="a checkpoint folder, a known model (see synth), or a config.json"
    )
    plan.add_argument("--layers", type=int, default=0, metavar="N", help="only the first N layers (all)")
    plan.add_argument(
        "--memory",
        metavar="SIZE",
        action="append",
        help="a budget; may be repeated (a quarter, half, all of what is free)",
    )
    plan.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of context (8192)")
    plan.add_argument(
        "--prompt", type=int, default=2048, metavar="N", help="tokens of the prompt whose time is told (2048)"
    )
    plan.add_argument(
        "--routing",
        choices=("real", "uniform"),
        default="real",
        help="experts chosen as by trained models, or evenly (real)",
    )
    plan.add_argument(
        "--disk", type=Path, default=Path(), metavar="PATH", help="a folder on the disk that will hold the model (here)"
    )
    plan.add_argument("--threads", type=int, metavar="N", help="threads that compute (as many as the processor has)")
    _bits(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(function=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ..machine import available_bytes
    from .machine import arithmetic_peak, disk_rates, memory_bandwidth
    from .plan import Machine, advice, load_model, predict

    threads = EngineConfig.from_options({"threads": options.threads}).thread_count
    if not (1 <= options.context <= 1 << 24 and 1 <= options.prompt <= options.context):
        raise UsageError("--context is at least 1, and --prompt at least 1 and no more than it")
    model = load_model(options.model, options.layers, _policy(options))
    available = available_bytes()
    budgets = [parse_bytes(text) for text in options.memory or ()] or [available // 4, available // 2, available]
    where = Path(options.model) if Path(options.model).is_dir() else options.disk
    rates = disk_rates(where, model.slot_bytes, depths=(16,), splits=(256 << 10,), seconds=2.0)
    machine = Machine(memory_bandwidth(threads), rates[0].bytes_per_second, arithmetic_peak(threads))
    settings = {
        "context": options.context,
        "prompt_tokens": options.prompt,
        "routing": options.routing,
        "threads": threads,
    }
    found = [predict(model, machine, budget, **settings) for budget in budgets]
    if options.json:
        print(
            json.dumps(
                {
                    "model": options.model, "model_bytes": model.model_bytes, "bytes_per_token": model.cost.bytes,
                    "machine": vars(machine), "settings": settings,
                    "predictions": [vars(p) if p is not None else {"budget_bytes": b} for p, b in zip(found, budgets, strict=True)],
                },
                indent=1,
            )
        )  # fmt: skip
        return 0
    print(
        f"{options.model}: {format_bytes(model.model_bytes)}, of which a token touches {format_bytes(model.cost.bytes)} "
        f"(trunk {format_bytes(model.cost.trunk_bytes)}, {model.cost.experts} experts of {format_bytes(model.cost.expert_bytes)})\n"
        f"this machine: memory {machine.memory_rate / 1e9:.1f} GB/s, disk {machine.disk_rate / 1e9:.2f} GB/s, "
        f"{machine.arithmetic_rate / 1e9:.0f} G multiply-adds/s, {format_bytes(available)} available, {threads} threads\n"
    )
    print(
        f"{'memory':>9} {'experts':>8} {'hits':>6} {'disk/token':>10} {'decode':>8} {'prefill':>9} {'first token':>11}  bound by"
    )
    total = model.config.num_hidden_layers * model.config.num_experts
    for budget, p in zip(budgets, found, strict=True):
        if p is None:
            print(f"{format_bytes(budget):>9} is too little for the trunk, the context and one layer's experts")
            continue
        print(
            f"{format_bytes(budget):>9} {min(1, p.slots / total):8.0%} {p.hit_rate:6.0%} {format_bytes(p.missed_bytes):>10} "
            f"{p.decode_tps:6.2f}/s {p.prefill_tps:7.1f}/s {p.ttft_seconds:9.1f} s  {p.bound}"
        )
    helps = [(what, times) for what, times in advice(model, machine, budgets[-1], **settings) if times > 1.05]
    print(
        "\nwhat would help decoding most: "
        + (", ".join(f"{what} ×{times:.2f}" for what, times in helps) or "nothing that money buys")
    )
    return 0


def _add_report(commands: Any, style: dict[str, Any]) -> None:
    report = commands.add_parser(
        "report",
        usage="expertstream report [OPTIONS] FILE [FILE …]",
        help="draw what bench and --profile wrote",
        description=(
            "Draws tokens a second against memory budget with the limits of memory and disk, where each millisecond of a layer\n"
            "goes, which experts were used, and hits over time; as PNG pictures and one HTML page. Needs the package matplotlib."
        ),
        **style,
    )
    report.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="written by `bench decode --json` or `run --profile`"
    )
    report.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="where to write (report)")
    report.set_defaults(function=_report)


def _report(options: argparse.Namespace) -> int:
    from .report import write_report

    for path in write_report(options.files, options.out):
        print(one_line(str(path)))
    return 0
