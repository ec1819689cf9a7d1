"""Held-out perplexity of checkpoints through this project's own engine.

Run: python -m training.perplexity CORPUS_DIR MODEL [MODEL …] [--documents 300] [--experts-per-token N] [--exact]
The held-out documents are those that training/prepare.py kept apart (by prompt), one fresh context each.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from expertstream import LLM

from .prepare import load


def negative_log_likelihood(llm: LLM, tokens: np.ndarray) -> tuple[float, int]:
    """Sum over the tokens after the first, and their number."""
    cache = llm.session().cache
    logits = llm.model(tokens[:-1], cache, all_logits=True).astype(np.float64)
    peak = logits.max(-1)
    log_sum = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
    chosen = np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
    return float((log_sum - chosen).sum()), tokens.shape[0] - 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--experts-per-token", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="16-bit activations")
    args = parser.parse_args()
    with ProcessPoolExecutor() as pool:
        docs = [
            text
            for part in pool.map(load, sorted(args.corpus.glob("corpus.jsonl.*.xz")))
            for held_out, text in part
            if held_out
        ]
    docs = list(dict.fromkeys(docs))[: args.documents]
    for path in args.models:
        with LLM(path, experts_per_token=args.experts_per_token, exact=args.exact, context_length=2048) as llm:
            sums = [negative_log_likelihood(llm, llm.tokenizer.encode(doc)) for doc in docs]
        total, count = map(sum, zip(*sums, strict=True))
        size = sum(f.stat().st_size for f in path.iterdir() if f.suffix == ".safetensors")
        print(
            f"{path.name}: perplexity {math.exp(total / count):.4f} over {count:,} tokens, {size / 1e6:.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
