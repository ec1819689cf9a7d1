"""The convert command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..text.visible import one_line

__all__ = ["add_convert"]


def add_convert(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    convert = commands.add_parser(
        "convert",
        usage="expertstream convert [OPTIONS] SRC DST",
        help="convert a checkpoint to a pack, with one aligned record per expert",
        description=(
            "Writes a pack of the checkpoint SRC to the new folder DST. Needs little memory, and can be stopped at any moment:\n"
            "the same command resumes where it stopped. MLX checkpoints keep their bits exactly."
        ),
        **style,
    )
    convert.add_argument("source", metavar="SRC", type=Path, help="a checkpoint folder")
    convert.add_argument("destination", metavar="DST", type=Path, help="the folder to create")
    convert.add_argument(
        "--bits", type=int, choices=(2, 4, 8, 16), default=4, help="bits per expert weight; 16: not quantized (4)"
    )
    convert.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="values that share a scale (64)"
    )
    convert.add_argument(
        "--trunk-bits",
        type=int,
        choices=(4, 8, 16),
        default=8,
        help="bits per weight of the trunk's matrices; 16: not quantized (8)",
    )
    convert.add_argument(
        "--symmetric", action="store_true", help="store no biases, only scales: 16 bits less per group, but coarser"
    )
    convert.add_argument("--threads", type=int, metavar="N", help="threads that quantize")
    convert.set_defaults(function=_convert)


def _convert(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ..checkpoint.quantize import BitPolicy
    from ..config import EngineConfig
    from ..convert import convert

    threads = EngineConfig.from_options({"threads": options.threads}).thread_count
    policy = BitPolicy(options.bits, options.group_size, options.trunk_bits, options.symmetric)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        bar = Progress(*columns, console=Console(stderr=True))
        task = bar.add_task("converting", total=None)

        def progress(done: int, total: int) -> None:
            bar.start()  # only now, so that no bar precedes an error message
            bar.update(task, completed=done, total=total)

        try:
            convert(options.source, options.destination, policy, threads, progress)
        finally:
            if bar.live.is_started:
                bar.stop()
    except KeyboardInterrupt:
        print("expertstream: interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    print(f"{one_line(str(options.destination))}: done")
    return 0
