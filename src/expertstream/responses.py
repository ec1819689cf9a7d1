"""Results of a generation: pieces of text, log-probabilities, counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .experts.stats import ExpertStats, LayerStats

__all__ = ["ExpertSpans", "GenerationResponse", "GenerationStats", "StopStrings", "TokenLogprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability (None for the first of a prompt) and the most likely alternatives (text, log-probability).
    raw, top_raw: the tokens' bytes, which may be parts of characters."""

    token: str
    logprob: float | None
    top_logprobs: tuple[tuple[str, float], ...]
    raw: bytes = b""
    top_raw: tuple[bytes, ...] = ()


class ExpertSpans:
    """The expert counters of one generation, added up only on access: summing all layers at every token would cost more than the token's
    other bookkeeping."""

    def __init__(self, counters: ExpertStats) -> None:
        self._counters = counters
        self._begin = counters.copy()
        self._prefilled: ExpertStats | None = None
        self._end: ExpertStats | None = None

    def end_prefill(self) -> None:
        self._prefilled = self._counters.copy()

    def end(self) -> None:
        """Later counts belong to other generations."""
        self._end = self._counters.copy()

    @property
    def _now(self) -> ExpertStats:
        return self._end or self._counters

    @property
    def prefill(self) -> ExpertStats:
        return (self._prefilled or self._now).since(self._begin)

    @property
    def decode(self) -> ExpertStats:
        return self._now.since(self._prefilled or self._now)

    @property
    def all(self) -> ExpertStats:
        return self._now.since(self._begin)


@dataclass
class GenerationStats:
    """Measurements of one generation. Times and rates are wall-clock; experts are counted separately for prefill and decode."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that did not have to be read again
    generated_tokens: int = 0
    ttft_seconds: float = 0.0  # time to first token: prefill and sampling it
    decode_seconds: float = 0.0  # of the tokens after the first
    seed: int = 0
    stop_string: str = ""  # the one that ended the answer
    lossy: str = ""  # settings that change the model's output, "" if none
    experts: ExpertSpans = field(default_factory=lambda: ExpertSpans(ExpertStats(0)))

    @property
    def prefill_experts(self) -> LayerStats:
        return self.experts.prefill.total()

    @property
    def decode_experts(self) -> LayerStats:
        return self.experts.decode.total()

    @property
    def layers(self) -> list[LayerStats]:
        """Prefill and decode together."""
        return self.experts.all.layers

    @property
    def prefill_tps(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.ttft_seconds if self.ttft_seconds else 0.0

    @property
    def decode_tps(self) -> float:
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "experts"}
        result |= {"prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps}
        for name in ("prefill_experts", "decode_experts"):
            span: LayerStats = getattr(self, name)
            result[name] = {**asdict(span), "hit_rate": span.hit_rate}
        result["layers"] = [asdict(layer) for layer in self.layers]
        return result


@dataclass(frozen=True)
class GenerationResponse:
    """One piece of an answer: the text completed since the previous piece. The last has a finish_reason: "stop" (end token or
    stop string) or "length". stats are running totals."""

    text: str
    token: int | None
    logprob: TokenLogprob | None
    finish_reason: str | None
    stats: GenerationStats
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # in the first piece, if requested


class StopStrings:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self.found = ""  # the one that occurred

    def add(self, text: str) -> str:
        """Returns the text that can be shown; nothing once a stop string is found."""
        if self.found:
            return ""
        self._held += text
        if not self._stops:
            shown, self._held = self._held, ""
            return shown
        places = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if places:
            at, self.found = min(places)
            shown, self._held = self._held[:at], ""
            return shown
        # The held text is shorter than the longest stop string, and mostly just the new text.
        ends = (at for at in range(len(self._held)) if any(stop.startswith(self._held[at:]) for stop in self._stops))
        at = next(ends, len(self._held))
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def rest(self) -> str:
        held, self._held = self._held, ""
        return "" if self.found else held
