"""Held-out perplexity of checkpoints, and with fewer experts. Run: python -m training.perplexity HELDOUT MODEL [MODEL …]
[--experts-per-token N] [--exact] [--documents N]. For the table in the model card."""

from __future__ import annotations

import argparse
from pathlib import Path

from expertstream import LLM

from .evaluate import heldout, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--experts-per-token", type=int, default=0)
    parser.add_argument("--exact", action="store_true", help="16-bit activations")
    args = parser.parse_args()
    docs = heldout(args.heldout)[: args.documents]
    for path in args.models:
        with LLM(path, experts_per_token=args.experts_per_token, exact=args.exact, context_length=2048) as llm:
            found = perplexity(llm, docs)
        size = sum(f.stat().st_size for f in path.iterdir() if f.suffix == ".safetensors")
        print(f"{path.name}: perplexity {found['all']:.4f}, {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
