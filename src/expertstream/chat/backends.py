"""Chat backends: a model in this process, or a server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from ..engine import LLM
from ..errors import ExpertStreamError, RequestError, UsageError
from ..text.output import CallDelta, CallEnd, Content, Reasoning

__all__ = ["Answered", "Backend", "FunctionCall", "LocalBackend", "RemoteBackend", "ServerError"]

T = TypeVar("T")
Message = dict[str, Any]
MAX_BYTES = 16 << 20  # limit for one line or one response from a server
Progress = Callable[[int, int], None]


class ServerError(ExpertStreamError):
    """The server cannot be reached, or returned an error."""

    exit_code = 6


@dataclass
class Answered:
    """Statistics of an answer; its last event."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    ttft_seconds: float = 0.0
    decode_tps: float = 0.0
    hit_rate: float | None = None
    ended: str = "stop"
    seed: int | None = None


@dataclass(frozen=True)
class FunctionCall:
    """A complete call; arguments are typed by the function's schema."""

    name: str
    arguments: dict[str, Any]


Event = Content | Reasoning | FunctionCall | Answered


class Backend(Protocol):
    """Answers a conversation. Messages and tools have OpenAI's format, except that call arguments are objects, not JSON text."""

    name: str
    about: str

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool | None, progress: Progress
    ) -> Iterator[Event]:
        """Closing the iterator cancels the answer. thinking: None leaves it to the template. progress is called with the number of prompt
        tokens processed and the total. Raises ExpertStreamError."""

    def forget(self, messages: list[Message]) -> None:
        """Drops the cached state of a deleted conversation, if it is in this process."""


class LocalBackend:
    """A model in this process."""

    def __init__(self, llm: LLM, sampling: dict[str, Any]) -> None:
        self._llm, self._sampling = llm, sampling
        self.name, self.about = llm.path.resolve().name, llm.describe()
        llm.sampling_params(**sampling)  # reports invalid options before the first message

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool | None, progress: Progress
    ) -> Iterator[Event]:
        llm = self._llm
        switch = {} if thinking is None else {"enable_thinking": thinking}
        prompt = llm.tokenizer.chat_prompt(messages, template_variables=switch, tools=tools or None)
        tokens = llm.tokenizer.encode(prompt, llm.context_length - 1)
        given = {"max_tokens": llm.context_length, **{k: v for k, v in self._sampling.items() if v is not None}}
        if tools:  # a penalty on prompt tokens would penalize the names that a call has to repeat
            given["repetition_penalty"] = 1.0
        total = int(tokens.shape[0])
        pieces = llm.session().generate(
            tokens, llm.sampling_params(**given), lambda done: progress(done, total), control_tokens=True
        )
        family = llm.tokenizer.family
        parser = family.parser(tools, reasoning=family.reasons(prompt.text))
        answered = Answered()
        for piece in pieces:
            stats = piece.stats
            yield from _events(parser.feed(piece.text))
            answered = Answered(
                stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens, stats.ttft_seconds, stats.decode_tps,
                stats.decode_experts.hit_rate if piece.finish_reason else None, piece.finish_reason or "stop", stats.seed,
            )  # fmt: skip
        yield from _events(parser.finish(answered.ended == "length"))
        yield answered

    def forget(self, messages: list[Message]) -> None:
        tokenizer, prefixes = self._llm.tokenizer, self._llm.prefixes
        if prefixes is None:
            return
        try:
            tokens = tokenizer.encode(tokenizer.chat_prompt(messages))
        except ExpertStreamError:  # perhaps another model's conversation, which has no prefixes here
            return
        starts = tokenizer.message_starts(tokens)
        system = bool(messages) and messages[0]["role"] == "system"
        prefixes.forget(tokens, starts[1] if system and len(starts) > 1 else 0)


def _events(found: Iterable[Any]) -> Iterator[Content | Reasoning | FunctionCall]:
    """Yields complete calls; a truncated call becomes plain text, as in RemoteBackend."""
    written = ""
    for event in found:
        if isinstance(event, CallDelta):
            written += event.json
        elif isinstance(event, CallEnd):
            call = FunctionCall(event.name, event.arguments)
            yield call if event.complete else Content(f"{event.name} {written}")
            written = ""
        elif isinstance(event, Content | Reasoning):
            yield event


