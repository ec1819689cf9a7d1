"""The trace command: records which experts a model selects."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_text
from ..text.visible import one_line

__all__ = ["add_trace"]

# Used if no file of prompts is given: several kinds of text, since each activates different experts.
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
        help="record which experts a model selects",
        description=(
            "Runs prompts through MODEL and writes the experts selected for every token, read or generated, to FILE (an .npz;\n"
            "see docs/cache-policies.md). `bench cache FILE` replays it through the cache policies, `synth --routing trace`\n"
            "makes a synthetic model follow it."
        ),
        **style,
    )
    trace.add_argument("model", metavar="MODEL", type=Path, help="a checkpoint folder")
    trace.add_argument("file", metavar="FILE", type=Path, help="the .npz to write")
    trace.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt per line (a dozen built-in prompts)")
    trace.add_argument(
        "--plain", action="store_true", help="continue prompts as text instead of answering them as chat messages"
    )
    trace.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="tokens to generate after each prompt (128)"
    )
    trace.add_argument("--seed", type=int, default=1, metavar="N", help="sampling seed of the first prompt (1)")
    trace.add_argument("--memory", metavar="SIZE", help="memory budget, such as 8GiB (90 %% of what is available)")
    trace.set_defaults(function=_trace)


def _trace(options: argparse.Namespace) -> int:
    from ..bench.traces import record, save_trace

    prompts = list(PROMPTS)
    if options.prompts is not None:
        try:
            lines = read_text(options.prompts).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{options.prompts}: cannot be read: {error}") from None
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UsageError(f"{options.prompts}: contains no prompts; write one per line")
    if options.max_tokens < 1:
        raise UsageError(f"--max-tokens must be at least 1; got {options.max_tokens}")
    if options.file.suffix != ".npz" or options.file.is_dir() or not options.file.absolute().parent.is_dir():
        raise UsageError(f"{options.file}: a trace must be an .npz file in an existing folder")
    there_before = options.file.exists()
    try:
        options.file.open("ab").close()  # fail now, not after the run
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
    what = f"{len(trace.starts)} sequences, {tokens:,} tokens, {layers} layers, {top_k} of {trace.num_experts} experts"
    print(f"{one_line(str(options.file))}: {what}")
    return 0
