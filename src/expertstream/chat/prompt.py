"""The input line: history, multi-line editing, completion of commands, and a footer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from .conversation import COMMANDS, Chat, stats_line
from .history import TypedLines

__all__ = ["read_lines"]


def read_lines(chat: Chat, history: Path) -> Iterator[str]:
    """Yields input lines until Ctrl-D. Ctrl-C clears the line."""
    kept: History = InMemoryHistory()
    if chat.store is not None:
        try:
            kept = typed = TypedLines(history, lambda: chat.conversation.name)
            chat.forget_typed = typed.forget
        except OSError as error:
            chat.view.note(f"the input history will not be saved: {history}: {error.strerror}")
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def footer() -> HTML:
        parts = [chat.conversation.name, chat.backend.name]
        if chat.last is not None:
            parts = stats_line(chat.last).split(" · ") + parts
        while len(parts) > 1 and len(" · ".join(parts)) + 2 > get_app().output.get_size().columns:
            parts.pop()
        return HTML(" {}").format(" · ".join(parts))

    session: PromptSession[str] = PromptSession(
        message=HTML("<b>&gt; </b>"),
        history=kept,
        multiline=True,
        key_bindings=keys,
        completer=WordCompleter([name.split()[0] for name in COMMANDS], sentence=True),
        complete_while_typing=False,
        bottom_toolbar=footer,
        prompt_continuation="  ",
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
    )
    while True:
        try:
            yield session.prompt()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
