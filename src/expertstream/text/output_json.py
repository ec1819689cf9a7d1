"""Calls in JSON: {"name": …, "arguments": {…}}, several of them, or a list of them.

If a grammar constrains the model to the format, the arguments are streamed: strings as they are written, other values when they are
complete. If not, almost valid JSON is repaired.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .arguments import complete_json, parse_json
from .output_base import CallReader, as_object

__all__ = ["JsonReader"]

_JSON_MARK = re.compile(r"""["'{}\[\],<]""")
_STRING_MARK = {quote: re.compile(rf"\\.|{quote}|\n|</tool_call>", re.S) for quote in "\"'"}
_JSON_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*+")\s*,\s*"(?:arguments|parameters)"\s*:\s*\{', re.S)
_JSON_KEY = re.compile(r'("(?:[^"\\]|\\.)*+")\s*+(:?)\s*+', re.S)
_HEX, _HIGH, _LOW = r"[\da-fA-F]", r"\\u[dD][89abAB]", r"\\u[dD][c-fC-F]"
# The inside of a string, up to an incomplete escape: half of a surrogate pair waits for the other half.
_JSON_CHARACTERS = re.compile(
    rf'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|(?!{_HIGH})\\u{_HEX}{{4}}'
    rf"|{_HIGH}{_HEX}{{2}}(?:{_LOW}{_HEX}{{2}}|(?=[^\\]|\\[^u]|\\u[^dD]|\\u[dD][^c-fC-F])))*+"
)
_NEARLY_JSON = re.compile(r'"(?:[^"\\]|\\.)*+"' + r"|'(?:[^'\\]|\\.)*+'|,(?=\s*[}\]])|\b(?:True|False|None)\b", re.S)