@dataclass
class _Call:
    name: str = ""
    arguments: str = ""


@dataclass
class RemoteBackend:
    """A server with OpenAI's API: `expertstream serve` or any other."""

    url: str
    key: str
    sampling: dict[str, Any]
    model: str = ""
    about: str = ""
    _client: Any = field(init=False, default=None)
    _failures: tuple[type[Exception], ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        try:
            import httpx
        except ImportError:
            raise UsageError("--url needs the package httpx: pip install 'expertstream[chat]'") from None
        self._failures = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError, RecursionError)
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--url must be an address such as http://127.0.0.1:8080; got {self.url!r}")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(10, read=None))
        except (httpx.InvalidURL, ValueError) as error:
            raise UsageError(f"--url: {self.url!r} is not a valid address: {error}") from None
        try:
            models = self._get("/v1/models")
            names = [str(model["id"]) for model in models["data"]]
            self.model = self.model or names[0]
            if self.model not in names:
                raise UsageError(f"{self.url} has no model {self.model!r}; choose one of {', '.join(names)}")
        except (KeyError, IndexError, TypeError):
            self.close()
            raise ServerError(f"{self.url}: the list of models does not have the format of OpenAI's API") from None
        except ExpertStreamError:
            self.close()
            raise
        self.about = f"{self.model} at {self.url}"

    @property
    def name(self) -> str:
        return self.model

    def forget(self, messages: list[Message]) -> None:
        """Does nothing: the server manages its own cache."""

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def _get(self, path: str) -> Any:
        import httpx

        try:
            # These responses are short and immediate; only a chat has no timeout.
            with self._client.stream("GET", path, timeout=30) as response:
                body = _bounded(response.iter_bytes())
                _check(response, body)
            return json.loads(body)
        except httpx.ConnectError:
            raise ServerError(f"no server answers at {self.url}; is `expertstream serve` running there?") from None
        except self._failures as error:
            raise ServerError(f"{self.url}{path}: {error or type(error).__name__}") from None

    def _experts(self) -> tuple[int, int] | None:
        """Expert hits and misses so far; None unless the server is `expertstream serve`."""
        try:
            status = self._get("/status")
            return int(status["hits"]), int(status["misses"])
        except (ExpertStreamError, KeyError, TypeError, ValueError, OverflowError):
            return None

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool | None, progress: Progress
    ) -> Iterator[Event]:
        names = {"max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop"}
        body: dict[str, Any] = {
            "model": self.model, "messages": [_wire(m) for m in messages], "stream": True, "stream_options": {"include_usage": True},
            **{k: v for k, v in self.sampling.items() if v is not None and k in names},
        }  # fmt: skip
        if tools:
            body["tools"] = tools
        if thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": thinking}
        before, begin, first = self._experts(), time.perf_counter(), 0.0
        calls: dict[int, _Call] = {}
        answered = Answered()
        for chunk in self._chunks(body):
            if first == 0.0 and (chunk.reasoning or chunk.content or chunk.calls):
                first = time.perf_counter()
            if chunk.reasoning:
                yield Reasoning(chunk.reasoning)
            if chunk.content:
                yield Content(chunk.content)
            for index, name, arguments in chunk.calls:
                call = calls.setdefault(index, _Call())
                call.name += name
                call.arguments += arguments
            answered.ended = chunk.ended or answered.ended
            if chunk.usage is not None:
                answered.prompt_tokens, answered.generated_tokens, answered.cached_tokens = chunk.usage
        for call in calls.values():
            given = _object(call.arguments or "{}")
            if given is None:  # truncated, or not a JSON object
                yield Content(f"{call.name} {call.arguments}")
            else:
                yield FunctionCall(call.name, given)
        end = time.perf_counter()
        answered.ttft_seconds = (first or end) - begin
        if answered.generated_tokens > 1 and end > first > 0:
            answered.decode_tps = (answered.generated_tokens - 1) / (end - first)
        after = self._experts() if before is not None else None
        if before is not None and after is not None and sum(after) > sum(before):
            answered.hit_rate = (after[0] - before[0]) / (sum(after) - sum(before))
        yield answered

    def _chunks(self, body: dict[str, Any]) -> Iterator[_Chunk]:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    _check(response, _bounded(response.iter_bytes()))
                for line in _lines(response.iter_bytes()):
                    if line.startswith(b"data:") and line[5:].strip() not in (b"", b"[DONE]"):
                        yield _chunk(json.loads(line[5:]))
        except self._failures as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from None


