"""Decoding several sequences in a batch compared with one after another: what a server gains from batching.

    python -m benchmarks.together [MODEL] [--memory SIZE] [--rounds N] [--texts 2 4 8]

Tokens are random, so that routing is as spread out as possible: real texts share more experts. Each round measures both ways, from the
same caches, and checks that the logits are bit-identical. Writes benchmarks/results/together.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from expertstream import LLM
from expertstream.batch import Batch
from expertstream.kv_cache import KVCache

from .rows import append_rows

RESULTS = Path(__file__).parent / "results" / "together.csv"
STEPS = 12


def caches_of(llm: LLM, texts: int) -> list[KVCache]:
    r = np.random.default_rng(3)
    found = []
    for i in range(texts):
        cache = llm.session().cache
        llm.model(r.integers(3, llm.model_config.vocab_size - 50, 40 + 7 * i), cache, prompt=True)
        found.append(cache)
    return found


def measure(llm: LLM, texts: int) -> tuple[float, float]:
    """Tokens per second of all sequences: one after another, together."""
    tokens = np.random.default_rng(4).integers(3, llm.model_config.vocab_size - 50, (STEPS, texts))
    apart, caches = [], caches_of(llm, texts)
    begin = time.perf_counter()
    for row in tokens:
        apart.append([llm.model(row[i : i + 1], caches[i])[0] for i in range(texts)])
    middle = time.perf_counter()
    caches = caches_of(llm, texts)
    start = time.perf_counter()
    for row, expected in zip(tokens, apart, strict=True):
        assert np.array_equal(llm.model.forward(Batch(row, caches)), np.stack(expected))
    end = time.perf_counter()
    return STEPS * texts / (middle - begin), STEPS * texts / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with LLM(args.model, device="cpu", context_length=512, memory=args.memory) as llm:
        print(llm.describe(), flush=True)
        caches_of(llm, 1)
        for i in range(args.rounds):
            for texts in args.texts:
                apart, together = measure(llm, texts)
                rows.append({
                    "model": llm.path.name, "memory_bytes": llm.plan.budget_bytes, "round": i, "texts": texts,
                    "apart_tokens_per_s": round(apart, 2), "together_tokens_per_s": round(together, 2),
                })  # fmt: skip
                print(rows[-1], flush=True)
    append_rows(RESULTS, rows)
    for texts in args.texts:
        ratios = [r["together_tokens_per_s"] / r["apart_tokens_per_s"] for r in rows if r["texts"] == texts]
        print(f"{texts} sequences: {statistics.median(ratios):.2f} times")


if __name__ == "__main__":
    main()
