"""Makes untrusted text safe to show on a terminal: output of models and commands, messages from files and servers."""

from __future__ import annotations

import logging
import re
import unicodedata

__all__ = ["LineFormatter", "excerpt", "one_line", "spelled_out", "visible"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # printable by category, but invisible
_MARKS = frozenset("⟨⟩⏎")  # written by spelled_out() itself


def visible(text: str) -> str:
    """Keeps tabs and line ends; replaces other control characters and lone surrogates by U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """For names and messages from files, templates and servers: always one line. Line ends and all kinds of spaces become spaces; other
    characters that are invisible or change the direction of writing become U+FFFD."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in text.replace("\r\n", "\n")
    )


class LineFormatter(logging.Formatter):
    """One readable line, followed by the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"expertstream: {one_line(record.getMessage())}"
        return text if record.exc_info is None else f"{text}\n{visible(self.formatException(record.exc_info))}"


def spelled_out(text: str) -> str:
    """For text that a person has to judge: different texts never look the same. A character that is invisible, changes how its
    neighbours look, or is one of the marks used here, is written as its code point, ⟨U+202E⟩. Every line but the last ends in ⏎, to
    distinguish a wrapped line from two lines."""
    return "".join(map(_spelled, text))


def _spelled(char: str) -> str:
    if char == "\n":
        return "⏎\n"
    if (
        char.isprintable()
        and char not in _BLANK
        and char not in _MARKS
        and not unicodedata.category(char).startswith("M")
    ):
        return char
    return f"⟨U+{ord(char):04X}⟩"


def excerpt(text: str, columns: int, rows: int) -> str:
    """The whole text if it fits in that many rows of a terminal, with lines wrapped at its width; otherwise its beginning and its end, with
    a note on what is omitted between them."""
    columns, rows = max(columns, 8), max(rows, 5)
    # A wide character takes two columns: half as many always fit in a row.
    width = columns if text.isascii() else columns // 2
    wrapped = [line[i : i + width] for line in text.split("\n") for i in range(0, max(len(line), 1), width)]
    if len(wrapped) <= rows:
        return text
    head, tail = wrapped[: rows // 2], wrapped[-(rows - rows // 2 - 1) :]
    left_out = sum(map(len, wrapped[len(head) : -len(tail)]))
    lines = text.count("\n") + 1
    note = f"[… {left_out:,} characters not shown, of {len(text):,} in {lines:,} {'line' if lines == 1 else 'lines'} …]"
    return "\n".join([*head, note, *tail])
