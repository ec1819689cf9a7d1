"""Calls in XML: <function=NAME><parameter=KEY>VALUE</parameter>…</function>.

If a grammar constrains the model to the format, a value ends where the grammar says, and strings are streamed. If not, it ends at the first
closing tag that is followed by the continuation of a call, and closing tags may be missing or doubled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .arguments import ArgumentSchemas, complete_json, typed_argument
from .output_base import TAGS, CallReader

__all__ = ["XmlReader"]

_VALUE_TAG = re.compile(r"</parameter>|<parameter=|</function>|</tool_call>")
_CLOSERS = re.compile(r"(?:</parameter>\s*)+")
_EXIT = re.compile(r"(?:</function>\s*)?(</tool_call>\s*)?")
# How a grammar ends a parameter; before one of these, a value may be any text.
_HELD_ENDS = ("\n</parameter>\n<parameter=", "\n</parameter>\n</function>")
_HELD_END = re.compile(r"\n</parameter>\n(?=<parameter=|</function>)")
_ANNOTATIONS = frozenset(("title", "description", "default", "examples", "deprecated"))
_OTHERWISE = frozenset(("enum", "const", "anyOf", "oneOf", "allOf", "$ref", "nullable"))


class XmlReader(CallReader):
    """Steps from <function= to </function>. held: a grammar constrains the model to calls of these tools, inside <tool_call>."""

    def __init__(self) -> None:
        super().__init__()
        self._held = self._block = False  # _block: inside <tool_call>
        # Certain beginnings of another call, if a value was not closed.
        self._starts: tuple[str, ...] = ()
        self._wanted = ArgumentSchemas.of(None)  # of the function being called
        self._texts: dict[str, str] = {}  # of its arguments
        self._read_value: Callable[[], bool] = self._free_value
        self._may_be_null = False  # the value is a string or null
        self._in_lines = False  # the value begins on its own line
        self._closed_before = False  # it contains a </parameter>
        self._searched = 0  # a better end than _exit has been searched up to here

    def _function(self) -> bool:
        name = self._named()
        if name is None:
            return self._final and self._nameless()
        if not name.strip():
            return self._fail()
        self._take(self._at + len(f"<function={name}>"))
        known = self._held and self._block and name in self._schemas
        self._wanted, self._texts = ArgumentSchemas.of(self._schemas.get(name.strip())), {}
        self._begin_call(name.strip(), known, late=self._wanted.several)
        self._read_value = self._held_value if known else self._free_value
        self._step = self._between
        return True

    def _between(self) -> bool:
        """Before a parameter or the end."""
        self._skip_space()
        tag = self._ahead(TAGS[2:])
        if tag is None:
            if not self._final:
                return False
            self._take(len(self._text))
            whole = bool(self._arguments) and not self._cut
            return self._end_call(whole) if whole or self._cut or self._streaming else self._fail()
        if tag == "<parameter=":
            self._step = self._parameter
            return True
        if tag in ("</parameter>", "</function>"):
            self._take(self._at + len(tag))
            return tag == "</parameter>" or self._end_call()
        return self._end_call() if tag == "</tool_call>" or (tag and self._arguments) else self._fail()

    def _parameter(self) -> bool:
        key = self._named()
        end = self._at + len(f"<parameter={key}>")
        if (key is None or end == len(self._text)) and not self._final:
            return False
        if key is None:
            self._take(len(self._text))
            return self._end_call(False) if self._cut else self._fail()
        if not key or (self._streaming and key in self._arguments):
            return self._fail()
        # A value is on its own lines; the line ends around it are not part of it.
        in_lines = self._text.startswith("\n", end)
        self._take(end + in_lines)
        schema = self._wanted.of_one(key)
        kinds = self._wanted.kinds(key) if self._live and self._name in self._typed else set()
        self._may_be_null = kinds == {"string", "null"}
        self._begin_value(key, schema, _is_string(schema), bool(kinds) and "string" not in kinds)
        self._in_lines, self._closed_before = in_lines, False
        self._step = self._read_value
        return True

    def _give_text(self, text: str) -> bool:
        self._texts[self._key] = text
        self._give(text if self._is_string else typed_argument(text, self._schema, self._wanted.root))
        if self._wanted.several:
            self._arguments = self._wanted.typed(self._texts)
        self._step = self._between
        return True

    def _give_part(self, text: str) -> bool:
        """Ends an incomplete value, and the call with it."""
        if not self._is_string and not text.strip():  # only its name was written
            self._at = len(self._text)
            return self._end_call(False)
        value: Any = text
        if not self._is_string:
            value = typed_argument(text, self._schema, self._wanted.root)
            with suppress(ValueError, RecursionError):
                closed = typed_argument(json.dumps(complete_json(text)), self._schema, self._wanted.root)
                value = value if isinstance(closed, str) else closed
        self._arguments[self._key] = value
        self._at = len(self._text)
        self._end_part(text)
        return self._end_call(False, self._is_string)

    def _held_value(self) -> bool:
        match = _HELD_END.search(self._text, self._at)
        if match:
            self._grow(match.start())
            value = "".join(self._value)
            self._give_text(value)
            self._take(match.end())
            return True
        size = len(self._text)
        last = range(max(self._at, size - len(_HELD_ENDS[0])), size)
        ends = (i for i in last if any(end.startswith(self._text[i:]) for end in _HELD_ENDS))
        self._grow(next(ends, size))
        if self._may_be_null and not self._is_string:
            begun = "".join(self._value).lstrip()
            if begun and begun[0] not in "\"'" and not "null".startswith(begun):
                self._becomes_string()
        if not self._final:
            return False
        if self._text.startswith("\n</parameter>", self._at):
            self._at = size
            return self._give_text("".join(self._value))
        return self._give_part("".join(self._value))

    def _free_value(self) -> bool:
        """Reads up to a closing tag that is followed by the continuation of a call: the value itself may contain such tags."""
        mark = _VALUE_TAG.search(self._text, self._at)
        self._grow(mark.start() if mark else self._tail())
        if mark is None:
            return self._final and self._unended_value()
        if mark[0] == "</parameter>":
            return self._closer()
        if self._closed_before:
            self._grow(mark.end())
            return True
        return self._missing_closer() if mark[0] == "<parameter=" else self._missing_closers(mark.end())

    def _line_begins(self) -> bool:
        return self._value[-1].endswith("\n") if self._value else self._in_lines

    def _closer(self) -> bool:
        run = _CLOSERS.match(self._text, self._at)
        assert run is not None
        tag = self._ahead((*TAGS[3:4], *TAGS[5:], *self._starts), run.end())
        if tag is None and not self._final:
            return False
        if tag == "":
            self._grow(run.end())
            self._closed_before = True
            return True
        # Of several closing tags, those on their own lines are superfluous, if the value is on its own lines.
        begins = [match.start() for match in re.finditer("</parameter>", run[0])]
        end = begins[-1] if self._in_lines else 0
        for begin in reversed(begins if self._in_lines else []):
            if not (run[0][begin - 1] == "\n" if begin else self._line_begins()):
                break
            end = begin
        self._grow(self._at + end)
        self._give_text("".join(self._value).removesuffix("\n"))
        self._take(run.end())
        return True

    def _missing_closer(self) -> bool:
        """Another parameter of the function begins on a new line, and the previous one was not closed."""
        given = (*self._arguments, self._key)
        others = [f"<parameter={key}>" for key in self._wanted.names if key not in given]
        tag = self._ahead(others) if self._line_begins() else ""
        if tag:
            return self._give_text("".join(self._value).removesuffix("\n"))
        if tag is None:
            return self._final and self._unended_value()
        self._grow(self._at + len("<parameter="))
        return True

    def _missing_closers(self, end: int) -> bool:
        """The function or the block ends without closing the parameter, if the text also ends here, or another call begins. Otherwise the
        end of the text decides whether this was the end or part of the value."""
        match = _EXIT.match(self._text, self._at)
        assert match is not None
        tag = self._ahead(self._starts if match[1] else ("</tool_call>", *self._starts), match.end())
        if tag is None and not self._final:
            return False
        if tag is None and self._cut:
            return self._unended_value()
        if tag or tag is None or (match[1] and self._base + match.end() <= self._searched):
            return self._end_value_early()
        if match[1] and self._exit is None:
            self._exit = self._value_size
        self._grow(max(match.end(), end))
        return True

    def _end_value_early(self) -> bool:
        """The value ends here, or where it could have ended before."""
        if self._exit is not None:
            self._searched = self._base + self._at
            self._go_back(self._exit)
        return self._give_text("".join(self._value).removesuffix("\n"))

    def _unended_value(self) -> bool:
        if self._cut:
            return self._give_part("".join(self._value).removesuffix("\n"))
        self._grow(len(self._text))
        return self._fail() if self._exit is None else self._end_value_early()


def _is_string(schema: Any) -> bool:
    """Whether the schema accepts any text as a string."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return not schema.keys() & _OTHERWISE
    return not isinstance(schema, dict) or schema.keys() <= _ANNOTATIONS
