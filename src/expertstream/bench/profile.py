"""Where a token's time goes: a timer around every op and every wait, reported as sums by phase and as a Chrome trace.

Profiling costs nothing when it is off: the timers are a wrapper around the real Ops (LLM's `instrument`) and one around the real reader.
The time that neither covers is Python's own share. On a GPU each op is waited for while it is timed, and steps are not replayed from
recordings: the sums are those of the ops one after another, longer than an unprofiled token.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Batch
from ..engine import LLM
from ..errors import UsageError
from ..ops import F32, GpuOps, Ops

__all__ = ["PHASES", "Profiler"]

# Op → phase; project() counts as "mix" in a layer and as "head" after the last layer.
PHASES = {
    "embed": "embed", "rms_norm": "norm", "project": "mix", "attend": "mix", "gated_delta": "mix", "route": "router",
    "shared_expert": "shared", "experts": "experts", "moe": "experts", "routed": "experts", "accumulate": "combine", "tile": "arrange",
    "wait": "wait", "submit": "submit",
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    name: str
    layer: int
    begin: float
    end: float


class _Clock:
    """Wraps an Ops or a reader and records its calls."""

    def __init__(self, inner: Any, profiler: Profiler, names: frozenset[str]) -> None:
        self._inner = inner
        for name in names:
            setattr(self, name, profiler.timed(name, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Profiler:
    """Use `LLM(..., instrument=profiler.instrument)`, then `watch(llm)`. The events of a forward pass begin within its span."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.selected: np.ndarray[Any, Any] | None = None  # (layers, experts): how often each was selected
        self.spans: list[tuple[float, float, int]] = []  # begin, end and tokens of every forward pass
        self._layer, self._fetched, self._layers = -1, -1, 0
        self._settle: Callable[[], None] = lambda: None  # waits for what an op has started
        self._host: Callable[[Any], Any] = lambda x: x

    def instrument(self, ops: Ops) -> Ops:
        names = frozenset(name for name in PHASES if hasattr(ops, name) and name != "wait")  # that is the reader's
        clock: Any = _Clock(ops, self, names)
        if isinstance(ops, GpuOps):
            self._settle, self._host, clock.recorded = ops.wait, ops.host, lambda *_: None
        return clock  # type: ignore[no-any-return]

    def watch(self, llm: LLM) -> None:
        """Also times the reader, counts experts, and records the begin and end of forward passes."""
        self._layers = llm.model_config.num_hidden_layers
        self.selected = np.zeros((self._layers, llm.model_config.num_experts), np.int64)
        clock: Any = _Clock(llm.experts.link.reader, self, frozenset(("wait", "submit")))
        llm.experts.link.reader = clock
        forward, fetch, resident = llm.model._forward, llm.experts.fetch, llm.experts.resident_block

        def noted(batch: Batch, all_logits: bool) -> F32:
            begin, self._layer = time.perf_counter(), 0
            result = forward(batch, all_logits)
            self.spans.append((begin, time.perf_counter(), int(batch.tokens.shape[0])))
            return result

        def counted(layer: int, experts: list[int], prompt: bool = False, here: bool = False) -> Any:
            self._count(layer, experts)
            return fetch(layer, experts, prompt, here)

        def counted_resident(layer: int, experts: list[int]) -> Any:
            block = resident(layer, experts)
            if block is not None:
                self._count(layer, experts)
            return block

        llm.model._forward = noted  # type: ignore[method-assign]
        llm.experts.fetch = counted  # type: ignore[method-assign]
        llm.experts.resident_block = counted_resident  # type: ignore[method-assign]

    def _count(self, layer: int, experts: list[int]) -> None:
        assert self.selected is not None
        self.selected[layer, experts] += 1
        self._layer = self._fetched = layer

    def timed(self, name: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                result = call(*args, **kwargs)
                self._settle()
                return result
            finally:
                if name == "routed" and self.selected is not None:  # the card selected, and Python did not see it
                    np.add.at(self.selected[self._layer], self._host(args[5]).ravel(), 1)
                    self._fetched = self._layer
                # Running the next layer's router for prefetch counts as this layer's work.
                self.events.append(Event(name, min(self._layer, max(0, self._layers - 1)), begin, time.perf_counter()))
                # The next op belongs to the next layer, unless more experts of this one follow.
                if name in ("moe", "accumulate", "routed"):
                    self._layer = self._fetched + 1

        return run

    def phases(self, decode: bool) -> dict[str, float]:
        """Milliseconds per decoded token (decode) or per prompt token, by phase; "python" is the time outside all ops and waits."""
        spans = [span for span in self.spans if (span[2] == 1) == decode]
        tokens = sum(span[2] for span in spans)
        if not tokens:
            return {}
        sums: dict[str, float] = {}
        covered = 0.0
        for event, phase in self._phased(spans):
            sums[phase] = sums.get(phase, 0.0) + event.end - event.begin
            covered += event.end - event.begin
        total = sum(end - begin for begin, end, _ in spans)
        sums["python"] = total - covered
        return {phase: 1000 * seconds / tokens for phase, seconds in sorted(sums.items(), key=lambda item: -item[1])}

    def _phased(self, spans: list[tuple[float, float, int]]) -> Iterator[tuple[Event, str]]:
        """The events of these forward passes, each with its phase."""
        at = 0
        events = sorted(self.events, key=lambda event: event.begin)
        for begin, end, _ in spans:
            while at < len(events) and events[at].begin < begin:
                at += 1
            first = at
            while at < len(events) and events[at].begin < end:
                at += 1
            # The last projection of a forward pass is the output head.
            inside = events[first:at]
            head = max((i for i, event in enumerate(inside) if event.name == "project"), default=-1)
            for i, event in enumerate(inside):
                yield event, "head" if i == head else PHASES[event.name]

    def table(self) -> str:
        lines = []
        for decode, title in ((False, "prompt"), (True, "decode")):
            phases = self.phases(decode)
            if not phases:
                continue
            total = sum(phases.values())
            lines.append(f"[{title}: {total:.2f} ms per token, {total / max(1, self._layers):.3f} ms per layer]")
            lines += [f"  {phase:8} {ms:8.3f} ms {ms / total:6.1%}" for phase, ms in phases.items()]
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Writes a Chrome trace (chrome://tracing, Perfetto) with the sums and counts that `report` plots. Raises UsageError."""
        start = min((span[0] for span in self.spans), default=0.0)

        def event(name: str, begin: float, end: float, thread: int, **args: Any) -> dict[str, Any]:
            us = {"ts": round((begin - start) * 1e6, 1), "dur": round((end - begin) * 1e6, 1)}
            return {"name": name, "ph": "X", "pid": 1, "tid": thread, **us, "args": args}

        trace = [
            event(f"{tokens} tokens" if tokens > 1 else "token", b, e, 1, tokens=tokens) for b, e, tokens in self.spans
        ]
        trace += [event(e.name, e.begin, e.end, 2, layer=e.layer, phase=phase) for e, phase in self._phased(self.spans)]
        names = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": t, "args": {"name": n}}
            for t, n in ((1, "tokens"), (2, "ops"))
        ]
        summary = {
            "layers": self._layers,
            "prompt_ms": self.phases(decode=False),
            "decode_ms": self.phases(decode=True),
            "selected": self.selected.tolist() if self.selected is not None else [],
        }
        try:
            path.write_text(json.dumps({"traceEvents": names + trace, "expertstream": summary}))
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
