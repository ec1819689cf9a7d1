"""Choosing a token from logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np

from .errors import CheckpointError, UsageError
from .ops import F32, I64

__all__ = ["Choice", "Constraint", "Sampler", "SamplingOptions", "SamplingParams", "scored"]


class SamplingOptions(TypedDict, total=False):
    """The keywords of LLM.generate() and LLM.chat(): the fields of SamplingParams; None takes the default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logprobs: int | None
    stop: str | Sequence[str] | None
    max_tokens: int | None
    logit_bias: Mapping[int, float] | None


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Order: penalties, temperature, top_k, top_p, min_p, then one sample. temperature 0 takes the most likely token.
    repetition_penalty divides positive and multiplies negative logits of every token seen in prompt or answer (Keskar et al., CTRL,
    2019); presence_penalty and frequency_penalty are OpenAI's, applied to the answer. logit_bias: added to the logits of tokens, before
    the rest. logprobs: how many alternatives to report with each token, from the unmodified distribution; None for no log-probabilities.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a new one each time
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int = 512
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("presence_penalty", -10, 10),
            ("frequency_penalty", -10, 10),
            ("repetition_penalty", 0.01, 100),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{name} must be a number from {low} to {high}; got {value!r}")
        for name, low, high in (
            ("top_k", 0, 1 << 31),
            ("max_tokens", 1, 1 << 31),
            ("logprobs", 0, 100),
            ("seed", 0, 1 << 64),
        ):
            value = getattr(self, name)
            if (value is None and name in ("logprobs", "seed")) or (type(value) is int and low <= value <= high):
                continue
            raise UsageError(f"{name} must be an integer from {low} to {high}; got {value!r}")
        if not isinstance(self.stop, tuple) or any(not isinstance(s, str) or not s for s in self.stop):
            raise UsageError(f"stop must be non-empty strings; got {self.stop!r}")
        for token, bias in (self.logit_bias or {}).items():
            if type(token) is not int or token < 0:
                raise UsageError(f"logit_bias: a token must be an integer of at least 0; got {token!r}")
            if not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise UsageError(f"logit_bias: the bias of token {token} must be between -100 and 100; got {bias!r}")

    @classmethod
    def from_options(
        cls, generation_config: Mapping[str, Any], where: str, **options: Unpack[SamplingOptions]
    ) -> SamplingParams:
        """A checkpoint's generation_config.json, overridden by the options that are not None. If that file selects the most likely
        token, an option top_k, top_p or min_p selects sampling at temperature 1. Raises UsageError for invalid options, CheckpointError
        naming `where` for invalid values in the file."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        elif isinstance(given.get("stop"), list):
            given["stop"] = tuple(given["stop"])
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(
                f"unknown sampling option {unknown[0]!r}; the options are {', '.join(cls.__dataclass_fields__)}"
            )
        defaults: dict[str, Any] = {}
        if generation_config.get("do_sample", "temperature" in generation_config):
            defaults["temperature"] = 1.0
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
                value = generation_config.get(name)
                if value is not None:
                    defaults[name] = (
                        int(value) if name == "top_k" and isinstance(value, float) and value.is_integer() else value
                    )
        try:
            cls(**defaults)
        except UsageError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if not defaults and given.keys() & {"top_k", "top_p", "min_p"}:
            defaults["temperature"] = 1.0
        return cls(**{**defaults, **given})


class Constraint(Protocol):
    """Restricts which tokens may come next."""

    def mask(self, logits: F32) -> F32:
        """A copy of logits (vocab,) in which forbidden tokens are -inf."""

    def accept(self, token: int) -> None:
        """Called with the chosen token."""


@dataclass(frozen=True)
class Choice:
    """A chosen token; logprob and alternatives (token, logprob; most likely first) if requested."""

    token: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence. The same seed, logits and parameters give the same choices on every run."""

    def __init__(self, params: SamplingParams, prompt: list[int], constraint: Constraint | None = None) -> None:
        if params.seed is None:
            params = replace(params, seed=int(np.random.SeedSequence().generate_state(1)[0]))
        self.params = params
        self._constraint = constraint
        self._rng = np.random.Generator(np.random.PCG64(params.seed))
        self._seen = set(prompt)
        self._counts: dict[int, int] = {}

    def __call__(self, logits: F32) -> Choice:
        """logits (vocab,), finite."""
        p = self.params
        adjusted = self._penalize(logits)
        if self._constraint is not None:
            adjusted = self._constraint.mask(adjusted)
        token = int(adjusted.argmax()) if p.temperature == 0 else self._draw(adjusted)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if p.logprobs is None:
            return Choice(token, None, ())
        return scored(token, logits, p.logprobs)

    def _penalize(self, logits: F32) -> F32:
        p = self.params
        if p.repetition_penalty == 1 and p.presence_penalty == 0 and p.frequency_penalty == 0 and not p.logit_bias:
            return logits
        logits = logits.copy()
        for token, bias in (p.logit_bias or {}).items():
            logits[token] += bias
        if p.repetition_penalty != 1 and self._seen:
            seen = np.fromiter(self._seen, np.int64)
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        for token, count in self._counts.items():
            logits[token] -= p.presence_penalty + p.frequency_penalty * count
        return logits

    def _draw(self, logits: F32) -> int:
        p = self.params
        order = _at_least(logits, p.top_k) if p.top_k else np.arange(logits.shape[0])
        if p.top_k or p.top_p < 1:
            # Most likely first, equal ones by number, so that a seed determines the text.
            order = order[np.argsort(-logits[order], kind="stable")]
            if p.top_k:
                order = order[: p.top_k]
        chosen = logits[order].astype(np.float64)
        # Near temperature 0 the quotient overflows to -inf, whose probability is 0, as intended.
        with np.errstate(over="ignore"):
            probs = np.exp((chosen - chosen.max()) / p.temperature)
        probs /= probs.sum()
        if p.top_p < 1:
            # The fewest tokens whose probabilities reach top_p, at least one.
            keep = int(np.searchsorted(np.cumsum(probs), p.top_p)) + 1
            order, probs = order[:keep], probs[:keep]
        if p.min_p > 0:
            likely = probs >= p.min_p * probs.max()
            order, probs = order[likely], probs[likely]
        cumulative = np.cumsum(probs)
        at = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(order[min(at, order.shape[0] - 1)])


def scored(token: int, logits: F32, count: int) -> Choice:
    """A token with its log-probability under logits (vocab,), and the `count` most likely ones."""
    shifted = logits.astype(np.float64) - float(logits.max())
    log_probs = shifted - math.log(float(np.exp(shifted).sum()))
    best = np.argsort(-log_probs, kind="stable")[:count]
    return Choice(token, float(log_probs[token]), tuple((int(i), float(log_probs[i])) for i in best))


def _at_least(logits: F32, count: int) -> I64:
    """The `count` most likely tokens and few others, in ascending order: sorting a whole vocabulary can take longer than a small model
    takes for a token. The count-th largest of the blocks' maxima is at most the count-th largest logit."""
    width = 64
    blocks = logits.shape[0] // width
    if blocks < 2 * count:
        return np.arange(logits.shape[0])
    maxima = logits[: blocks * width].reshape(blocks, width).max(1)
    return np.flatnonzero(logits >= np.partition(maxima, -count)[-count])