@dataclass(frozen=True)
class _Chunk:
    """The contents of one stream event."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[int, str, str], ...] = ()  # index, name, part of the arguments
    ended: str = ""
    usage: tuple[int, int, int] | None = None  # tokens of the prompt, of the answer, and cached tokens of the prompt


def _chunk(given: Any) -> _Chunk:
    """Parses one event. Raises ServerError for an error from the server, ValueError for anything that OpenAI's API does not send."""
    if (error := _part(given, "error", object)) is not None:
        raise ServerError(str(error.get("message", error) if isinstance(error, dict) else error))
    usage = None
    if (counts := _part(given, "usage", dict)) is not None:
        known = _part(_part(counts, "prompt_tokens_details", dict) or {}, "cached_tokens", int)
        usage = (_part(counts, "prompt_tokens", int) or 0, _part(counts, "completion_tokens", int) or 0, known or 0)
    choices = _part(given, "choices", list)
    if not choices:
        return _Chunk(usage=usage)
    delta = _part(choices[0], "delta", dict) or {}
    calls = []
    for part in _part(delta, "tool_calls", list) or ():
        function = _part(part, "function", dict) or {}
        calls.append(
            (
                _part(part, "index", int) or 0,
                _part(function, "name", str) or "",
                _part(function, "arguments", str) or "",
            )
        )
    return _Chunk(
        _part(delta, "reasoning_content", str) or "",
        _part(delta, "content", str) or "",
        tuple(calls),
        _part(choices[0], "finish_reason", str) or "",
        usage,
    )


def _part(given: Any, name: str, kind: type[T]) -> T | None:
    """One field; None if it is missing or null. Raises ValueError if it has another type."""
    if not isinstance(given, dict):
        raise ValueError(f"the server sent {_short(given)} where OpenAI's API has an object")
    found = given.get(name)
    if found is not None and not isinstance(found, kind):
        raise ValueError(f"the server sent {_short(found)} as {name!r}; expected {kind.__name__}")
    if isinstance(found, str):  # a lone surrogate can be neither printed nor sent
        return cast(T, found.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    return found


def _short(given: Any) -> str:
    text = json.dumps(given)
    return text if len(text) <= 60 else text[:60] + "…"


def _bounded(parts: Iterable[bytes]) -> bytes:
    """All parts joined. Raises ValueError beyond MAX_BYTES."""
    whole = bytearray()
    for part in parts:
        whole += part
        if len(whole) > MAX_BYTES:
            raise ValueError(f"the server's answer is longer than {MAX_BYTES >> 20} MiB")
    return bytes(whole)


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Splits at line feeds only, not at Unicode's other line separators. Raises ValueError for a line longer than MAX_BYTES."""
    pending: list[bytes] = []
    size = 0
    for part in parts:
        first, *more = part.split(b"\n")
        pending.append(first)
        size += len(first)
        if size > MAX_BYTES:
            raise ValueError(f"the server sent a line of more than {MAX_BYTES >> 20} MiB")
        for line in more:
            yield b"".join(pending)
            pending, size = [line], len(line)
    yield b"".join(pending)


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _wire(message: Message) -> Message:
    """The message with call arguments as JSON text, as the API requires."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    wired = [
        {**c, "id": c["id"], "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in calls
    ]
    return {**message, "tool_calls": wired}


def _check(response: Any, body: bytes) -> None:
    if response.status_code == 200:
        return
    try:
        said = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        said = body[:200].decode("utf-8", "replace") or response.reason_phrase
    if response.status_code == 400:
        raise RequestError(said)
    raise ServerError(f"the server returned {response.status_code}: {said}")
