"""Time to first token of a chat's second turn, with and without reuse of the first turn's states.

    python -m benchmarks.second_turn [MODEL] [--memory SIZE] [--tokens N] [--rounds N]

The first turn: a system prompt of about N tokens, a question, an answer of 40 tokens. The second: one more question. Each round runs
both turns with a prefix cache (in memory, and read from disk by an engine that has just started), then the second turn without one.
Writes benchmarks/results/second_turn.csv, one row per round; compare the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from expertstream import LLM
from expertstream.ops import I64

from .rows import append_rows

RESULTS = Path(__file__).parent / "results" / "second_turn.csv"


def prompt_of(llm: LLM, length: int, turns: int) -> I64:
    """A conversation of random words in the form of a chat, as tokens, up to the question of a turn."""
    r = np.random.default_rng(7)
    start = llm.tokenizer.encode("<|im_start|>")
    filler = [t for t in range(300, 1200) if t not in set(start.tolist())]
    parts: list[Any] = []
    for size in [length] + [30, 40] * (turns - 1) + [30]:
        parts += [start, r.choice(filler, size)]
    return np.concatenate([*parts, start, llm.tokenizer.encode("assistant\n")])


def ttft(llm: LLM, tokens: I64) -> tuple[float, int]:
    *_, last = llm.session().generate(tokens, llm.sampling_params(temperature=0.0, max_tokens=2))
    return last.stats.ttft_seconds, last.stats.cached_tokens


def measure(model: Path | None, memory: str | None, length: int, rounds: int) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"context_length": length + 512, "memory": memory}
    rows = []
    for i in range(rounds):
        row: dict[str, Any] = {"round": i}
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            with LLM(model, device="cpu", prefix_cache_bytes=256 << 20, **options) as llm:
                row |= {"model": llm.path.name, "memory_bytes": llm.plan.budget_bytes}
                llm.keep_prefixes(Path(folder), 4 << 30)
                first, second = prompt_of(llm, length, 1), prompt_of(llm, length, 2)
                row["first_turn_tokens"], row["second_turn_tokens"] = len(first), len(second)
                row["first_turn_s"], _ = ttft(llm, first)
                row["second_turn_reused_s"], row["reused_tokens"] = ttft(llm, second)
            with LLM(model, device="cpu", prefix_cache_bytes=256 << 20, **options) as llm:
                llm.keep_prefixes(Path(folder), 4 << 30)
                llm.model(np.arange(300, 310), llm.session().cache)  # warm up, as in the run without a cache
                row["restarted_s"], row["restarted_reused_tokens"] = ttft(llm, second)
        with LLM(model, device="cpu", **options) as llm:
            llm.model(np.arange(300, 310), llm.session().cache)
            row["second_turn_anew_s"], _ = ttft(llm, second)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--memory")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = measure(args.model, args.memory, args.tokens, args.rounds)
    append_rows(RESULTS, rows)
    for name in ("second_turn_anew_s", "second_turn_reused_s", "restarted_s"):
        print(f"{name}: median {statistics.median(r[name] for r in rows):.3f}")


if __name__ == "__main__":
    main()
