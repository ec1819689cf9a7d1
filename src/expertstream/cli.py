"""The command line: parses, calls, prints. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .bench.cli import add_commands
from .chat.cli import add_chat
from .config import format_bytes
from .errors import BudgetError, ExpertStreamError, RequestError, UsageError
from .options import ENGINE_OPTIONS, add_engine_options
from .server.cli import add_serve
from .visible import LineFormatter, one_line, visible

if TYPE_CHECKING:
    from .engine import LLM
    from .responses import GenerationResponse, GenerationStats
    from .sampling import SamplingParams
    from .text.control import ChatPrompt

__all__ = ["build_parser", "main"]

LEAST_ADDRESS_SPACE = 192 << 20
EXIT_CODES = """\
exit codes:
  0 done   1 output that could not be written   2 wrong arguments   3 a checkpoint that cannot be used
  4 a read that failed   5 not enough memory   6 a prompt or request that cannot be run
  7 a conversion that could not be done   130 interrupted (Ctrl-C)   141 the reader of the output went away"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Intermixed(_Parser):
    """Takes options between positional arguments too: run MODEL --memory 8GiB PROMPT."""

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
    """The whole command line; docs/cli.md is made from it."""
    from . import __version__

    parser = _Parser(
        prog="expertstream",
        description="Runs Mixture-of-Experts language models that are larger than memory, streaming their experts from the SSD.",
        epilog=EXIT_CODES,
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"expertstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Intermixed)
    _add_run(commands)
    _add_convert(commands)
    _add_inspect(commands)
    add_commands(commands, _formatter, EXIT_CODES)
    style = {"formatter_class": _formatter, "epilog": EXIT_CODES}
    add_chat(commands, style)
    add_serve(commands, style)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        usage="expertstream run [OPTIONS] [MODEL] PROMPT",
        help="generate text from a prompt",
        description="Continues a prompt, or with --chat answers it. With no MODEL the small embedded model runs.",
        epilog="environment:\n  EXPERTSTREAM_ISA, EXPERTSTREAM_THREADS   as --isa, --threads\n\n" + EXIT_CODES,
        formatter_class=_formatter,
    )
    run.add_argument(
        "arguments",
        nargs="*",
        metavar="[MODEL] PROMPT",
        help="a checkpoint folder, and the prompt; - reads it from standard input; after -- it may begin with a dash",
    )
    run.add_argument("--chat", action="store_true", help="answer by the checkpoint's chat template")
    run.add_argument("--system", metavar="TEXT", help="a system prompt (with --chat)")
    run.add_argument("--json", action="store_true", help="print one JSON object with text, tokens and counters")
    run.add_argument("--stats", action="store_true", help="print the counters of every layer at the end")
    run.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="say where the time went, and write it as a Chrome trace for `report`",
    )
    run.add_argument("--quiet", action="store_true", help="print the text alone")
    sampling = run.add_argument_group(
        "sampling (defaults: the checkpoint's generation_config.json, else the most likely token)"
    )
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens (512)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    sampling.add_argument("--top-k", type=int, metavar="N", help="draw among the N most likely (0: all)")
    sampling.add_argument(
        "--top-p", type=float, metavar="X", help="draw among the fewest that together have probability X"
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="X", help="draw among those at least X times as likely as the likeliest"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="of every token seen (1: none)")
    sampling.add_argument("--presence-penalty", type=float, metavar="X", help="of every token in the answer (0: none)")
    sampling.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="for each time a token is in the answer (0: none)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities, with N alternatives (with --json)"
    )
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    add_engine_options(run)
    run.set_defaults(function=_run)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        usage="expertstream convert [OPTIONS] SRC DST",
        help="make a pack: one aligned record an expert",
        description=(
            "Writes a pack of the checkpoint SRC to the new folder DST. Needs little memory, and can be stopped at any moment:\n"
            "the same command goes on where it stopped. MLX checkpoints keep their bits exactly."
        ),
        epilog=EXIT_CODES,
        formatter_class=_formatter,
    )
    convert.add_argument("source", metavar="SRC", type=Path, help="a checkpoint folder")
    convert.add_argument("destination", metavar="DST", type=Path, help="a folder to be made")
    convert.add_argument(
        "--bits", type=int, choices=(2, 4, 8, 16), default=4, help="of the experts; 16 leaves them (4)"
    )
    convert.add_argument(
        "--group-size", type=int, choices=(32, 64, 128), default=64, help="values that share a scale (64)"
    )
    convert.add_argument(
        "--trunk-bits", type=int, choices=(4, 8, 16), default=8, help="of the trunk's matrices; 16 leaves them (8)"
    )
    convert.add_argument(
        "--symmetric", action="store_true", help="no bias beside each scale: 16 bits less a group, coarser"
    )
    convert.add_argument("--threads", type=int, metavar="N", help="threads that quantize")
    convert.set_defaults(function=_convert)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        usage="expertstream inspect [OPTIONS] [PATH]",
        help="say what a checkpoint is and what of it fits this machine",
        description="Reads the headers of a checkpoint: architecture, parameters, bits, bytes, and what fits in memory.",
        epilog=EXIT_CODES,
        formatter_class=_formatter,
    )
    inspect.add_argument("path", metavar="PATH", type=Path, nargs="?", help="a checkpoint folder (the embedded model)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(function=_inspect)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Every error that is the user's to mend is one line on standard error."""
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
        print(f"expertstream: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("expertstream: not enough memory; is there a limit on it (ulimit -v)?", file=sys.stderr)
        return BudgetError.exit_code
    except KeyboardInterrupt:
        print("expertstream: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; nothing is left to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        print(f"expertstream: {one_line(str(error.filename or 'standard output'))}: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that closing it does not fail once more
        return 1
    except (RuntimeError, ImportError) as error:
        # Of a thread that cannot be started, and of a library that cannot be mapped, only the text says what it is.
        if "start new thread" in str(error):
            print(
                "expertstream: a thread cannot be started; is there a limit on processes (ulimit -u)?", file=sys.stderr
            )
        elif "failed to map" in str(error) or "allocate memory" in str(error):
            print(
                "expertstream: not enough memory to load a library; is there a limit on it (ulimit -v)?",
                file=sys.stderr,
            )
        else:
            raise
        return BudgetError.exit_code


def _check_address_space() -> None:
    """NumPy's library ends the process where it finds no memory when it is loaded; this says so before. Raises BudgetError."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise BudgetError(
            f"the limit on address space (ulimit -v) is {format_bytes(limit)}; at least {format_bytes(LEAST_ADDRESS_SPACE)} are needed"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options may stand anywhere; what follows "--" is a prompt (or a folder and a prompt), dashes and all."""
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


_SAMPLING_OPTIONS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logprobs", "stop",
)  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    from .engine import LLM
    from .sampling import SamplingParams

    model, prompt = _model_and_prompt(options.arguments)
    if options.system is not None and not options.chat:
        raise UsageError("--system needs --chat")
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs needs --json")
    if not prompt:
        raise RequestError("the prompt is empty")
    given = {name: getattr(options, name) for name in _SAMPLING_OPTIONS}
    SamplingParams.from_options({}, "", **given)  # a wrong option is told before a model is loaded
    profiler = None
    if options.profile is not None:
        from .bench.profile import Profiler

        if options.profile.is_dir() or not options.profile.absolute().parent.is_dir():
            raise UsageError(f"{options.profile}: give a file in a folder that exists")
        profiler = Profiler()
    instrument = profiler.instrument if profiler is not None else None
    with LLM(model, instrument=instrument, **{name: getattr(options, name) for name in ENGINE_OPTIONS}) as llm:
        if profiler is not None:
            profiler.watch(llm)
        if not (options.quiet or options.json):
            print(f"[{llm.describe()}]", file=sys.stderr)
        rendered: str | ChatPrompt = prompt
        if options.chat:
            messages = [{"role": "system", "content": options.system}] if options.system is not None else []
            rendered = llm.tokenizer.chat_prompt([*messages, {"role": "user", "content": prompt}])
        code = _stream(llm, rendered, llm.sampling_params(**given), options)
        if profiler is not None:
            profiler.save(options.profile)
            print(profiler.table(), file=sys.stderr)
        return code


def _model_and_prompt(arguments: list[str]) -> tuple[str | None, str]:
    """[MODEL] PROMPT; "-" for a prompt is standard input."""
    if not 1 <= len(arguments) <= 2:
        raise UsageError('give a prompt, or a checkpoint folder and a prompt: expertstream run [MODEL] "PROMPT"')
    model, prompt = (None, arguments[0]) if len(arguments) == 1 else (arguments[0], arguments[1])
    if model is None and os.path.isfile(os.path.join(prompt, "config.json")):
        raise UsageError(f"{prompt} is a checkpoint folder; give a prompt after it")
    if prompt == "-":
        if sys.stdin is None:
            raise RequestError("the prompt should come from standard input, which is closed")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt is not valid UTF-8: byte {error.start} of standard input") from None
    elif any("\udc80" <= c <= "\udcff" for c in prompt):  # how Python passes on bytes that are not UTF-8
        raise RequestError("the prompt is not valid UTF-8")
    return model, prompt


def _stream(llm: LLM, prompt: str | ChatPrompt, params: SamplingParams, options: argparse.Namespace) -> int:
    """Generates and prints. Whatever ends it, the text so far and its counters come out."""
    pieces: list[GenerationResponse] = []
    ended: str | None = None  # why it ended early
    code = 0
    tokens = llm.tokenizer.encode(prompt, llm.context_length - 1)
    progress = None
    if sys.stderr.isatty() and not (options.quiet or options.json):
        progress = _PromptProgress(int(tokens.shape[0]))
    shown = visible if sys.stdout.isatty() else str  # a terminal would obey some of what a model may say
    try:
        for response in llm.session().generate(tokens, params, progress):
            pieces.append(response)
            if not options.json:
                print(shown(response.text), end="", flush=True)
    except KeyboardInterrupt:
        ended, code = "interrupted", 130
    except ExpertStreamError as error:
        if not (pieces or options.json):
            raise
        ended, code = str(error), error.exit_code
    if options.json:
        text = json.dumps(_as_json(llm, prompt, pieces, ended), ensure_ascii=False)
        # JSON's own escapes leave the control characters beyond ASCII as they are.
        print(re.sub(r"[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text))
        return code
    print()
    if pieces and not options.quiet:
        _print_stats(llm, pieces[-1].stats, options.stats)
    if ended is not None:
        print(f"expertstream: {one_line(ended)}", file=sys.stderr)
    return code


class _PromptProgress:
    """Tells a person at a terminal how much of a long prompt has been read; gone when it is."""

    def __init__(self, total: int) -> None:
        self.total = total

    def __call__(self, done: int) -> None:
        text = f"reading the prompt: {done:,} of {self.total:,} tokens" if done < self.total else ""
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _as_json(llm: LLM, prompt: str | ChatPrompt, pieces: list[GenerationResponse], ended: str | None) -> dict[str, Any]:
    logprobs = [p.logprob for p in pieces if p.logprob is not None]
    return {
        "model": str(llm.path),
        "prompt": prompt if isinstance(prompt, str) else prompt.text,
        "text": "".join(p.text for p in pieces),
        "tokens": [p.token for p in pieces],
        "finish_reason": pieces[-1].finish_reason if pieces else None,
        "error": ended,
        "logprobs": [{"token": p.token, "logprob": p.logprob, "top_logprobs": p.top_logprobs} for p in logprobs]
        if logprobs
        else None,
        "stats": pieces[-1].stats.to_json() if pieces else None,
        "memory": {**vars(llm.plan), "cached_slots_now": llm.experts.cached},
        "reader": {
            "name": llm.reader_name,
            "o_direct": llm.experts.store.direct,
            "registered_buffers": llm.experts.reader.registered_buffers,
            "huge_pages": llm.experts.arena.huge_pages,
        },
    }


def _print_stats(llm: LLM, stats: GenerationStats, per_layer: bool) -> None:
    e = stats.decode_experts
    parts = [
        f"prompt {stats.prompt_tokens} tokens in {stats.ttft_seconds:.2f} s ({stats.prefill_tps:.1f} tokens/s)",
        f"generated {stats.generated_tokens} ({stats.decode_tps:.1f} tokens/s)",
        f"hit rate {e.hit_rate:.1%} ({e.hits} hits, {e.misses} misses, {e.evictions} evictions)",
        f"read {format_bytes(stats.prefill_experts.bytes_read)} + {format_bytes(e.bytes_read)}, up to {e.max_in_flight} reads in flight",
        f"waited {e.stall_seconds:.2f} s",
        f"seed {stats.seed}",
    ]
    if llm.experts.cached < llm.experts.planned:
        parts.append(
            f"memory was needed elsewhere: {llm.experts.cached} of {llm.experts.planned} cached slots are left"
        )
    if stats.lossy:
        parts.append(f"LOSSY: {stats.lossy}")
    out = sys.stderr
    print(f"[{'; '.join(parts)}]", file=out)
    if per_layer:
        print("layer     hits   misses  evictions   bytes read   waited s   in flight", file=out)
        for i, c in enumerate(stats.layers):
            print(
                f"{i:5} {c.hits:8} {c.misses:8} {c.evictions:10} {format_bytes(c.bytes_read):>12} "
                f"{c.stall_seconds:10.3f} {c.max_in_flight:11}",
                file=out,
            )


def _convert(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from .checkpoint.quantize import BitPolicy
    from .config import EngineConfig
    from .convert import convert

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
            bar.start()  # only now, so that a mistake is answered by its message alone
            bar.update(task, completed=done, total=total)

        try:
            convert(options.source, options.destination, policy, threads, progress)
        finally:
            if bar.live.is_started:
                bar.stop()
    except KeyboardInterrupt:
        print("expertstream: interrupted; the same command goes on where this stopped", file=sys.stderr)
        return 130
    print(f"{one_line(str(options.destination))}: done")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .engine import embedded_model
    from .summary import summarize, summary_text

    summary = summarize(options.path or embedded_model())
    print(json.dumps(summary, indent=1) if options.json else summary_text(summary))
    return 0
