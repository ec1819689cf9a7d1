"""Session: one sequence of a model, with its state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .formats.numbers import F32, I64
from .generate import Driver, Forward, NotFiniteError, Step, drive, stream_generate
from .kv_cache import make_cache
from .prefix_cache import GRAIN, PrefixCache, snapshot_positions
from .responses import ExpertSpans, GenerationResponse, GenerationStats, StopStrings, TokenLogprob
from .sampling import Choice, Constraint, Sampler, SamplingParams, scored
from .state_file import StateFile, StateFileError, write_state
from .text.tokenizer import Detokenizer

if TYPE_CHECKING:
    from .engine import LLM

__all__ = ["Session"]

_log = logging.getLogger("expertstream")
KEEP_EVERY = 4096  # tokens between snapshots of a long prompt, in addition to those at messages


class Session:
    """One sequence of a model: the text read and written so far, and its state."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._unread: list[int] = []  # the last token of an answer: written, but not yet in the cache
        self.cache = make_cache(llm.model_config.states, llm.context_length, llm.config.kv_dtype, llm.ops.state)

    def generate(
        self,
        tokens: I64,
        params: SamplingParams,
        progress: Callable[[int], None] | None = None,
        control_tokens: bool = False,
        constraint: Constraint | None = None,
    ) -> Iterator[GenerationResponse]:
        """Appends tokens (T,) to the text and continues it. `progress` receives the number of prompt tokens read so far. With
        `control_tokens`, the text includes control tokens such as <think> and <tool_call>. `constraint` restricts which tokens may
        come next. Raises RequestError before any work if the tokens do not fit."""
        return drive(self.llm.model, self.steps(tokens, params, progress, control_tokens, constraint))

    def steps(
        self,
        tokens: I64,
        params: SamplingParams,
        progress: Callable[[int], None] | None = None,
        control_tokens: bool = False,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> Generator[Forward | GenerationResponse, F32 | None, None]:
        """generate() for callers that run the passes and send the logits of each Forward that it yields. prompt_logprobs: the first
        response has the log-probabilities of the prompt's tokens, with so many alternatives each; no cached prefix is used."""
        if not self.cache.valid:
            raise RequestError("this session stopped in the middle of a token; call reset()")
        tokens = self.llm.checked(tokens, params, self.cache.position, self._unread)
        room = self.cache.capacity - self.cache.position
        # The last token's own state is never needed, so an answer may be one longer than the room.
        limited = replace(params, max_tokens=min(params.max_tokens, room - tokens.shape[0] + 1))
        return self._pieces(tokens, limited, progress, control_tokens, constraint, prompt_logprobs)

    def reset(self) -> None:
        """Clears the sequence."""
        self.cache.reset()
        self._unread = []

    def save(self, path: Path) -> None:
        """Writes the state to a file, from which load() resumes without reading the text again. Raises OSError."""
        if not self.cache.valid:
            raise RequestError("this session stopped in the middle of a token; call reset()")
        arrays: list[Any] = []
        for rows in self.cache.rows:
            arrays += rows.rows(0, self.cache.position)
        for state in self.cache.snapshots:
            arrays += state.copies(self.cache.position)
        header = {"of": self.llm.state_fingerprint(), "position": self.cache.position, "unread": self._unread}
        write_state(path, header, arrays)

    def load(self, path: Path) -> None:
        """Loads the state that save() wrote. Raises RequestError for a file that is damaged, too long for this context, or from another
        model; the session is then empty."""
        self.reset()
        try:
            file = StateFile.open(path)
            if file.header.get("of") != self.llm.state_fingerprint():
                raise StateFileError(f"{path}: from another model, or computed with other settings")
            position = file.integer("position")
            if position >= self.cache.capacity:
                raise StateFileError(f"{path}: its {position} tokens do not fit this context")
            at = 0
            for layer in self.cache.rows:
                expected = layer.row_shapes(position)
                layer.put(0, file.read(at, at + len(expected), expected))
                at += len(expected)
            for state in self.cache.snapshots:
                expected = state.shapes()
                state.restore(position, file.read(at, at + len(expected), expected))
                at += len(expected)
            unread = file.header.get("unread")
            known = range(self.llm.model_config.vocab_size)
            if not isinstance(unread, list) or not all(type(t) is int and t in known for t in unread):
                raise StateFileError(f"{path}: contains tokens outside the model's vocabulary")
            self._unread = unread
            self.cache.position = position
        except (StateFileError, OSError, IndexError, ValueError) as error:
            self.reset()
            raise RequestError(f"the session's state cannot be used: {error}") from None

    def _pieces(
        self,
        tokens: I64,
        params: SamplingParams,
        progress: Callable[[int], None] | None,
        control_tokens: bool,
        constraint: Constraint | None,
        prompt_logprobs: int | None,
    ) -> Generator[Forward | GenerationResponse, F32 | None, None]:
        llm = self.llm
        scores: list[TokenLogprob] | None = None
        if prompt_logprobs is not None:
            scores = [self._logprob(Choice(int(tokens[0]), None, ()))]
            self.cache.each_logits = self._scorer(tokens, scores, prompt_logprobs)
        sampler = Sampler(params, tokens.tolist(), constraint)
        experts = ExpertSpans(llm.experts.stats)
        stats = GenerationStats(int(tokens.shape[0]), seed=sampler.params.seed or 0, lossy=llm.lossy, experts=experts)
        detokenizer, stops = Detokenizer(llm.tokenizer, not control_tokens), StopStrings(params.stop)
        # Only a sequence that begins here can share a prefix with others; and log-probabilities need every pass.
        prefixes = llm.prefixes if self.cache.position == 0 and scores is None else None
        if prefixes is not None:
            stats.cached_tokens = prefixes.restore(tokens, self.cache)
            if prefixes.holds(self.cache):
                starts = llm.tokenizer.message_starts(tokens)
                self.cache.keep = snapshot_positions(len(tokens), starts, KEEP_EVERY)
        steps: Driver[Step] = Driver(
            stream_generate(
                self.cache, tokens[stats.cached_tokens :], sampler, llm.tokenizer.eos_ids, llm.prefill_chunk, progress
            )
        )
        begun: tuple[int, list[list[F32]]] | None = None
        try:
            while True:
                try:
                    step = next(steps, None)
                except NotFiniteError as error:
                    if prefixes is None or stats.generated_tokens:
                        raise
                    prefixes.forget(tokens)
                    if not stats.cached_tokens:
                        raise
                    # The cached state may be damaged in a way that no checksum detects: read the whole prompt again, once.
                    _log.warning("a cached prefix is dropped: %s", error)
                    keep = self.cache.keep
                    self.cache.reset()
                    self.cache.keep = keep
                    stats.cached_tokens, begun = 0, None
                    steps = Driver(
                        stream_generate(self.cache, tokens, sampler, llm.tokenizer.eos_ids, llm.prefill_chunk, progress)
                    )
                    continue
                if step is None:
                    return
                if isinstance(step, Forward):
                    if not step.prompt:
                        self.cache.each_logits = None
                    if step.prompt and prefixes is not None and (begun is None or begun[0] != self.cache.position):
                        begun = self._states()
                    try:
                        logits = yield step
                        assert logits is not None
                        steps.answer(logits)
                        self._unread = []
                    except GeneratorExit:
                        if step.prompt and prefixes is not None and prefixes.holds(self.cache):
                            self._keep_abandoned(prefixes, tokens, begun)
                        raise
                    if step.prompt and prefixes is not None:
                        begun = self._snapshot()
                        try:
                            prefixes.insert(tokens, self.cache)
                        except Exception:  # perhaps out of memory; the answer does not depend on it
                            _log.exception("a prefix cannot be cached")
                    continue
                piece = self._piece(step, params, stats, detokenizer, stops)
                if scores is not None:
                    piece, scores = replace(piece, prompt_logprobs=tuple(scores)), None
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            steps.close()

    def _scorer(self, tokens: I64, scores: list[TokenLogprob], count: int) -> Callable[[F32], None]:
        """Receives the logits of all tokens, a few rows at a time, and appends the log-probabilities of their successors."""

        def score(logits: F32) -> None:
            for row in logits:
                if len(scores) < tokens.shape[0]:
                    scores.append(self._logprob(scored(int(tokens[len(scores)]), row, count)))

        return score

    def _logprob(self, choice: Choice) -> TokenLogprob:
        text, raw = self.llm.tokenizer.token_text, self.llm.tokenizer.token_bytes
        return TokenLogprob(
            text(choice.token),
            choice.logprob,
            tuple((text(t), p) for t, p in choice.top_logprobs),
            raw(choice.token),
            tuple(raw(t) for t, _ in choice.top_logprobs),
        )

    def _states(self) -> tuple[int, list[list[F32]]] | None:
        """The position, and copies of the states there that cannot be rewound; None where a prompt cannot be resumed."""
        position = self.cache.position
        if not position or position % GRAIN:
            return None
        return position, [state.copies(position) for state in self.cache.snapshots]

    def _snapshot(self) -> tuple[int, list[list[F32]]] | None:
        """As _states(), but without copying: the snapshots that the last pass took, None if it took none here."""
        position = self.cache.position
        states = self.cache.snapshots
        if position % GRAIN or not all(position in state.kept for state in states):
            return None
        return position, [state.kept[position] for state in states]

    def _keep_abandoned(self, prefixes: PrefixCache, tokens: I64, begun: tuple[int, list[list[F32]]] | None) -> None:
        """Caches what was computed of a cancelled prompt, without the interrupted pass; begun: the states before that pass."""
        found = (self._states() if self.cache.valid else None) or begun
        if found is None:
            return
        position, states = found
        for state, copies in zip(self.cache.snapshots, states, strict=True):
            state.kept[position] = copies
        self.cache.keep |= {position}
        try:
            prefixes.insert(tokens, self.cache)
        except Exception:  # perhaps out of memory; the request is over
            _log.exception("a prefix cannot be cached")

    def _piece(
        self, step: Step, params: SamplingParams, stats: GenerationStats, detokenizer: Detokenizer, stops: StopStrings
    ) -> GenerationResponse:
        """The response for one more token."""
        llm, token = self.llm, step.choice.token
        stats.generated_tokens += 1
        if stats.generated_tokens == 1:
            stats.ttft_seconds = step.seconds
            stats.experts.end_prefill()
        else:
            stats.decode_seconds += step.seconds
        logprob, reason = None, None
        self._unread = [token]
        if step.choice.logprob is not None:
            logprob = self._logprob(step.choice)
        ended = token in llm.tokenizer.eos_ids
        piece = stops.add("" if ended else detokenizer.add(token))
        if ended or stats.generated_tokens == params.max_tokens:
            reason = "stop" if ended else "length"
            if not stops.found:
                piece += stops.add(detokenizer.flush())
            piece += stops.rest()
        if stops.found:
            reason, stats.stop_string = "stop", stops.found
        if reason is not None:
            stats.experts.end()
        return GenerationResponse(piece, token, logprob, reason, stats)
