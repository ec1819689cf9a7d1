"""The tokenizer copies: a word is the same tokens wherever it stands."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training.tokenizer import VOCAB, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    r = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(r.choices(syllables, k=r.randint(1, 4))) for _ in range(20_000)]
    texts = [" ".join(r.choices(words, weights=[1 / (i + 1) for i in range(len(words))], k=60)) for _ in range(3_000)]
    return train_tokenizer([*texts, "<tool_call>\n<function=lo_ma>\n<parameter=ba>\nba\n</parameter>\n" * 50])


def test_a_space_joins_a_word_last(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB
    tokens = tokenizer.get_vocab()
    joined = [t for t in tokens if t.startswith("Ġ") and t[1:].isalpha()]
    assert len(joined) > 100 and all(t[1:] in tokens for t in joined)
    for word in ("nozaliba", "Mikado", "petrichor"):
        alone = tokenizer.encode(word).tokens
        for before in ("\n", '"', "=", "_", "("):
            assert tokenizer.encode(before + word).tokens[1:] == alone, before
        after_space = tokenizer.encode(" " + word).tokens
        assert "".join(after_space) == "Ġ" + "".join(alone)
        assert after_space[-1] in alone[-1] or after_space[1:] == alone  # the space took the first piece at most


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    normal = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == normal
