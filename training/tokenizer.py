"""The tokenizer: byte-level BPE with the family's pre-tokenizer, in which a space joins a word last.

A call repeats what the request and the schema say, but after other characters: " aubergine" becomes "\\naubergine", '"max_minutes"'
becomes "=max_minutes". An ordinary BPE cuts the two in different places, and a model of this size then misspells what it copies. Here
merges are learned on words without what stands before them; only at the end are the most frequent words given a token with
their space. So a word has the same tokens everywhere, or one token with its space and one without. Text gets 3 % longer by it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .chat import SPECIALS, SPLIT

__all__ = ["VOCAB", "train_tokenizer", "words_of"]

VOCAB = 8192
JOINED = 3000  # words that have a token with what stands before them
BEFORE = " <"  # a space, or the bracket of "<function" and "<parameter"


def _pieces(split: str) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    # Words without the character before them.
    tokenizer.pre_tokenizer = _pieces(SPLIT.replace(r"[^\r\n\p{L}\p{N}]?[", "["))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - JOINED,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    words = Counter(pair for text in texts for pair in re.findall(rf"([{BEFORE}])([^\W\d_]+)", text))
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for (before, word), _ in sorted(words.items(), key=lambda item: (-item[1], item[0])):
        pair = [alphabet.pre_tokenize_str(part)[0][0] for part in (before, word)]
        if pair[1] in vocab and len(vocab) < VOCAB:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = _pieces(SPLIT)
    return tokenizer


def words_of(tokenizer: Tokenizer) -> list[str]:
    """The words that have a token with a space and one without."""
    vocab = tokenizer.get_vocab()
    return sorted(t[1:] for t in vocab if t[0] == "Ġ" and t[1:].isascii() and t[1:].isalpha() and t[1:] in vocab)
