"""The synth command, and the quantization options that it shares with plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import UsageError
from ..text.visible import one_line
from ..units import format_bytes

__all__ = ["add_quantization", "add_synth", "policy_of"]


def add_synth(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    synth = commands.add_parser(
        "synth",
        usage="expertstream synth [OPTIONS] GEOMETRY OUT",
        help="write a checkpoint with a model's sizes and random weights, for benchmarks",
        description=(
            "Writes a pack with the sizes of a known model (qwen3.8-2.4t-a95b, qwen3.5-397b-a17b, qwen3.5-122b-a10b,\n"
            "qwen3.6-35b-a3b, qwen3.5-35b-a3b, qwen3-next-80b, qwen3-235b-a22b, qwen3-30b-a3b, gpt-oss-120b, gpt-oss-20b,\n"
            "small; a unique part of a name is enough) or of a config.json, and random weights, so that a machine can be\n"
            "measured before the real model is downloaded. Its output is meaningless."
        ),
        **style,
    )
    synth.add_argument("geometry", metavar="GEOMETRY", help="a known model, a config.json, or a folder with one")
    synth.add_argument("out", metavar="OUT", type=Path, help="the folder to create")
    synth.add_argument("--layers", type=int, default=0, metavar="N", help="only the first N layers (all)")
    add_quantization(synth)
    synth.add_argument(
        "--routing", choices=("uniform", "zipf", "trace"), default="uniform",
        help="experts used equally often, some far more than others, or following a recorded trace (uniform)",
    )  # fmt: skip
    synth.add_argument(
        "--trace", type=Path, metavar="FILE", help="with --routing trace: an .npz with experts (tokens, layers, top-k)"
    )
    synth.add_argument(
        "--gguf", type=Path, metavar="FILE",
        help="also write the same values as GGUF, for llama.cpp; implies --symmetric --group-size 32; needs the package gguf",
    )  # fmt: skip
    synth.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed gives the same weights (0)")
    synth.set_defaults(function=_synth)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds the options for quantization, as in convert."""
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4, help="bits per expert weight (4)")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="values that share a scale (64)"
    )
    parser.add_argument(
        "--trunk-bits", type=int, choices=(4, 8, 16), default=8, help="bits per weight of the trunk's matrices (8)"
    )
    parser.add_argument("--symmetric", action="store_true", help="store no biases, only scales")


def policy_of(options: argparse.Namespace) -> Any:
    """The BitPolicy of these options."""
    from ..checkpoint.quantize import BitPolicy

    return BitPolicy(options.bits, options.group_size, options.trunk_bits, options.symmetric)


def _synth(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.geometry import geometry_config
    from ..bench.speed import read_trace
    from ..bench.synth import write_synthetic
    from ..models import read_config

    if (options.routing == "trace") != (options.trace is not None):
        raise UsageError("--routing trace and --trace FILE must be given together")
    if options.gguf is not None:
        if options.gguf.exists():
            raise UsageError(f"{options.gguf}: already exists; choose another name or remove it")
        options.symmetric, options.group_size = True, 32
    config = geometry_config(options.geometry, options.layers)
    if options.trace is not None:
        read_trace(options.trace, read_config(config, options.geometry))
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(f"writing {options.out}", total=None)

    def progress(done: int, total: int) -> None:
        bar.start()  # only now, so that no bar precedes an error message
        bar.update(task, completed=done, total=total)

    try:
        size = write_synthetic(
            options.out,
            config,
            policy_of(options),
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
