"""Who answers: a model in this process, or a server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..engine import LLM
from ..errors import ExpertStreamError, RequestError, UsageError
from ..text.output import CallDelta, CallEnd, Content, OutputParser, Reasoning

__all__ = ["Answered", "Backend", "FunctionCall", "LocalBackend", "RemoteBackend", "ServerError"]

Message = dict[str, Any]
Progress = Callable[[int, int], None]


class ServerError(ExpertStreamError):
    """A server that cannot be reached, or says no."""

    exit_code = 6


@dataclass
class Answered:
    """What an answer took; the last of its events."""

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
    """A whole call; arguments have the types that the function's schema gives them."""

    name: str
    arguments: dict[str, Any]


Event = Content | Reasoning | FunctionCall | Answered


class Backend(Protocol):
    """Answers a conversation. Messages and tools are as in OpenAI's API, but that arguments of calls are objects."""

    name: str
    about: str

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool | None, progress: Progress
    ) -> Iterator[Event]:
        """Closing it ends the answer. thinking: None leaves it to the template. progress: tokens of the prompt done, and all of them.
        Raises ExpertStreamError."""


class LocalBackend:
    """A model in this process."""

    def __init__(self, llm: LLM, sampling: dict[str, Any]) -> None:
        self._llm, self._sampling = llm, sampling
        self.name, self.about = llm.path.resolve().name, llm.describe()
        llm.sampling_params(**sampling)  # mistakes are told before anything is said

    def reply(
        self, messages: list[Message], tools: list[dict[str, Any]], thinking: bool | None, progress: Progress
    ) -> Iterator[Event]:
        llm = self._llm
        switch = {} if thinking is None else {"enable_thinking": thinking}
        prompt = llm.tokenizer.chat_prompt(messages, template_variables=switch, tools=tools or None)
        tokens = llm.tokenizer.encode(prompt)
        given = {"max_tokens": llm.context_length, **{k: v for k, v in self._sampling.items() if v is not None}}
        if tools:  # a penalty for what was read before would be one for the names that a call has to repeat
            given["repetition_penalty"] = 1.0
        total = int(tokens.shape[0])
        pieces = llm.session().generate(
            tokens, llm.sampling_params(**given), lambda done: progress(done, total), control_tokens=True
        )
        parser = OutputParser(tools, reasoning=prompt.text.rstrip().endswith("<think>"))
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


def _events(found: Iterable[Any]) -> Iterator[Content | Reasoning | FunctionCall]:
    """Calls as a whole; one that was cut as the text that it is, as RemoteBackend gives it."""
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
    """A server with OpenAI's API, ours or another's."""

    url: str
    key: str
    sampling: dict[str, Any]
    model: str = ""
    about: str = ""
    _client: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            import httpx
        except ImportError:
            raise UsageError("--url needs the package httpx: pip install 'expertstream[chat]'") from None
        self._httpx = httpx
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--url is an address such as http://127.0.0.1:8080, not {self.url!r}")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(10, read=None))
        try:
            models = self._get("/v1/models")
            names = [str(model["id"]) for model in models["data"]]
            self.model = self.model or names[0]
            if self.model not in names:
                raise UsageError(f"{self.url} has no model {self.model!r}, but {', '.join(names)}")
        except (KeyError, IndexError, TypeError):
            self.close()
            raise ServerError(f"{self.url}: does not list models as OpenAI's API does") from None
        except ExpertStreamError:
            self.close()
            raise
        self.about = f"{self.model} at {self.url}"

    @property
    def name(self) -> str:
        return self.model

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _get(self, path: str) -> Any:
        try:
            response = self._client.get(path)
            _check(response)
            return response.json()
        except self._httpx.ConnectError:
            raise ServerError(f"no server answers at {self.url}; is `expertstream serve` running there?") from None
        except (self._httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from None

    def _experts(self) -> tuple[int, int] | None:
        """Hits and misses so far, where the server is ours."""
        try:
            status = self._get("/status")
            return int(status["hits"]), int(status["misses"])
        except (ServerError, KeyError, TypeError):
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
        answered, usage = Answered(), dict[str, Any]()
        for chunk in self._chunks(body):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ())[:1]:
                delta = choice.get("delta", {})
                first = first or (time.perf_counter() if len(delta) and "role" not in delta else 0.0)
                if delta.get("reasoning_content"):
                    yield Reasoning(delta["reasoning_content"])
                if delta.get("content"):
                    yield Content(delta["content"])
                for part in delta.get("tool_calls") or ():
                    call = calls.setdefault(part.get("index", 0), _Call())
                    call.name += part["function"].get("name") or ""
                    call.arguments += part["function"].get("arguments") or ""
                answered.ended = choice.get("finish_reason") or answered.ended
        for call in calls.values():
            arguments = _object(call.arguments or "{}")
            if arguments is None:  # it was cut, or is none
                yield Content(f"{call.name} {call.arguments}")
            else:
                yield FunctionCall(call.name, arguments)
        end = time.perf_counter()
        answered.prompt_tokens = usage.get("prompt_tokens", 0)
        answered.generated_tokens = usage.get("completion_tokens", 0)
        answered.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        answered.ttft_seconds = (first or end) - begin
        if answered.generated_tokens > 1 and end > first > 0:
            answered.decode_tps = (answered.generated_tokens - 1) / (end - first)
        after = self._experts() if before is not None else None
        if before is not None and after is not None and sum(after) > sum(before):
            answered.hit_rate = (after[0] - before[0]) / (sum(after) - sum(before))
        yield answered

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    _check(response)
                for line in _lines(response.iter_bytes()):
                    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                        continue
                    chunk = json.loads(line[6:])
                    error = chunk.get("error")
                    if error is not None:
                        raise ServerError(str(error.get("message", error) if isinstance(error, dict) else error))
                    yield chunk
        except (self._httpx.HTTPError, ValueError) as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from None


def _lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Ended by line feeds, and by nothing else that Unicode knows as a line's end."""
    held = b""
    for part in parts:
        *lines, held = (held + part).split(b"\n")
        yield from lines
    yield held


def _object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _wire(message: Message) -> Message:
    """With arguments as the text that the API has them in."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    wired = [
        {**c, "id": c["id"], "function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}}
        for c in calls
    ]
    return {**message, "tool_calls": wired}


def _check(response: Any) -> None:
    if response.status_code == 200:
        return
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200] or response.reason_phrase
    if response.status_code == 400:
        raise RequestError(said)
    raise ServerError(f"the server says {response.status_code}: {said}")