class JsonReader(CallReader):
    """Steps from the opening bracket of a call, or of a list, to the closing one."""

    def __init__(self) -> None:
        super().__init__()
        self._quote, self._depth, self._may_stream = "", 0, False

    def _begin_json(self, may_stream: bool) -> None:
        self._step, self._quote, self._depth, self._may_stream = self._json, "", 0, may_stream
        self._begin_value()

    def _json(self) -> bool:
        """A call or a list of calls, or an argument of a streamed call."""
        while mark := (_STRING_MARK[self._quote] if self._quote else _JSON_MARK).search(self._text, self._at):
            found = mark[0]
            if self._quote:
                if found == "</tool_call>":  # part of the string, if the string ends on its line
                    self._grow(mark.start())
                    self._exit = self._value_size if self._exit is None else self._exit
                elif found == "\n" and not self._streaming:
                    return self._unquoted()
                elif found == self._quote:
                    self._quote = ""
                self._grow(mark.end())
                continue
            if self._streaming and (found == "<" or (self._depth == 0 and found in ",}]")):
                self._grow(mark.start())
                return self._json_argument()
            if found == "<":
                self._grow(mark.start())
                tag = self._ahead(("</tool_call>",))
                if tag is None and not self._final:
                    return False
                return self._fail() if tag == "" else self._json_end() if tag or not self._cut else self._cut_json()
            self._grow(mark.end())
            if found in "\"'":
                self._quote, self._exit = found, None
            elif found in "{[":
                self._depth += 1
                if self._depth == 2 and self._may_stream:
                    self._may_stream = False
                    if found == "{" and self._begin_json_call("".join(self._value)):
                        return True
            elif found in "}]":
                self._depth -= 1
                if self._depth == 0 and not self._streaming:
                    return self._json_end()
        end = self._tail() if self._quote else len(self._text)
        self._grow(end - (self._quote != "" and self._text.endswith("\\", self._at)))
        if not self._final:
            return False
        self._grow(len(self._text))
        if self._streaming:
            return self._json_argument()
        return self._cut_json() if self._cut else self._json_end()

    def _unquoted(self) -> bool:
        """A string continues on another line: it was not closed, or its line ends were not escaped."""
        if self._exit is not None:
            self._go_back(self._exit)
            return self._json_end()
        end = self._text.find("</tool_call>", self._at)
        self._grow(end if end >= 0 else self._tail())
        self._step = self._unquoted
        if end >= 0:
            return self._json_end()
        if not self._final:
            return False
        self._grow(len(self._text))
        return self._cut_json() if self._cut else self._json_end()

    def _json_end(self) -> bool:
        """The value is as complete as it will be."""
        text = "".join(self._value)
        ways: list[Callable[[], Any]] = [lambda: parse_json(text), lambda: parse_json(_repaired(text))]
        if self._depth and not self._quote and text.rstrip().endswith(("}", "]")):
            ways.append(lambda: complete_json(_repaired(text)))
        for read in ways:
            calls = list[tuple[str, dict[str, Any]]]()
            with suppress(ValueError, RecursionError):
                calls = _calls(read())
            for self._name, self._arguments in calls:
                self._end_call()
            if calls:
                return True
        return self._fail()

    def _cut_json(self) -> bool:
        text = "".join(self._value)
        found: Any = None
        with suppress(ValueError, RecursionError):
            found = complete_json(text)
        calls = [call for call in (found if isinstance(found, list) else [found]) if isinstance(call, dict)]
        for i, call in enumerate(calls):
            name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
            if isinstance(arguments, str):
                with suppress(ValueError, RecursionError):
                    arguments = complete_json(arguments)
            if isinstance(name, str) and f'"{name}"' in text:  # otherwise the name may have been cut
                self._name, self._arguments = name, as_object(arguments)
                self._end_call(i < len(calls) - 1)
        self._leave()
        return True

    def _begin_json_call(self, head: str) -> bool:
        """Begins a call whose arguments can be streamed, if this is one."""
        match, name = _JSON_HEAD.fullmatch(head), ""
        with suppress(ValueError):
            name = parse_json(match[1]) if match else ""
        if name not in self._schemas:
            return False
        self._begin_call(name, True)
        self._begin_value()
        self._step = self._json_key
        return True

    def _json_key(self) -> bool:
        self._skip_space()
        tag = self._ahead(('"', ",", "}"))
        if tag == "}":
            self._at += 1
            return self._end_call()
        if tag == ",":
            self._at += 1
            return True
        match, key = _JSON_KEY.match(self._text, self._at) if tag else None, None
        if tag != "" and (match is None or match.end() == len(self._text)):
            self._at = len(self._text) if self._cut else self._at
            return self._final and self._end_call(False)
        with suppress(ValueError):
            key = parse_json(match[1]) if match and match[2] else None
        if match is None or key is None or key in self._arguments:
            return self._end_call(False)
        is_string = self._text[match.end()] == '"'
        self._at = match.end() + is_string
        self._begin_value(key, None, is_string, not is_string and self._name in self._typed)
        self._step, self._quote, self._depth = self._json_string if is_string else self._json, "", 0
        return True

    def _json_string(self) -> bool:
        match = _JSON_CHARACTERS.match(self._text, self._at)
        if match and match[0]:
            self._add(parse_json(f'"{match[0]}"'))
            self._at = match.end()
        rest = self._text[self._at : self._at + 12]
        if rest.startswith('"'):
            self._at += 1
            self._give("".join(self._value))
            self._step = self._json_key
            return True
        if len(rest) == 12 or self._final or (rest and rest[0] != "\\"):
            self._arguments[self._key] = "".join(self._value)
            self._at = len(self._text) if self._cut else self._at
            return self._end_call(False, in_string=True)
        return False

    def _json_argument(self) -> bool:
        text, value = "".join(self._value), None
        self._step = self._json_key
        try:
            value = parse_json(text)
        except (ValueError, RecursionError):
            with suppress(ValueError, RecursionError):
                self._arguments[self._key] = complete_json(text)
                self._end_part(text)
            return self._end_call(False)
        self._give(value)
        return True


def _calls(found: Any) -> list[tuple[str, dict[str, Any]]]:
    """Raises ValueError if it is neither a call nor a list of calls."""
    calls = list[tuple[str, dict[str, Any]]]()
    for call in found if isinstance(found, list) else [found]:
        fields = as_object(call)
        name, arguments = fields.get("name"), fields.get("arguments", fields.get("parameters"))
        if isinstance(arguments, str):
            arguments = parse_json(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ValueError("not a call")
        calls.append((name, arguments))
    return calls


def _repaired(text: str) -> str:
    """Repairs almost valid JSON: strings in single quotes or with line ends in them, Python's constants, trailing commas."""
    return _NEARLY_JSON.sub(lambda match: _repaired_token(match[0]), text)


def _repaired_token(token: str) -> str:
    if token[0] == "'":
        inner = re.sub(
            r'\\(.)|"', lambda m: "'" if m[1] == "'" else '\\"' if m[0] == '"' else m[0], token[1:-1], flags=re.S
        )
        token = f'"{inner}"'
    if token[0] == '"':
        return re.sub(r"[\x00-\x1f]", lambda m: f"\\u{ord(m[0]):04x}", token)
    return {",": "", "True": "true", "False": "false", "None": "null"}[token]
