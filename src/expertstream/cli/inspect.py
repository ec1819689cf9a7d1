"""The inspect command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add_inspect"]


def add_inspect(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    inspect = commands.add_parser(
        "inspect",
        usage="expertstream inspect [OPTIONS] [PATH]",
        help="describe a checkpoint and how much of it fits this machine",
        description="Reads the headers of a checkpoint: architecture, parameters, bits, bytes, and what fits in memory.",
        **style,
    )
    inspect.add_argument("path", metavar="PATH", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(function=_inspect)


def _inspect(options: argparse.Namespace) -> int:
    from ..engine import embedded_model
    from ..summary import summarize, summary_text

    summary = summarize(options.path or embedded_model())
    print(json.dumps(summary, indent=1) if options.json else summary_text(summary))
    return 0
