"""LLM, which is a loaded model, and Session, which is one text on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from . import _native
from .checkpoint.reader import Checkpoint, open_checkpoint, read_json
from .config import DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig, IoSettings, format_bytes
from .errors import CheckpointError, RequestError, UsageError
from .experts.budget import MemoryPlan, MemoryWatch, plan_with_chunk
from .experts.cache import ExpertCache
from .experts.stats import ExpertStats, LayerStats
from .experts.store import ExpertStore
from .generate import stream_generate
from .machine import available_bytes
from .models import find_model
from .ops import I64, Ops, make_ops
from .ops.cpu import CpuOps
from .sampling import Sampler, SamplingParams
from .tokenizer import Detokenizer, Tokenizer

__all__ = ["LLM", "GenerationResponse", "GenerationStats", "Session", "TokenLogprob", "embedded_model"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability and the most likely alternatives (text, log-probability)."""

    token: str
    logprob: float
    top_logprobs: tuple[tuple[str, float], ...]


class ExpertSpans:
    """The expert counters of one generation. They are read only when somebody asks: adding up every layer's at every token would cost
    more than the token's own bookkeeping."""

    def __init__(self, counters: ExpertStats) -> None:
        self._counters = counters
        self._begin = counters.copy()
        self._prefilled: ExpertStats | None = None
        self._end: ExpertStats | None = None

    def end_prefill(self) -> None:
        self._prefilled = self._counters.copy()

    def end(self) -> None:
        """What is counted later belongs to others."""
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
    """What one generation took. Seconds and rates are of the wall clock; experts are counted, in prefill and decode apart."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    ttft_seconds: float = 0.0  # time to first token: prefill and the first draw
    decode_seconds: float = 0.0  # of the tokens after the first
    seed: int = 0
    lossy: str = ""  # what was asked for that changes the model's output, "" if nothing
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
        return self.prompt_tokens / self.ttft_seconds if self.ttft_seconds else 0.0

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
    """One piece of an answer: the text that became whole since the last piece. The last has a finish_reason: "stop" (end token or
    stop string) or "length". stats are running totals."""

    text: str
    token: int | None
    logprob: TokenLogprob | None
    finish_reason: str | None
    stats: GenerationStats


def embedded_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(__file__).parent / "embedded"


class LLM:
    """A model, open and loaded: trunk in memory, experts on disk with a cache of slots.

    >>> with LLM("path/to/checkpoint", memory="8GiB") as llm:
    ...     for piece in llm.generate("Once upon a time", max_tokens=100):
    ...         print(piece.text, end="", flush=True)

    Options are the fields of EngineConfig, and `memory`, a size such as "8GiB". `instrument` may put something around the ops, such as
    bench.profile's clock. One generation at a time: what is inside uses all
    threads for one text. Raises the errors of expertstream.errors.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        instrument: Callable[[Ops], Ops] | None = None,
        **options: Any,
    ) -> None:
        self.config = config or EngineConfig.from_options(options)
        if config is not None and options:
            raise UsageError("give either config or options")
        self.path = Path(path) if path is not None else embedded_model()
        self.checkpoint: Checkpoint = open_checkpoint(self.path)
        model_module = find_model(self.checkpoint.config, str(self.path))
        self.model_config = model_module.Config.from_json(self.checkpoint.config, str(self.path))
        self.tokenizer = Tokenizer(self.path)
        generation = self.path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        c, trained = self.config, self.model_config.num_experts_per_tok
        self.top_k = c.experts_per_token or trained
        if self.top_k > trained:
            raise UsageError(
                f"experts_per_token is at most what the model was trained with, {trained}, not {self.top_k}"
            )
        self.lossy = f"{self.top_k} of {trained} experts a token" if self.top_k < trained else ""
        self.context_length = c.context_length or min(DEFAULT_CONTEXT, self.model_config.max_position_embeddings)
        if self.context_length > self.model_config.max_position_embeddings:
            raise UsageError(
                f"a context of {self.context_length} is more than the "
                f"{self.model_config.max_position_embeddings} this model was trained for"
            )
        layouts = model_module.expert_layouts(self.model_config, self.checkpoint)
        store = ExpertStore(layouts, direct=c.residency != "os")
        try:
            self.plan, self.prefill_chunk = self._plan(model_module, store)
            if self.plan.residency == "os" and c.residency == "auto":
                store.close()
                store = ExpertStore(layouts, direct=False)
            self.reader_name, reader = _make_reader(c, self.path)
            self.ops = make_ops(c.ops, c.thread_count, c.isa, c.activation_bits)
            self.experts = ExpertCache(
                store,
                self.plan.slots,
                self.plan.ring_slots,
                c.policy,
                reader,
                self.plan.residency,
                c.verify,
                self.ops.tile,
                self.plan.ahead_slots,
                MemoryWatch(available_bytes, self.plan.available_bytes),
            )
            ops = instrument(self.ops) if instrument is not None else self.ops
            self.model = model_module.Model(self.model_config, self.checkpoint, ops, self.experts, self.top_k)
        except BaseException:
            store.close()
            raise

    def _plan(self, model_module: Any, store: ExpertStore) -> tuple[MemoryPlan, int]:
        """The memory plan, and how many tokens of a prompt go through together."""
        c, m = self.config, self.model_config
        return plan_with_chunk(
            lambda tokens: m.scratch_bytes(tokens, self.context_length, c.thread_count),
            # No larger than the context, but whole chunks of the gated-delta form.
            min(c.prefill_chunk, -(-self.context_length // LEAST_CHUNK) * LEAST_CHUNK),
            LEAST_CHUNK,
            memory_bytes=c.memory_bytes,
            available_bytes=available_bytes(),
            trunk_bytes=self.checkpoint.trunk_bytes(model_module.weight_map(m)),
            state_bytes=m.state_bytes(self.context_length, c.kv_dtype),
            slot_bytes=store.slot_bytes,
            layers=m.num_hidden_layers,
            num_experts=m.num_experts,
            top_k=self.top_k,
            residency=c.residency,
            direct=store.direct,
            prefetch=c.prefetch,
        )

    def describe(self) -> str:
        """One line on how memory is divided and how experts are read."""
        p, cached = self.plan, self.plan.slots - self.plan.ring_slots
        file_kind = "O_DIRECT" if self.experts.store.direct else "buffered"
        experts = (
            f"{min(cached, p.total_experts)} of {p.total_experts} experts cached"
            if p.residency == "slots"
            else "experts left to the page cache"
        )
        return (
            f"memory {format_bytes(p.budget_bytes)}: trunk {format_bytes(p.trunk_bytes)}, context {format_bytes(p.state_bytes)}, "
            f"scratch {format_bytes(p.scratch_bytes)}, slots {format_bytes(p.slots_bytes)} ({experts}); "
            f"residency {p.residency}, {self.reader_name}, {file_kind}, {self.config.thread_count} threads{self._isa()}"
        )

    def _isa(self) -> str:
        if not isinstance(self.ops, CpuOps):
            return ""
        return f", {self.ops.engine.isa}, {self.config.activation_bits}-bit activations"

    def session(self) -> Session:
        """A new, empty text."""
        return Session(self)

    def sampling_params(self, **given: Any) -> SamplingParams:
        """The checkpoint's generation_config.json, overridden by what is given."""
        return SamplingParams.from_options(self.generation_config, str(self.path / "generation_config.json"), **given)

    def generate(self, prompt: str, params: SamplingParams | None = None, **given: Any) -> Iterator[GenerationResponse]:
        """Continues `prompt`. Sampling: `params`, or keywords such as temperature=0.7, seed=1, max_tokens=100."""
        if params is not None and given:
            raise UsageError("give either params or keywords")
        if not isinstance(prompt, str):
            raise UsageError(f"a prompt is a text, not {type(prompt).__name__}")
        params = params or self.sampling_params(**given)
        return self.session().generate(self.tokenizer.encode(prompt), params)

    def chat(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams | None = None, **given: Any
    ) -> Iterator[GenerationResponse]:
        """Answers messages ({"role": "user", "content": "…"}), by the checkpoint's chat template."""
        return self.generate(self.tokenizer.apply_chat_template(messages), params, **given)

    def close(self) -> None:
        self.experts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Session:
    """One text on a model: what has been read and written so far, and the state that goes with it."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._unread: list[int] = []  # the last token of an answer: written, but not yet in the cache
        self.cache = llm.model_config.make_cache(llm.context_length, llm.config.kv_dtype)

    def generate(
        self,
        tokens: I64,
        params: SamplingParams,
        progress: Callable[[int], None] | None = None,
        control_tokens: bool = False,
    ) -> Iterator[GenerationResponse]:
        """Appends tokens (T,) to the text and continues it. `progress` is told how many tokens of the prompt are read. With
        `control_tokens`, what a model writes between <think> or <tool_call> tokens comes with them. Raises RequestError before any work
        if the tokens cannot fit."""
        if not self.cache.valid:
            raise RequestError("this session stopped in the middle of a token; reset() it")
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UsageError("tokens are a one-dimensional array of whole numbers, as tokenizer.encode() gives")
        if tokens.shape[0] == 0:
            raise RequestError("the prompt is empty")
        vocabulary = self.llm.model_config.vocab_size
        if int(tokens.min()) < 0:
            raise UsageError(f"a token is at least 0, not {tokens.min()}")
        if int(tokens.max()) >= vocabulary:
            raise CheckpointError(
                f"{self.llm.path}: tokenizer.json gives token {tokens.max()}, the model knows {vocabulary}: it is another model's"
            )
        tokens = np.concatenate([np.array(self._unread, np.int64), tokens.astype(np.int64)])
        room = self.cache.capacity - self.cache.position
        if tokens.shape[0] + 1 > room:
            needed = self.cache.position + tokens.shape[0] + 1
            raise RequestError(
                f"the prompt has {tokens.shape[0]} tokens, but the context has room for {max(room - 1, 0)}; "
                f"make --context at least {needed}"
            )
        # The last token's own state is never needed, so an answer may be one longer than the room.
        limited = replace(params, max_tokens=min(params.max_tokens, room - tokens.shape[0] + 1))
        return self._pieces(tokens, limited, progress, control_tokens)

    def reset(self) -> None:
        """Forgets the text."""
        self.cache.reset()
        self._unread = []

    def _pieces(
        self, tokens: I64, params: SamplingParams, progress: Callable[[int], None] | None, control_tokens: bool
    ) -> Iterator[GenerationResponse]:
        llm = self.llm
        sampler = Sampler(params, tokens.tolist())
        experts = ExpertSpans(llm.experts.stats)
        stats = GenerationStats(int(tokens.shape[0]), seed=sampler.params.seed or 0, lossy=llm.lossy, experts=experts)
        detokenizer, stops = Detokenizer(llm.tokenizer, not control_tokens), StopStrings(params.stop)
        steps = stream_generate(
            llm.model, self.cache, tokens, sampler, llm.tokenizer.eos_ids, llm.prefill_chunk, progress
        )
        for step in steps:
            stats.generated_tokens += 1
            if stats.generated_tokens == 1:
                stats.ttft_seconds = step.seconds
                experts.end_prefill()
            else:
                stats.decode_seconds += step.seconds
            token, logprob, reason = step.choice.token, None, None
            self._unread = [token]
            if step.choice.logprob is not None:
                text = llm.tokenizer.token_text
                top = tuple((text(t), p) for t, p in step.choice.top_logprobs)
                logprob = TokenLogprob(text(token), step.choice.logprob, top)
            ended = token in llm.tokenizer.eos_ids
            piece = stops.add("" if ended else detokenizer.add(token))
            if ended or stats.generated_tokens == params.max_tokens:
                reason = "stop" if ended else "length"
                if not stops.found:
                    piece += stops.add(detokenizer.flush())
                piece += stops.rest()
            if stops.found:
                reason = "stop"
            if reason is not None:
                experts.end()
            yield GenerationResponse(piece, token, logprob, reason, stats)
            if reason is not None:
                return


class StopStrings:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def add(self, text: str) -> str:
        """What of it can be shown; nothing any more once a stop string is found."""
        if self.found:
            return ""
        self._held += text
        places = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if places:
            shown, self._held, self.found = self._held[: min(places)], "", True
            return shown
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        held, self._held = self._held, ""
        return "" if self.found else held


def _make_reader(c: EngineConfig, path: Path) -> tuple[str, Any]:
    """io_uring where the kernel lets us, else threads; the name says which."""
    known = IoSettings.load(path)
    depth, split = c.queue_depth or known.queue_depth, c.split_bytes or known.split_bytes
    if c.reader != "pread":
        try:
            return "io_uring", _native.uring_reader(depth, split)
        except RuntimeError as error:
            if c.reader == "uring":
                raise UsageError(f"io_uring cannot be used here ({error}); take --reader pread") from None
    try:
        return "pread", _native.pread_reader(depth, split)
    except RuntimeError as error:
        raise UsageError(f"{depth} reading threads cannot be started ({error}); take a smaller --queue-depth") from None
