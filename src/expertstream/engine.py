"""LLM: a loaded model."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

import numpy as np

from . import _native
from .checkpoint.reader import Checkpoint, open_checkpoint
from .config import DEFAULT_CHUNK, DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig, EngineOptions
from .cuda.driver import device_number
from .errors import BudgetError, CheckpointError, ContextLengthError, RequestError, UsageError
from .experts.budget import MemoryPlan, MemoryWatch, default_budget, plan_beside_vram, plan_vram, plan_with_chunk
from .experts.cache import ExpertCache
from .experts.routed import RoutedExperts
from .experts.store import ExpertStore
from .experts.vram import Vram
from .files import read_json
from .kv_cache import state_bytes
from .layers import LoadedWeights
from .machine import available_bytes, usable_processors
from .models import build, config_of, expert_layouts, scratch_bytes, weight_map
from .ops import I64, GpuOps, Ops, make_ops
from .prefix_cache import PrefixCache
from .responses import GenerationResponse
from .sampling import SamplingOptions, SamplingParams
from .session import Session
from .text.control import ChatPrompt
from .text.family import PlainText
from .text.tokenizer import Tokenizer
from .units import format_bytes
from .user_files import IoSettings

_GPU_SPARE = 8  # slots of a GPU to which experts are copied while those that they replace are in use
# Incremented when a change makes stored states unusable: another layout, other arithmetic.
STATE_VERSION = 2

__all__ = ["LLM", "Session", "embedded_model"]

_log = logging.getLogger("expertstream")


def embedded_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(__file__).parent / "embedded"


class LLM:
    """A loaded model: trunk in memory, experts on disk with a cache of slots.

    >>> with LLM("path/to/checkpoint", memory="8GiB") as llm:
    ...     for piece in llm.generate("Once upon a time", max_tokens=100):
    ...         print(piece.text, end="", flush=True)

    Options are the fields of EngineConfig, and `memory`, a size such as "8GiB". `instrument` may wrap the ops, for example with
    bench.profile's clock. Run one generation at a time: each uses all threads. A forked process cannot use its parent's LLM; start
    processes with multiprocessing's "spawn". Raises the errors of expertstream.errors.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        instrument: Callable[[Ops], Ops] | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.config = config or EngineConfig.from_options(options)
        if config is not None and options:
            raise UsageError("give either config or options, not both")
        self.path = Path(path) if path is not None else embedded_model()
        self.checkpoint: Checkpoint = open_checkpoint(self.path)
        self.model_config = config_of(self.checkpoint)
        self.tokenizer = Tokenizer(self.path)
        generation = self.path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        c, trained = self.config, self.model_config.num_experts_per_tok
        self.top_k = c.experts_per_token or trained
        if self.top_k > trained:
            raise UsageError(
                f"experts_per_token must be at most {trained}, the number that the model was trained with; got {self.top_k}"
            )
        if c.thread_count > usable_processors():
            _log.warning(
                "%d threads are more than the %d available processors, which is slower",
                c.thread_count,
                usable_processors(),
            )
        self.ops = self._make_ops()
        lossy = [f"{self.top_k} of {trained} experts per token"] if self.top_k < trained else []
        lossy += ["8-bit keys and values"] if c.kv_dtype == "int8" else []
        self.context_length, longest = (
            c.context_length or self._default_context(),
            self.model_config.max_position_embeddings,
        )
        if self.context_length > longest:
            if not c.beyond_trained_context:
                raise UsageError(
                    f"context_length must be at most {longest}, the context this model was trained for; got {self.context_length}; "
                    "beyond_trained_context=True allows more, but is lossy"
                )
            lossy.append(f"context of {self.context_length} tokens, trained for {longest}")
        self.lossy = ", ".join(lossy)
        layouts = expert_layouts(self.model_config, self.checkpoint)
        store = ExpertStore(layouts, direct=c.residency != "os")
        try:
            self.vram_plan, self.prefill_chunk = self._plan_vram(store)
            self.plan, self.prefill_chunk = self._plan(store)
            if self.plan.residency == "os" and c.residency == "auto":
                store.close()
                store = ExpertStore(layouts, direct=False)
            self.reader_name, reader = _make_reader(c, self.path)
            self.experts = ExpertCache(
                store,
                self.plan.slots,
                self.plan.ring_slots,
                c.policy,
                reader,
                self.plan.residency,
                c.verify,
                self.ops,
                self.plan.prefetch_slots,
                MemoryWatch(available_bytes, self.plan.available_bytes),
                self._vram_slots(),
                self._vram_watch(),
            )
            ops = instrument(self.ops) if instrument is not None else self.ops
            weights, experts = LoadedWeights(self.checkpoint, ops), RoutedExperts(self.experts, ops)
            self.model = build(self.model_config, weights, experts, self.top_k)
            self.experts.adapt()
            self.prefixes: PrefixCache | None = None
            if c.prefix_cache_bytes:
                self.keep_prefixes()
        except BaseException as error:
            store.close()
            self.ops.close()
            if isinstance(error, MemoryError):
                raise BudgetError("out of memory; check the limit set by ulimit -v") from None
            raise

    def _default_context(self) -> int:
        c, m = self.config, self.model_config
        context: int = m.max_position_embeddings
        if not c.context_memory_fraction:
            return min(DEFAULT_CONTEXT, context)
        budget = c.memory_bytes or default_budget(available_bytes())
        if isinstance(self.ops, GpuOps):
            budget = c.vram_bytes or default_budget(self.ops.free_bytes())
        room = int(budget * c.context_memory_fraction)
        while context > DEFAULT_CONTEXT and c.sequences * state_bytes(m.states, context, c.kv_dtype) > room:
            context = max(DEFAULT_CONTEXT, context // 2)
        return context

    def _make_ops(self) -> Ops:
        """The ops of the device that is asked for; with "auto", the first GPU if there is one. Raises DeviceError."""
        c = self.config
        gpu = device_number(c.device) if c.ops == "cpu" else None
        if gpu is None and c.vram_bytes is not None:
            raise UsageError("vram needs a GPU; device is cpu, or no NVIDIA GPU can be used (device=cuda says why)")
        return make_ops(c.ops, c.thread_count, c.isa, c.activation_bits, gpu, c.cpu_experts)

    def _plan_vram(self, store: ExpertStore) -> tuple[MemoryPlan | None, int]:
        """With a GPU, the plan of its memory, and the chunk size of prompts in tokens. With "auto", the CPU takes over if the GPU's memory
        is too small. Raises BudgetError."""
        c, m = self.config, self.model_config
        if not isinstance(self.ops, GpuOps):
            return None, 0
        try:
            return plan_vram(
                lambda tokens: scratch_bytes(m, tokens, self.context_length, 1),
                self.context_length,
                c.prefill_chunk,
                vram_bytes=c.vram_bytes,
                free_bytes=self.ops.free_bytes(),
                trunk_bytes=self.checkpoint.trunk_bytes(weight_map(m)),
                state_bytes=c.sequences * state_bytes(m.states, self.context_length, c.kv_dtype),
                slot_bytes=Vram.slot_bytes(store.layouts),
                layers=m.num_hidden_layers,
                num_experts=m.num_experts,
                top_k=self.top_k,
            )
        except BudgetError as error:
            if c.device != "auto":
                raise
            _log.warning("the GPU is not used: %s", error)
            self.ops = make_ops(c.ops, c.thread_count, c.isa, c.activation_bits)
            return None, 0

    def _plan(self, store: ExpertStore) -> tuple[MemoryPlan, int]:
        """The memory plan, and the chunk size of prompts in tokens."""
        c, m = self.config, self.model_config
        sizes: dict[str, Any] = {
            "memory_bytes": c.memory_bytes,
            "available_bytes": available_bytes(),
            "slot_bytes": store.slot_bytes,
            "layers": m.num_hidden_layers,
            "num_experts": m.num_experts,
            "top_k": self.top_k,
            "residency": c.residency,
            "direct": store.direct,
            "prefetch": c.prefetch,
        }
        if self.vram_plan is not None:
            return plan_beside_vram(self.vram_plan, state_bytes=c.prefix_cache_bytes, **sizes), self.prefill_chunk
        return plan_with_chunk(
            lambda tokens: scratch_bytes(m, tokens, self.context_length, c.thread_count),
            # No larger than the context, rounded up to whole chunks of the gated-delta form.
            min(c.prefill_chunk or DEFAULT_CHUNK, -(-self.context_length // LEAST_CHUNK) * LEAST_CHUNK),
            LEAST_CHUNK,
            trunk_bytes=self.checkpoint.trunk_bytes(weight_map(m)),
            state_bytes=c.sequences * state_bytes(m.states, self.context_length, c.kv_dtype) + c.prefix_cache_bytes,
            **sizes,
        )

    def _vram_slots(self) -> tuple[int, int, int] | None:
        """A GPU's slots, its ring slots, and how many of these are spare: all but one token's experts, up to _GPU_SPARE."""
        plan = self.vram_plan
        return None if plan is None else (plan.slots, plan.ring_slots, min(_GPU_SPARE, plan.ring_slots - self.top_k))

    def _vram_watch(self) -> Callable[[], int]:
        """Says how much of the GPU's memory other programs need; with a budget that leaves little, only what it leaves."""
        plan, ops = self.vram_plan, self.ops
        if plan is None or not isinstance(ops, GpuOps):
            return lambda: 0
        watch = MemoryWatch(ops.free_bytes, plan.available_bytes)
        watch.reserve_bytes = min(watch.reserve_bytes, max(0, plan.available_bytes - plan.used_bytes) // 4)
        return watch

    def describe(self) -> str:
        """One line that describes how memory is divided and how experts are read."""
        p, cached = self.plan, self.plan.slots - self.plan.ring_slots
        file_kind = "O_DIRECT" if self.experts.store.direct else "buffered"
        experts = (
            f"{min(cached, p.total_experts)} of {p.total_experts} experts cached"
            if p.residency == "slots"
            else "experts in the page cache"
        )
        if self.vram_plan is not None:
            v, near = self.vram_plan, self.vram_plan.slots - self.vram_plan.ring_slots
            return (
                f"{self.ops.description}, vram {format_bytes(v.budget_bytes)}: trunk {format_bytes(v.trunk_bytes)}, "
                f"context {format_bytes(v.state_bytes)} ({self.context_length} tokens), slots {format_bytes(v.slots_bytes)} "
                f"({min(near, v.total_experts)} of {v.total_experts} experts); memory {format_bytes(p.budget_bytes)}: "
                f"slots {format_bytes(p.slots_bytes)} ({experts}); {self.reader_name}, {file_kind}"
            )
        return (
            f"memory {format_bytes(p.budget_bytes)}: trunk {format_bytes(p.trunk_bytes)}, {self._state()}, "
            f"scratch {format_bytes(p.scratch_bytes)}, slots {format_bytes(p.slots_bytes)} ({experts}); "
            f"residency {p.residency}, {self.reader_name}, {file_kind}, {self.config.thread_count} threads{self._isa()}"
        )

    def _state(self) -> str:
        kept, several = self.config.prefix_cache_bytes, self.config.sequences
        size = f"{self.context_length} tokens" + (f" for each of {several}" if several > 1 else "")
        context = f"context {format_bytes(self.plan.state_bytes - kept)} ({size})"
        return context + (f", prefixes {format_bytes(kept)}" if kept else "")

    def _isa(self) -> str:
        return f", {self.ops.description}"

    def keep_prefixes(self, directory: Path | None = None, disk_bytes: int = 0) -> None:
        """Caches prompt states, in up to config.prefix_cache_bytes of memory and up to disk_bytes of `directory`; later sessions resume
        from the longest cached beginning of their prompt. Raises UsageError for a directory that cannot be used."""
        if self.prefixes is not None:
            self.prefixes.close()
            self._end_of_prefixes.detach()  # it would keep the old cache alive as long as the model
        memory = self.config.prefix_cache_bytes
        try:
            self.prefixes = PrefixCache(self.state_fingerprint(), memory, directory, disk_bytes)
            self._end_of_prefixes: weakref.finalize[..., LLM] = weakref.finalize(self, self.prefixes.stop_writing)
            self._end_of_prefixes.atexit = False
        except OSError as error:
            raise UsageError(f"{directory}: prefixes cannot be stored there: {error.strerror}") from None

    def state_fingerprint(self) -> str:
        """A hash of everything that a sequence's state depends on: the checkpoint, and how it is computed. 40 hex digits."""
        c = self.config
        parts = (self.checkpoint.fingerprint(), self.ops.fingerprint, c.kv_dtype, self.top_k, STATE_VERSION)
        return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()

    def checked(self, tokens: I64, params: SamplingParams, position: int = 0, unread: Sequence[int] = ()) -> I64:
        """`unread` and then `tokens` (T,), the tokens that a sequence at `position` has to read. Raises RequestError or UsageError if they
        cannot be run, before anything is allocated."""
        self.experts.store.check_process()
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UsageError("tokens must be a one-dimensional array of integers, as tokenizer.encode() returns")
        if tokens.shape[0] == 0:
            raise RequestError("the prompt is empty")
        vocabulary, longest = self.model_config.vocab_size, self.model_config.max_position_embeddings
        if int(tokens.min()) < 0:
            raise UsageError(f"a token must be at least 0; got {tokens.min()}")
        if int(tokens.max()) >= vocabulary:
            raise CheckpointError(
                f"{self.path}: tokenizer.json has token {tokens.max()}, but the model has only {vocabulary} tokens; use the model's own"
            )
        if params.logit_bias and max(params.logit_bias) >= vocabulary:
            raise UsageError(f"logit_bias: tokens must be below {vocabulary}; got {max(params.logit_bias)}")
        tokens = np.concatenate([np.array(unread, np.int64), tokens.astype(np.int64)])
        count, room = int(tokens.shape[0]), self.context_length - position
        if count + 1 > room:
            needed, fits = position + count + 1, max(room - 1, 0)
            advice = (
                f"set context_length={needed} or more" if needed <= longest else f"the model was trained for {longest}"
            )
            raise ContextLengthError(
                f"the prompt has {count} tokens, but the context has room for {fits}; {advice}", count, fits, longest
            )
        return tokens

    def session(self) -> Session:
        """A new, empty sequence."""
        self.experts.store.check_process()
        return Session(self)

    def sampling_params(self, **given: Unpack[SamplingOptions]) -> SamplingParams:
        """The checkpoint's generation_config.json, overridden by the arguments."""
        return SamplingParams.from_options(self.generation_config, str(self.path / "generation_config.json"), **given)

    def generate(
        self,
        prompt: str | ChatPrompt,
        params: SamplingParams | None = None,
        **given: Unpack[SamplingOptions],
    ) -> Iterator[GenerationResponse]:
        """Continues `prompt`. Sampling: `params`, or keywords such as temperature=0.7, seed=1, max_tokens=100."""
        if params is not None and given:
            raise UsageError("give either params or keywords, not both")
        if not isinstance(prompt, str | ChatPrompt):
            raise UsageError(f"a prompt must be str; got {type(prompt).__name__}")
        params = params or self.sampling_params(**given)
        return self.session().generate(self.tokenizer.encode(prompt, self.context_length - 1), params)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        **given: Unpack[SamplingOptions],
    ) -> Iterator[GenerationResponse]:
        """Answers messages ({"role": "user", "content": "…"}), formatted by the checkpoint's chat template."""
        if params is not None and given:
            raise UsageError("give either params or keywords, not both")
        return self.answer(self.tokenizer.chat_prompt(messages), params or self.sampling_params(**given))

    def answer(
        self, prompt: ChatPrompt, params: SamplingParams, progress: Callable[[int], None] | None = None
    ) -> Iterator[GenerationResponse]:
        """chat() with a rendered prompt. Reasoning and calls are in tags, whatever tokens the model uses for them. progress: receives the
        number of prompt tokens read so far."""
        tokens, family = self.tokenizer.encode(prompt, self.context_length - 1), self.tokenizer.family
        pieces = self.session().generate(tokens, params, progress, control_tokens=not family.plain)
        return pieces if family.plain else _as_plain_text(pieces, PlainText(family.parser(reasoning=True)))

    def close(self) -> None:
        """Frees the memory and closes the files. Does nothing in a forked process: they belong to the parent."""
        if not self.experts.store.mine:
            return
        if self.prefixes is not None:
            self.prefixes.close()
        self.experts.close()
        self.ops.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_plain_text(pieces: Iterator[GenerationResponse], text: PlainText) -> Iterator[GenerationResponse]:
    for piece in pieces:
        written = text.feed(piece.text)
        if piece.finish_reason is not None:
            written += text.finish(piece.finish_reason == "length")
        yield replace(piece, text=written)


def _make_reader(c: EngineConfig, path: Path) -> tuple[str, Any]:
    """A reader and its name: io_uring where the kernel allows it, else threads."""
    known = IoSettings.load(path)
    depth, split = c.queue_depth or known.queue_depth, c.split_bytes or known.split_bytes
    if c.reader != "pread":
        try:
            return "io_uring", _native.uring_reader(depth, split)
        except RuntimeError as error:
            if c.reader == "uring":
                raise UsageError(f"io_uring cannot be used here ({error}); use reader=pread") from None
    try:
        return "pread", _native.pread_reader(depth, split)
    except RuntimeError as error:
        raise BudgetError(
            f"{depth} reading threads cannot be started ({error}); use fewer, such as queue_depth=4"
        ) from None
