"""A model that writes what a test wants it to, token by token: protocols are tested with real clients and servers, not with luck."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from expertstream.batch import Batch
from expertstream.engine import LLM
from expertstream.kv_cache import KVCache
from expertstream.ops import F32, I64
from expertstream.text.control import ChatPrompt

Written = str | ChatPrompt  # in parts: what looks like a control token across a border is plain text


@dataclass
class _Sequence:
    read: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    written: int = 0


class ScriptedModel:
    """Stands in for LLM.model. write: the prompt's text → the answer's, control tags included, without an end. seconds_per_token: how
    long a token of a prompt or an answer takes; a prompt looks after every eighth of a pass whether it was cancelled."""

    def __init__(self, llm: LLM, write: Callable[[str], Written], seconds_per_token: float = 0.0) -> None:
        self._llm, self._write, self._seconds = llm, write, seconds_per_token
        self._sequences: dict[int, _Sequence] = {}
        self.prompts: list[str] = []
        self._end = max(llm.tokenizer.eos_ids)

    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        if prompt and cache.position == 0:
            self._sequences[id(cache)] = _Sequence()
        here = self._sequences.setdefault(id(cache), _Sequence())
        cache.valid = False
        for _ in range(8 if prompt else 1):
            cache.between_layers()
            time.sleep(self._seconds * len(tokens) / (8 if prompt else 1))
        cache.valid = True
        cache.position += len(tokens)
        if prompt:
            here.read += tokens.tolist()
            text = self._llm.tokenizer.decode(here.read, skip_special_tokens=False)
            here.answer, here.written = [*self._llm.tokenizer.encode(self._write(text)).tolist(), self._end], 0
            self.prompts.append(text)
        else:
            here.written += 1
        logits = np.zeros((1, self._llm.model_config.vocab_size), np.float32)
        logits[0, here.answer[min(here.written, len(here.answer) - 1)]] = 60
        if cache.each_logits is not None:
            cache.each_logits(np.repeat(logits, len(tokens), 0))
        return logits

    def forward(self, batch: Batch) -> F32:
        return np.concatenate([self(batch.tokens[i : i + 1], cache) for i, cache in enumerate(batch.caches)])


@contextmanager
def scripted(
    llm: LLM, write: Callable[[str], Written] | Written, seconds_per_token: float = 0.0
) -> Iterator[ScriptedModel]:
    """While it lasts, the LLM writes what the script says."""
    original: Any = llm.model
    prefixes, llm.prefixes = llm.prefixes, None  # its states are nobody's
    script = write if callable(write) else lambda _: write
    model = ScriptedModel(llm, script, seconds_per_token)
    llm.model = model
    try:
        yield model
    finally:
        llm.model, llm.prefixes = original, prefixes
