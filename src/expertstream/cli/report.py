"""The report command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..text.visible import one_line

__all__ = ["add_report"]


def add_report(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    report = commands.add_parser(
        "report",
        usage="expertstream report [OPTIONS] FILE [FILE …]",
        help="plot the output of bench and --profile",
        description=(
            "Plots tokens per second against memory budget with the limits of memory and disk, the time of a layer by phase,\n"
            "which experts were used, and hit rates; as PNG images and one HTML page. Needs the package matplotlib."
        ),
        **style,
    )
    report.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="output of `bench decode --json` or `run --profile`"
    )
    report.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER", help="output folder (report)")
    report.set_defaults(function=_report)


def _report(options: argparse.Namespace) -> int:
    from ..bench.report import write_report

    for path in write_report(options.files, options.out):
        print(one_line(str(path)))
    return 0
