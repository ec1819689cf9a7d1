"""The public API as its users type it: `make lint` runs mypy --strict over this file against the installed package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from expertstream import (
    LLM,
    BudgetError,
    EngineConfig,
    ExpertStreamError,
    GenerationResponse,
    GenerationStats,
    SamplingParams,
    Session,
    TokenLogprob,
    UsageError,
)
from expertstream.config import EngineOptions
from expertstream.sampling import SamplingOptions


def text_of(pieces: Iterator[GenerationResponse]) -> str:
    return "".join(piece.text for piece in pieces)


def test_options_are_the_fields_that_are_checked() -> None:
    assert {f.name for f in fields(EngineConfig)} | {"memory", "vram"} == set(EngineOptions.__annotations__)
    assert {f.name for f in fields(SamplingParams)} == set(SamplingOptions.__annotations__)


def test_a_model_is_used_as_its_types_say(tmp_path: Path) -> None:
    path: Path | None = None
    with LLM(path, memory="64MiB", context_length=512, threads=1) as llm:
        pieces: list[GenerationResponse] = list(
            llm.generate("Once", max_tokens=4, temperature=0.7, seed=1, logprobs=2, stop=["zebra"])
        )
        stats: GenerationStats = pieces[-1].stats
        logprob: TokenLogprob | None = pieces[0].logprob
        assert stats.generated_tokens == len(pieces) and logprob is not None and logprob.logprob is not None
        assert text_of(llm.chat([{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0.0))
        params: SamplingParams = llm.sampling_params(max_tokens=2, temperature=None)
        session: Session = llm.session()
        written = text_of(session.generate(llm.tokenizer.encode("Once upon"), params))
        session.save(tmp_path / "state")
        other = llm.session()
        other.load(tmp_path / "state")
        assert isinstance(written, str) and other.cache.position == session.cache.position
        again = LLM(config=EngineConfig(memory_bytes=64 << 20, context_length=256, threads=1))
        again.close()


def test_types_refuse_what_the_engine_refuses() -> None:
    """Each line is an error for mypy (an unused ignore would be one), and an exception when it is run."""
    with pytest.raises(UsageError):
        LLM(momory="64MiB")  # type: ignore[call-arg]
    with pytest.raises(UsageError):
        LLM(threads="2")  # type: ignore[arg-type]
    with LLM(memory="64MiB", context_length=256, threads=1) as llm:
        with pytest.raises(UsageError):
            llm.generate("x", max_token=5)  # type: ignore[call-arg]
        with pytest.raises(UsageError):
            llm.sampling_params(top_k=0.5)  # type: ignore[arg-type]


def test_errors_have_one_base() -> None:
    with pytest.raises(ExpertStreamError) as caught:
        LLM(memory="1MiB")
    assert isinstance(caught.value, BudgetError) and "memory=" in str(caught.value)
