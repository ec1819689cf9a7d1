"""The run command."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExpertStreamError, RequestError, UsageError
from ..text.visible import one_line, visible
from ..units import format_bytes
from .options import ENGINE_OPTIONS, SAMPLING_OPTIONS, add_engine_options, as_options

if TYPE_CHECKING:
    from ..engine import LLM
    from ..responses import GenerationResponse, GenerationStats
    from ..sampling import SamplingParams
    from ..text.control import ChatPrompt

__all__ = ["add_run"]

ENVIRONMENT = "environment:\n  EXPERTSTREAM_ISA, EXPERTSTREAM_THREADS   same as --isa, --threads\n\n"


def add_run(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    run = commands.add_parser(
        "run",
        usage="expertstream run [OPTIONS] [MODEL] PROMPT",
        help="generate text from a prompt",
        description="Continues a prompt, or answers it with --chat. Without MODEL, the small embedded model runs.",
        **{**style, "epilog": ENVIRONMENT + style["epilog"]},
    )
    run.add_argument(
        "arguments",
        nargs="*",
        metavar="[MODEL] PROMPT",
        help="a checkpoint folder, and the prompt; - reads it from standard input; after -- it may begin with a dash",
    )
    run.add_argument("--chat", action="store_true", help="answer, using the checkpoint's chat template")
    run.add_argument("--system", metavar="TEXT", help="a system prompt (with --chat)")
    run.add_argument("--json", action="store_true", help="print one JSON object with text, tokens and counters")
    run.add_argument("--stats", action="store_true", help="print the counters of every layer at the end")
    run.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="show where the time went, and write a Chrome trace for `report`",
    )
    run.add_argument("--quiet", action="store_true", help="print only the text")
    sampling = run.add_argument_group(
        "sampling (defaults: the checkpoint's generation_config.json, else the most likely token)"
    )
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens (512)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    sampling.add_argument("--top-k", type=int, metavar="N", help="sample from the N most likely tokens (0: all)")
    sampling.add_argument(
        "--top-p", type=float, metavar="X", help="sample from the fewest tokens with total probability X"
    )
    sampling.add_argument(
        "--min-p", type=float, metavar="X", help="sample from tokens at least X times as likely as the likeliest"
    )
    sampling.add_argument("--repetition-penalty", type=float, metavar="X", help="for every token seen (1: none)")
    sampling.add_argument("--presence-penalty", type=float, metavar="X", help="for every token in the answer (0: none)")
    sampling.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="for each occurrence of a token in the answer (0: none)"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text")
    sampling.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities with N alternatives (needs --json)"
    )
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    add_engine_options(run)
    run.set_defaults(function=_run)


def _run(options: argparse.Namespace) -> int:
    from ..engine import LLM
    from ..sampling import SamplingParams

    model, prompt = _model_and_prompt(options.arguments)
    if options.system is not None and not options.chat:
        raise UsageError("--system needs --chat")
    if options.logprobs is not None and not options.json:
        raise UsageError("--logprobs needs --json")
    if not prompt:
        raise RequestError("the prompt is empty")
    given = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
    SamplingParams.from_options({}, "", **given)  # an invalid option is reported before a model is loaded
    profiler = None
    if options.profile is not None:
        from ..bench.profile import Profiler

        if options.profile.is_dir() or not options.profile.absolute().parent.is_dir():
            raise UsageError(f"{options.profile}: must be a file in an existing folder")
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
            raise RequestError("the prompt is to be read from standard input, which is closed")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"the prompt is not valid UTF-8: byte {error.start} of standard input") from None
    elif any("\udc80" <= c <= "\udcff" for c in prompt):  # how Python represents bytes that are not UTF-8
        raise RequestError("the prompt is not valid UTF-8")
    return model, prompt


def _stream(llm: LLM, prompt: str | ChatPrompt, params: SamplingParams, options: argparse.Namespace) -> int:
    """Generates and prints; if that is interrupted, still prints the text so far and its counters."""
    pieces: list[GenerationResponse] = []
    ended: str | None = None  # why it ended early
    code = 0
    tokens = llm.tokenizer.encode(prompt, llm.context_length - 1)
    progress = None
    if sys.stderr.isatty() and not (options.quiet or options.json):
        progress = _PromptProgress(int(tokens.shape[0]))
    shown = visible if sys.stdout.isatty() else str  # a terminal would obey control characters in the text
    try:
        pieces_of = (
            llm.session().generate(tokens, params, progress)
            if isinstance(prompt, str)
            else llm.answer(prompt, params, progress)
        )
        for response in pieces_of:
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
        # json.dumps leaves DEL and the control characters beyond ASCII unescaped.
        print(re.sub(r"[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text))
        return code
    print()
    if pieces and not options.quiet:
        _print_stats(llm, pieces[-1].stats, options.stats)
    if ended is not None:
        print(f"expertstream: {one_line(as_options(ended))}", file=sys.stderr)
    return code


class _PromptProgress:
    """Shows in a terminal how much of a long prompt has been read; cleared at the end."""

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
        "memory": {**vars(llm.plan), "cached_slots_now": llm.experts.tier.cached},
        "reader": {
            "name": llm.reader_name,
            "o_direct": llm.experts.store.direct,
            "registered_buffers": llm.experts.link.reader.registered_buffers,
            "huge_pages": llm.experts.link.arena.huge_pages,
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
    tier = llm.experts.tier
    if tier.cached < tier.planned:
        parts.append(f"memory was needed elsewhere: {tier.cached} of {tier.planned} cached slots remain")
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
