"""The embedded model's perplexity on held-out text is what the oracle makes of the same values, and rounding costs what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expertstream.engine import LLM, embedded_model
from training.chat import segments
from training.evaluate import perplexity

from ..oracle import dequantized_oracle

DOCS = [json.loads(line) for line in (Path(__file__).parent.parent / "data" / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected() -> float:
    """Over the same tokens, by Hugging Face's model with the values that the 4-bit pack stands for."""
    config = json.loads((embedded_model() / "config.json").read_text())
    model = dequantized_oracle(embedded_model(), config)
    total = count = 0.0
    with LLM(embedded_model()) as llm, torch.no_grad():
        for doc in DOCS:
            pieces = segments(doc)
            ids = [llm.tokenizer.encode(text) for text, _ in pieces]
            tokens = torch.from_numpy(np.concatenate(ids))
            learned = torch.cat([torch.full((len(i),), said) for i, (_, said) in zip(ids, pieces, strict=True)])[1:]
            logits = model(tokens[None, :-1], use_cache=False).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            total, count = total + nll[learned].sum().item(), count + learned.sum().item()
    return float(np.exp(total / count))


def test_perplexity_is_the_oracles(expected: float) -> None:
    with LLM(embedded_model(), exact=True, context_length=2048) as llm:
        assert perplexity(llm, DOCS)["all"] == pytest.approx(expected, rel=1e-3)


def test_eight_bit_activations_cost_half_a_percent_at_most(expected: float) -> None:
    with LLM(embedded_model(), context_length=2048) as llm:
        assert perplexity(llm, DOCS)["all"] == pytest.approx(expected, rel=5e-3)
