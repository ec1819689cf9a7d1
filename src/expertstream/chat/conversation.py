"""The turns and commands of a chat, independent of the user interface: input lines go in, a View shows the results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ExpertStreamError, RequestError
from ..text.output import Content, Reasoning
from ..text.visible import one_line
from .backends import Answered, Backend, FunctionCall
from .sessions import Conversation, SessionStore
from .tools import ToolSource

__all__ = ["COMMANDS", "Chat", "View"]

MAX_ROUNDS = 16  # rounds of calls in one turn

COMMANDS = {
    "/help": "show this list",
    "/new": "start a new session",
    "/system [TEXT]": "show the system prompt, or set it (- for none)",
    "/undo": "remove the last turn",
    "/retry": "answer the last message again",
    "/save NAME": "name this session (it is saved after every turn anyway)",
    "/sessions": "list the saved sessions",
    "/resume NAME": "resume a saved session",
    "/rename NAME": "rename this session",
    "/delete NAME": "delete a session",
    "/export FILE": "write the conversation as Markdown",
    "/think [on|off|fold|show]": "let the model reason first; show its reasoning or fold it",
    "/stats": "show statistics of the last answer",
    "/quit": "quit (or Ctrl-D)",
}


class View(Protocol):
    """The user interface."""

    def note(self, text: str) -> None:
        """Shows text that is not part of the conversation."""

    def answer(self, fold: bool) -> contextlib.AbstractContextManager[AnswerView]:
        """Shows an answer as it is generated."""

    def consent(self, what: str) -> bool:
        """Asks the user for consent."""

    def output(self, text: str) -> None:
        """Shows the result of a call."""

    def replay(self, messages: Sequence[dict[str, Any]]) -> None:
        """Shows a resumed conversation."""


class AnswerView(Protocol):
    """One answer as it is generated."""

    def progress(self, done: int, total: int) -> None: ...

    def reasoning(self, text: str) -> None: ...

    def content(self, text: str) -> None: ...


@dataclass
class Chat:
    """run() returns False when the chat ends."""

    backend: Backend
    store: SessionStore | None  # None: nothing is saved
    conversation: Conversation
    view: View
    tools: Sequence[ToolSource] = ()
    ask_consent: bool = True
    thinking: bool | None = None  # None: left to the model's template
    fold: bool = True
    # Removes these texts, and everything typed in a session, from the input history. Raises OSError.
    forget_typed: Callable[[str, Collection[str]], None] | None = field(default=None, init=False)
    last: Answered | None = field(default=None, init=False)

    def run(self, line: str) -> bool:
        """Handles a message or a command. Errors are shown, and lose nothing."""
        line = line.strip()
        if not line:
            return True
        try:
            if line.startswith("/"):
                name, _, rest = line.partition(" ")
                return self._command(name, rest.strip())
            self.say(line)
        except ExpertStreamError as error:
            self.view.note(f"✗ {one_line(str(error))}")
        return True

    def say(self, text: str) -> None:
        """Sends a message. Raises ExpertStreamError; a message without any answer is then removed again."""
        self.conversation.messages.append({"role": "user", "content": text})
        self._answer()

    def _answer(self) -> None:
        """Answers the last message, running calls as long as the model makes any."""
        begin = len(self.conversation.messages)
        try:
            for _ in range(MAX_ROUNDS):
                calls = self._generate()
                if not calls or not self._call_all(calls):
                    break
            else:
                self.view.note(f"stopped after {MAX_ROUNDS} rounds of calls")
        except ExpertStreamError:
            if len(self.conversation.messages) == begin:  # no answer: the user can send the message again
                self.conversation.messages.pop()
            raise
        finally:
            self.save()

    def _generate(self) -> list[dict[str, Any]]:
        """Adds one answer to the conversation; returns its calls."""
        schemas = [schema for source in self.tools for schema in source.schemas()]
        said: dict[str, Any] = {"role": "assistant", "content": ""}
        calls: list[dict[str, Any]] = []
        stopped = False
        with self.view.answer(self.fold) as shown:
            events = self.backend.reply(self.conversation.prompt(), schemas, self.thinking, shown.progress)
            try:
                for event in _closing(events):
                    if isinstance(event, Content):
                        said["content"] += event.text
                        shown.content(event.text)
                    elif isinstance(event, Reasoning):
                        said["reasoning_content"] = said.get("reasoning_content", "") + event.text
                        shown.reasoning(event.text)
                    elif isinstance(event, FunctionCall):
                        function = {"name": event.name, "arguments": event.arguments}
                        number = sum(len(m.get("tool_calls") or ()) for m in self.conversation.messages) + len(calls)
                        calls.append({"id": f"call_{number}", "type": "function", "function": function})
                    else:
                        self.last = event
            except KeyboardInterrupt:
                calls, self.last, stopped = [], None, True
                said["content"] += " …" if said["content"] else ""
        if calls:
            said["tool_calls"] = calls
        self.conversation.messages.append(said)
        if stopped:
            self.view.note("stopped")
        return calls

    def _call_all(self, calls: list[dict[str, Any]]) -> bool:
        """Runs the permitted calls and adds the results to the conversation; False if the user interrupted."""
        for i, call in enumerate(calls):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                result = self._call(name, arguments)
            except KeyboardInterrupt:
                for left in calls[i:]:
                    self._result(left, "the user stopped this")
                self.view.note("stopped")
                return False
            self._result(call, result)
        return True

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        for source in self.tools:
            if any(schema["function"]["name"] == name for schema in source.schemas()):
                what = source.describe(name, arguments)
                if not self.ask_consent:
                    self.view.note(what)
                elif not self.view.consent(what):
                    return "the user does not want this to be done"
                result = source.call(name, arguments)
                self.view.output(result)
                return result
        return f"error: there is no function {name}"

    def _result(self, call: dict[str, Any], text: str) -> None:
        self.conversation.messages.append({"role": "tool", "tool_call_id": call["id"], "content": text})

    def save(self) -> None:
        """Saves the session; a failure is shown, not raised."""
        if self.store is None or not self.conversation.messages:
            return
        self.conversation.model = self.backend.name
        try:
            taken = self.store.save(self.conversation)
            if taken is not None:
                self.view.note(
                    f"another chat continued the session {taken!r}; this one is now {self.conversation.name!r}"
                )
        except RequestError as error:
            self.view.note(f"✗ {one_line(str(error))}")

    def _command(self, name: str, rest: str) -> bool:
        if name in ("/quit", "/exit", "/q"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/new": self._new, "/system": self._system, "/undo": self._undo, "/retry": self._retry,
            "/save": self._rename, "/rename": self._rename, "/sessions": self._sessions, "/resume": self.resume,
            "/delete": self._delete, "/export": self._export, "/think": self._think, "/stats": self._stats,
        }  # fmt: skip
        if name not in commands:
            raise RequestError(f"unknown command {name}; /help lists all commands")
        commands[name](rest)
        return True

    def _help(self, _: str) -> None:
        self.view.note("\n".join(f"{name:27} {text}" for name, text in COMMANDS.items()))

    def _new(self, _: str) -> None:
        fresh = new_name(self.store)
        self.conversation = Conversation(fresh, self.conversation.system)
        self.view.note("new session")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = "" if rest == "-" else rest
        self.view.note(self.conversation.system or "no system prompt")

    def _undo(self, _: str) -> None:
        said = self.conversation.undo()
        if said is None:
            raise RequestError("there is nothing to undo")
        self.save()
        self.view.note(f"removed: {said}")

    def _retry(self, _: str) -> None:
        before = list(self.conversation.messages)
        said = self.conversation.undo()
        if said is None:
            raise RequestError("there is no message to answer")
        try:
            self.say(said)
        except ExpertStreamError:
            self.conversation.messages[:] = before
            self.save()
            raise

    def _stored(self) -> SessionStore:
        if self.store is None:
            raise RequestError("this chat has no saved sessions: it was started with --no-save")
        return self.store

    def _rename(self, rest: str) -> None:
        if not rest:
            raise RequestError("give a name")
        self._stored().rename(self.conversation, rest)
        self.view.note(f"saved as {rest}")

    def _sessions(self, _: str) -> None:
        lines = self._stored().listing()
        mark = self.conversation.name + "\t"
        self.view.note("\n".join(f"{'*' if x.startswith(mark) else ' '} {x}" for x in lines) or "no sessions yet")

    def resume(self, rest: str) -> None:
        """Resumes a saved session. Raises RequestError."""
        self.conversation = self._stored().load(rest)
        self.view.replay(self.conversation.messages)

    def _delete(self, rest: str) -> None:
        """Deletes a session, its input history and its cached state."""
        store, found = self._stored(), None
        with contextlib.suppress(RequestError):  # an unreadable session can still be deleted
            found = store.load(rest)
        store.delete(rest)
        if found is not None:
            self.backend.forget(found.prompt())
        texts = [str(m.get("content", "")) for m in found.messages if m["role"] == "user"] if found is not None else []
        if self.forget_typed is not None:
            try:
                self.forget_typed(rest, texts)
            except (OSError, UnicodeDecodeError) as error:
                self.view.note(f"✗ its messages are still in the input history: {error}")
        self.view.note(f"deleted {rest}")
        if rest == self.conversation.name:  # otherwise the next turn would save it again
            self._new("")

    def _export(self, rest: str) -> None:
        if not rest:
            raise RequestError("give a file to write to")
        try:
            path = Path(rest).expanduser()
        except RuntimeError:
            raise RequestError(f"{rest}: unknown user; give the full path") from None
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.conversation.markdown())
        except FileExistsError:
            raise RequestError(f"{path} already exists; choose another name") from None
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
        self.view.note(f"written to {path}")

    def _think(self, rest: str) -> None:
        if rest in ("on", "off"):
            self.thinking = rest == "on"
        elif rest in ("fold", "show"):
            self.fold = rest == "fold"
        elif rest:
            raise RequestError(f"/think must be on, off, fold or show; got {rest!r}")
        state = {None: "left to the model's template", True: "on", False: "off"}[self.thinking]
        self.view.note(f"reasoning is {state}, and {'folded' if self.fold else 'shown'}")

    def _stats(self, _: str) -> None:
        self.view.note(f"{self.backend.about}\n{stats_line(self.last)}" if self.last else self.backend.about)


def stats_line(stats: Answered) -> str:
    """A readable summary on one line."""
    parts = [
        f"{stats.decode_tps:.1f} tokens/s",
        f"first token after {stats.ttft_seconds:.2f} s",
        f"{stats.generated_tokens} tokens",
        f"prompt {stats.prompt_tokens}, {stats.cached_tokens} cached",
    ]
    if stats.hit_rate is not None:
        parts.append(f"hit rate {stats.hit_rate:.0%}")
    if stats.ended == "length":
        parts.append("stopped at the maximum length")
    return " · ".join(parts)


def new_name(store: SessionStore | None) -> str:
    """An unused session name, made from the current time."""
    stem = time.strftime("%Y-%m-%d %H.%M.%S")
    taken, number, name = set(store.names()) if store is not None else set(), 1, stem
    while name in taken:
        number += 1
        name = f"{stem} - {number}"
    return name


def _closing(events: Iterator[Any]) -> Iterator[Any]:
    """Closes the iterator however the loop ends."""
    try:
        yield from events
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()
