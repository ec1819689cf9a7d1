from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream import SamplingParams, UsageError
from expertstream.sampling import Sampler, _at_least

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


def draws(count: int = 4000, **params: object) -> np.ndarray:
    """Shares of the tokens in many independent draws."""
    sampler = Sampler(SamplingParams(seed=1, **params), [])  # type: ignore[arg-type]
    return np.bincount([sampler(LOGITS).token for _ in range(count)], minlength=5) / count


def test_zero_temperature_takes_the_likeliest() -> None:
    assert draws(10)[0] == 1


def test_draws_follow_the_distribution() -> None:
    assert np.abs(draws(temperature=1.0) - np.exp(LOGITS)).max() < 0.03
    half = np.exp(LOGITS / 0.5)
    assert np.abs(draws(temperature=0.5) - half / half.sum()).max() < 0.03


def test_truncation() -> None:
    assert (draws(temperature=1.0, top_k=2)[2:] == 0).all()
    assert (draws(temperature=1.0, top_p=0.7)[2:] == 0).all() and draws(temperature=1.0, top_p=0.7)[1] > 0.2
    assert draws(temperature=1.0, top_p=0.0)[0] == 1
    assert (draws(temperature=1.0, min_p=0.3)[2:] == 0).all()


@given(seed=st.integers(0, 1000), top_k=st.integers(1, 40), size=st.integers(1, 9000), steps=st.sampled_from([4, 1000]))
def test_top_k_of_a_long_vocabulary_is_what_sorting_gives(seed: int, top_k: int, size: int, steps: int) -> None:
    logits = (np.round(np.random.default_rng(seed).standard_normal(size) * steps) / steps).astype(
        np.float32
    )  # with ties
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=top_k, seed=seed), [])
    allowed = set(np.argsort(-logits, kind="stable")[:top_k].tolist())
    assert {sampler(logits).token for _ in range(20)} <= allowed
    found = _at_least(logits, top_k)
    assert allowed <= set(found.tolist()) and (np.diff(found) > 0).all()


def test_penalties() -> None:
    # Once token 0 was drawn it costs more than its lead.
    sampler = Sampler(SamplingParams(presence_penalty=1.0), [])
    assert [sampler(LOGITS).token for _ in range(2)] == [0, 1]
    sampler = Sampler(SamplingParams(frequency_penalty=0.4), [])
    assert [sampler(LOGITS).token for _ in range(3)] == [0, 0, 1]
    # The prompt counts for the repetition penalty: negative logits are multiplied.
    sampler = Sampler(SamplingParams(repetition_penalty=3.0), [0])
    assert sampler(LOGITS).token == 1


def test_logprobs_are_of_the_untouched_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=0.3, top_k=1, presence_penalty=2, logprobs=3), [])
    choice = sampler(LOGITS)
    assert choice.token == 0 and choice.logprob == pytest.approx(math.log(0.5), abs=1e-6)
    assert [t for t, _ in choice.top_logprobs] == [0, 1, 2]
    assert sum(math.exp(p) for _, p in choice.top_logprobs) == pytest.approx(0.875, abs=1e-5)


@given(seed=st.integers(0, 2**63), temperature=st.floats(0.1, 3), top_p=st.floats(0.05, 1), top_k=st.integers(0, 9))
def test_a_seed_means_one_text(seed: int, temperature: float, top_p: float, top_k: int) -> None:
    logits = np.random.default_rng(seed % 1000).standard_normal((6, 50)).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    a, b = Sampler(params, []), Sampler(params, [])
    assert [a(row).token for row in logits] == [b(row).token for row in logits]


def test_without_a_seed_one_is_chosen_and_told() -> None:
    a, b = Sampler(SamplingParams(), []), Sampler(SamplingParams(), [])
    assert a.params.seed is not None and a.params.seed != b.params.seed


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"top_k": -1},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"seed": -1},
        {"seed": 1.5},
        {"max_tokens": "5"},
        {"temperature": "0.5"},
        {"stop": "x"},
        {"stop": (1,)},
        {"stop": ("",)},
    ],
)
def test_impossible_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_defaults_come_from_the_checkpoint() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    p = SamplingParams.from_options(config, "f", top_k=5, seed=None, stop=["x"])
    assert (p.temperature, p.top_p, p.top_k, p.stop) == (0.6, 0.95, 5, ("x",))
    assert SamplingParams.from_options({}, "f").temperature == 0
    assert SamplingParams.from_options({"do_sample": False, "temperature": 0.6}, "f").temperature == 0
    # Asking how to draw asks for a draw.
    assert SamplingParams.from_options({}, "f", top_p=0.9).temperature == 1
    assert SamplingParams.from_options({}, "f", top_p=0.9, temperature=0.0).temperature == 0


def test_equal_logits_are_taken_in_order() -> None:
    logits = np.zeros(5000, np.float32)
    logits[::2] = 1
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3, seed=1), [])
    assert {sampler(logits).token for _ in range(60)} == {0, 2, 4}


def test_a_temperature_next_to_zero_is_greedy() -> None:
    assert Sampler(SamplingParams(temperature=1e-310, seed=1), [])(LOGITS).token == 0
