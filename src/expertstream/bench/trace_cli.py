"""The command trace: records which experts a model chooses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_text
from ..visible import one_line

__all__ = ["add_trace"]

# What is asked where no file of prompts is given: several kinds of text, since each wakes other experts.
PROMPTS = (
    "Tell me a short story about a rabbit and a lost key.", "What is the capital of Japan?", "What is 12 plus 7?",
    "Explain in simple words why the sky is blue.", "How do I make a cup of tea?", "Name three animals that can swim.",
    "What does the word \"brave\" mean?", "I am sad today.", "Write a story about a boy who is afraid of the dark.",
    "Who are you, and what can you do?", "What is the opposite of early?", "Tell me about the moon.",
)  # fmt: skip


def add_trace(commands: Any, style: dict[str, Any]) -> None:
    """Adds trace to the command line's subcommands."""
    trace = commands.add_parser(
        "trace",
        usage="expertstream trace [OPTIONS] MODEL FILE",
        help="record which experts a model chooses",
        description=(
            "Runs prompts through MODEL and writes which experts its routers chose, for every token read and written, to FILE\n"
            "(an .npz; docs/cache-policies.md says what is in it). `bench cache FILE` replays it through the cache policies,\n"
            "`synth --routing trace` makes a synthetic model follow it."
        ),
        **style,
    )
    trace.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    trace.add_argument("file", metavar="FILE", type=Path, help="the .npz to write")
    trace.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt a line (a dozen of our own)")
    trace.add_argument("--plain", action="store_true", help="prompts are texts to continue, not messages of a chat")
    trace.add_argument("--max-tokens", type=int, default=128, metavar="N", help="written after each prompt (128)")
    trace.add_argument("--seed", type=int, default=1, metavar="N", help="of the first prompt's sampling (1)")
    trace.add_argument("--memory", metavar="SIZE", help="memory budget, such as 8GiB (90 %% of what is available)")
    trace.set_defaults(function=_trace)


def _trace(options: argparse.Namespace) -> int:
    from .traces import record, save_trace

    prompts = list(PROMPTS)
    if options.prompts is not None:
        try:
            lines = read_text(options.prompts).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{options.prompts}: cannot be read: {error}") from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"{options.prompts}: no prompt in it")
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens is at least 1, not {options.max_tokens}")
    if options.file.suffix != ".npz" or options.file.is_dir() or not options.file.absolute().parent.is_dir():
        raise UsageError(f"{options.file}: a trace is a file whose name ends in .npz, in a folder that exists")
    there_before = options.file.exists()
    try:
        options.file.open("ab").close()  # told now, and not when everything has run
    except OSError as error:
        raise UsageError(f"{options.file}: cannot be written: {error.strerror}") from None
    try:
        trace = record(options.model, prompts, not options.plain, options.max_tokens, options.seed, options.memory)
    except BaseException:
        if not there_before:
            options.file.unlink()
        raise
    save_trace(options.file, trace)
    tokens, layers, top_k = trace.experts.shape
    what = f"{len(trace.starts)} texts, {tokens:,} tokens, {layers} layers, {top_k} of {trace.num_experts} experts"
    print(f"{one_line(str(options.file))}: {what}")
    return 0
