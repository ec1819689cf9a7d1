"""Text as a terminal is to show it, never to obey it: a model, or a command's output, may say anything."""

from __future__ import annotations

import logging
import re
import unicodedata

__all__ = ["LineFormatter", "excerpt", "one_line", "spelled_out", "visible"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # printable by their category, and yet nothing is seen
_MARKS = frozenset("⟨⟩⏎")  # those that spelled_out() itself writes


def visible(text: str) -> str:
    """Tabs and line ends stay; every other control character, and half of a surrogate pair, is written as U+FFFD."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """For names and messages that come from files, templates and servers: one line whatever they are. Line ends and spaces of all kinds
    become spaces; other characters that are not seen, or turn the direction of writing, U+FFFD."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"
        for c in text.replace("\r\n", "\n")
    )


class LineFormatter(logging.Formatter):
    """One line for a person, and the traceback of a bug below it."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"expertstream: {one_line(record.getMessage())}"
        return text if record.exc_info is None else f"{text}\n{visible(self.formatException(record.exc_info))}"


def spelled_out(text: str) -> str:
    """For text that a person has to judge: two that differ never look the same. A character that is not seen, or changes how its
    neighbours look, is written as its code point, ⟨U+202E⟩, and so is one that this function writes itself; a line that another one
    follows ends in ⏎, so that a wrapped line is told from two."""
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
    """Text whole if it takes no more than that many rows of a terminal, each line wrapped at its width; otherwise its beginning and its
    end, with the number of lines and characters that are left out between them."""
    columns, rows = max(columns, 8), max(rows, 5)
    # A wide character may take two columns: half as many in a row is always enough.
    width = columns if text.isascii() else columns // 2
    wrapped = [line[i : i + width] for line in text.split("\n") for i in range(0, max(len(line), 1), width)]
    if len(wrapped) <= rows:
        return text
    head, tail = wrapped[: rows // 2], wrapped[-(rows - rows // 2 - 1) :]
    left_out = sum(map(len, wrapped[len(head) : -len(tail)]))
    lines = text.count("\n") + 1
    note = f"[… {left_out:,} characters are not shown here, of {len(text):,} in {lines:,} {'line' if lines == 1 else 'lines'} …]"
    return "\n".join([*head, note, *tail])
