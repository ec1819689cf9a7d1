"""Output on a terminal: Markdown as it is generated, folded reasoning, progress of long prompts; plain text in a pipe."""

from __future__ import annotations

import contextlib
import re
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from ..text.visible import excerpt, spelled_out, visible

__all__ = ["PlainView", "TerminalView"]

_MAX_LINES = 24  # shown of a call's result


class TerminalView:
    """Output on a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)

    def note(self, text: str) -> None:
        self.console.print(Text(visible(text), style="dim"))

    @contextmanager
    def answer(self, fold: bool) -> Iterator[_LiveAnswer]:
        with (
            _quiet_keyboard(),
            Live(console=self.console, refresh_per_second=12, transient=True, auto_refresh=False) as live,
        ):
            shown = _LiveAnswer(self.console, live, fold)
            try:
                yield shown
            finally:
                shown.finish()

    def consent(self, what: str) -> bool:
        whole = spelled_out(what)
        shown = excerpt(whole, self.console.width, self.console.height - 4)
        self.console.print(Text(shown, style="bold yellow"), soft_wrap=True)
        choices = "y/n" if shown == whole else "y/n, a shows all"
        with contextlib.suppress(termios.error, OSError, ValueError):
            termios.tcflush(sys.stdin, termios.TCIFLUSH)  # discards keys typed before the question
        while True:
            try:
                said = self.console.input(f"[yellow]run this? \\[{choices}][/] ").strip().lower()
            except EOFError:
                return False
            if said in ("a", "all"):
                self.console.print(Text(whole, style="bold yellow"), soft_wrap=True)
            elif said in ("y", "yes", "n", "no", ""):
                return said.startswith("y")

    def output(self, text: str) -> None:
        lines = visible(text).splitlines()
        shown = lines[:_MAX_LINES]
        if len(lines) > len(shown):
            shown.append(f"… {len(lines) - len(shown)} more lines")
        self.console.print(Padding(Text("\n".join(shown), style="dim"), (0, 0, 0, 2)))

    def replay(self, messages: Sequence[dict[str, Any]]) -> None:
        for message in messages:
            if message["role"] == "user":
                self.console.print(Text(visible(f"> {message['content']}"), style="bold"))
            elif message["role"] == "tool":
                self.output(str(message.get("content", "")))
            elif message.get("content"):
                self.console.print(Markdown(visible(message["content"])))


@contextmanager
def _quiet_keyboard() -> Iterator[None]:
    """Turns echo off during an answer; keys typed meanwhile go to the next input line."""
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError):
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class _LiveAnswer:
    """Prints complete blocks for good; redraws the incomplete one with every piece."""

    def __init__(self, console: Console, live: Live, fold: bool) -> None:
        self._console, self._live, self._fold = console, live, fold
        self._thought, self._text = "", ""
        self._drawn = 0.0
        self._live.update(Text("…", style="dim"), refresh=True)

    def progress(self, done: int, total: int) -> None:
        text = f"reading the prompt: {done:,} of {total:,} tokens" if done < total else "…"
        self._live.update(Text(text, style="dim"), refresh=True)

    def reasoning(self, text: str) -> None:
        self._thought += visible(text)
        words = len(self._thought.split())
        shown = f"thinking … {words} words" if self._fold else self._thought
        self._draw(Text(shown, style="dim italic"))

    def content(self, text: str) -> None:
        if self._thought:
            self._end_reasoning()
        self._text += visible(text)
        done = _whole_blocks(self._text)
        if done:
            self._console.print(Markdown(self._text[:done]))
            self._console.print()
            self._text = self._text[done:]
        self._draw(Markdown(self._text))

    def _end_reasoning(self) -> None:
        words = len(self._thought.split())
        shown = f"thought for {words} words (/think show)" if self._fold else self._thought
        self._console.print(Text(shown, style="dim italic"))
        self._thought = ""

    def _draw(self, what: Any) -> None:
        now = time.monotonic()
        if now - self._drawn > 1 / 15:
            self._drawn = now
            self._live.update(what, refresh=True)

    def finish(self) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        if self._thought:
            self._end_reasoning()
        if self._text.strip():
            self._console.print(Markdown(self._text))


def _whole_blocks(text: str) -> int:
    """The length of the complete blocks: up to the last blank line outside a fence."""
    fences, place = 0, 0
    for match in re.finditer(r"^(?:```|~~~).*$|\n\n+(?=\S)", text, re.MULTILINE):
        if match[0].startswith("\n"):
            if fences % 2 == 0:
                place = match.end()
        else:
            fences += 1
    # A list continues after a blank line; printed in two parts, its numbering would restart.
    return 0 if re.match(r"\s*(?:[-*+]|\d+[.)])\s", text[place:]) else place


class PlainView:
    """Output to a pipe or file: answers on standard output, everything else on standard error."""

    def note(self, text: str) -> None:
        print(visible(text), file=sys.stderr, flush=True)

    @contextmanager
    def answer(self, fold: bool) -> Iterator[_PlainAnswer]:
        shown = _PlainAnswer(fold)
        try:
            yield shown
        finally:
            print(flush=True)

    def consent(self, what: str) -> bool:
        self.note(f"{spelled_out(what)}\nnot run: without a terminal nobody can consent; --yes allows it")
        return False

    def output(self, text: str) -> None:
        self.note(text)

    def replay(self, messages: Sequence[dict[str, Any]]) -> None:
        self.note(f"{len(messages)} messages")


class _PlainAnswer:
    def __init__(self, fold: bool) -> None:
        self._fold = fold

    def progress(self, done: int, total: int) -> None:
        pass

    def reasoning(self, text: str) -> None:
        if not self._fold:
            print(visible(text), end="", file=sys.stderr, flush=True)

    def content(self, text: str) -> None:
        print(visible(text), end="", flush=True)
