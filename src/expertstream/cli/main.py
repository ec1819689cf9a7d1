"""Parses the command line, runs a command, prints errors. Commands import what they need when they run."""

from __future__ import annotations

import argparse
import io
import logging
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import BudgetError, ExpertStreamError, UsageError
from ..text.visible import LineFormatter, one_line
from ..units import format_bytes
from .bench import add_bench
from .chat import add_chat
from .convert import add_convert
from .inspect import add_inspect
from .options import as_options
from .plan import add_plan
from .report import add_report
from .run import add_run
from .serve import add_serve
from .synth import add_synth
from .trace import add_trace

__all__ = ["build_parser", "main"]

LEAST_ADDRESS_SPACE = 192 << 20
EXIT_CODES = """\
exit codes:
  0 success   1 output could not be written   2 invalid arguments   3 unusable checkpoint   4 read error
  5 not enough memory   6 invalid prompt or request   7 conversion failed   8 GPU failed or unusable
  130 interrupted (Ctrl-C)   141 the output was closed by its reader"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Intermixed(_Parser):
    """Accepts options between positional arguments: run MODEL --memory 8GiB PROMPT."""

    _inside = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._inside:
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=100)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; docs/cli.md is generated from it."""
    from .. import __version__

    parser = _Parser(
        prog="expertstream",
        description="Runs Mixture-of-Experts language models that are larger than memory, streaming their experts from the SSD.",
        epilog=EXIT_CODES,
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"expertstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Intermixed)
    style = {"formatter_class": _formatter, "epilog": EXIT_CODES}
    for add in (
        add_run, add_convert, add_inspect, add_synth, add_bench, add_plan, add_report, add_trace, add_chat, add_serve,
    ):  # fmt: skip
        add(commands, style)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. An expected error is reported in one line on standard error."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(encoding="utf-8", errors="replace")
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        _check_address_space()
        code = int(options.function(options))
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ExpertStreamError as error:
        print(f"expertstream: {one_line(as_options(str(error)))}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("expertstream: not enough memory; check the limit set by ulimit -v", file=sys.stderr)
        return BudgetError.exit_code
    except KeyboardInterrupt:
        print("expertstream: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader closed our output, as `head` does, so there is nowhere to report it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        print(f"expertstream: {one_line(str(error.filename or 'standard output'))}: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that closing it does not fail again
        return 1
    except (RuntimeError, ImportError) as error:
        # Only the text identifies a thread that cannot be started or a library that cannot be mapped.
        if "start new thread" in str(error):
            print("expertstream: a thread cannot be started; check the limit on processes (ulimit -u)", file=sys.stderr)
        elif "failed to map" in str(error) or "allocate memory" in str(error):
            print(
                "expertstream: not enough memory to load a library; check the limit set by ulimit -v",
                file=sys.stderr,
            )
        else:
            raise
        return BudgetError.exit_code


def _check_address_space() -> None:
    """OpenBLAS ends the process if it finds no memory when it is loaded, so this checks first. Raises BudgetError."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise BudgetError(
            f"the limit on address space (ulimit -v) is {format_bytes(limit)}; it must be at least {format_bytes(LEAST_ADDRESS_SPACE)}"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options may appear anywhere; what follows "--" is a prompt, or a folder and a prompt, even with leading dashes."""
    rest: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, rest = arguments[:at], arguments[at + 1 :]
    options, unknown = build_parser().parse_known_args(arguments)
    if options.command == "run":
        options.arguments += rest
    else:
        unknown += rest
    if unknown:
        raise UsageError(f"unrecognized arguments: {' '.join(unknown)} (see expertstream {options.command} --help)")
    return options
