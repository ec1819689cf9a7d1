"""Converts JSON Schema's regular expressions, which are ECMA-262 and unanchored, to ones that must match the whole text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal

__all__ = ["MAX_REPEATS", "Pattern", "compiled", "other_than"]

MAX_REPEATS = 10_000  # of one part of a pattern
MAX_BRANCHES = 64  # of a pattern with anchors in its groups

_Ranges = list[tuple[int, int]]  # of code points, both ends included, sorted
_Tree = (
    tuple[Literal["set"], _Ranges]
    | tuple[Literal["cat", "alt"], list["_Tree"]]
    | tuple[Literal["rep"], "_Tree", int, int | None]
    | tuple[Literal["anchor"], str]
)

_COUNTS = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}")
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}|(0)(?!\d)")
_LOW_SURROGATE = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
_ALL: _Ranges = [(0, 0xD7FF), (0xE000, 0x10FFFF)]
_CLASSES: dict[str, _Ranges] = {
    "d": [(48, 57)],
    "w": [(48, 57), (65, 90), (95, 95), (97, 122)],
    "s": [(9, 13), (32, 32), (0x2000, 0x200A), (0x2028, 0x2029)]
    + [(point, point) for point in (0xA0, 0x1680, 0x202F, 0x205F, 0x3000, 0xFEFF)],
}  # fmt: skip


def _union(ranges: _Ranges) -> _Ranges:
    """Sorted, without overlaps or surrogates."""
    found: _Ranges = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    parts = [(max(low, a), min(high, b)) for low, high in found for a, b in _ALL]
    return [(low, high) for low, high in parts if low <= high]


def _complement(ranges: _Ranges) -> _Ranges:
    found, at = list[tuple[int, int]](), 0
    for low, high in _union(ranges):
        found.append((at, low - 1))
        at = high + 1
    return _union([(low, high) for low, high in [*found, (at, 0x10FFFF)] if low <= high])


def _char(char: str) -> _Ranges:
    return _union([(ord(char), ord(char))])


_NOT_LINE_END = _complement([(10, 10), (13, 13), (0x2028, 0x2029)])
_ANYTHING: _Tree = ("rep", ("set", _ALL), 0, None)


class Pattern:
    """A regular expression of JSON Schema (ECMA-262, by code points, unanchored) as one that must match the whole text.

    `body` has the syntax of Rust's regex crate, without anchors, Unicode classes or flags: llguidance reads it as ECMA-262 does.
    Raises ValueError for a broken expression, NotImplementedError for non-regular or unsupported syntax (look-around,
    back references, word boundaries, Unicode property classes, anchors inside an expression).
    """

    def __init__(self, source: str) -> None:
        self._source, self._at = source, 0
        tree = self._alternatives()
        if self._at < len(source):
            raise ValueError(f"a parenthesis is closed but not opened in the pattern {source!r}")
        branches = [_bounded_branch(branch) for branch in _branches(tree)]
        self._tree: _Tree = ("alt", branches)
        self.body = _rendered(self._tree)

    def matches(self, text: str) -> bool:
        """Whether it is found in the text, in time linear in the text, whatever the expression."""
        return len(text) in _ends(self._tree, {0}, text)

    def start(self) -> str:
        """The literal characters that every match begins with."""
        found, parts = "", [self._tree]
        while len(parts) == 1 and (parts[0][0] == "alt" or parts[0][0] == "cat"):
            parts = parts[0][1]
        for part in parts:
            if part[0] != "set" or len(part[1]) != 1 or part[1][0][0] != part[1][0][1]:
                break
            found += chr(part[1][0][0])
        return found

    def _peek(self, ahead: str) -> bool:
        return self._source.startswith(ahead, self._at)

    def _take(self, ahead: str) -> bool:
        found = self._peek(ahead)
        self._at += len(ahead) if found else 0
        return found

    def _next(self) -> str:
        if self._at >= len(self._source):
            raise ValueError(f"the pattern {self._source!r} ends too early")
        self._at += 1
        return self._source[self._at - 1]

    def _alternatives(self) -> _Tree:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return ("alt", branches)

    def _sequence(self) -> _Tree:
        parts: list[_Tree] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            parts.append(self._quantified(self._atom()))
        return ("cat", parts)

    def _quantified(self, atom: _Tree) -> _Tree:
        counts = _COUNTS.match(self._source, self._at)
        if counts is None:
            if re.compile(r"\{,\d+\}").match(self._source, self._at):
                raise NotImplementedError("a repeat count without a minimum")
            return atom
        if atom[0] == "anchor":
            raise NotImplementedError("a repeated anchor")
        self._at = counts.end()
        self._take("?")  # lazy or not, the language is the same
        if _COUNTS.match(self._source, self._at):
            raise ValueError(f"there is nothing to repeat in the pattern {self._source!r}")
        symbol = counts[0][0]
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(symbol, (0, None))
        if symbol == "{":
            low = int(counts[1])
            high = low if counts[2] is None else int(counts[3]) if counts[3] else None
        if high is not None and high < low:
            raise ValueError(f"the counts {{{low},{high}}} are out of order in the pattern {self._source!r}")
        if max(low, high or 0) > MAX_REPEATS:
            raise NotImplementedError(f"more than {MAX_REPEATS} repeats")
        return ("rep", atom, low, high)

    def _atom(self) -> _Tree:
        char = self._next()
        if char in "^$":
            return ("anchor", char)
        if char == "(":
            return self._group()
        if char in "*+?":
            raise ValueError(f"there is nothing to repeat in the pattern {self._source!r}")
        if char == "[":
            return ("set", self._class())
        if char == "\\":
            return ("set", self._escape(inside=False))
        return ("set", _NOT_LINE_END if char == "." else _char(char))

    def _group(self) -> _Tree:
        if self._take("?"):
            named = re.compile(r"P?<[A-Za-z_]\w*>").match(self._source, self._at)
            if named:
                self._at = named.end()
            elif not self._take(":"):
                raise NotImplementedError("look-around or a flag")
        inner = self._alternatives()
        if not self._take(")"):
            raise ValueError(f"a parenthesis is not closed in the pattern {self._source!r}")
        return inner

    def _class(self) -> _Ranges:
        negated, ranges = self._take("^"), list[tuple[int, int]]()
        while not self._take("]"):
            low = self._member()
            if self._peek("-") and not self._peek("-]"):
                self._at += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                    raise NotImplementedError("a range between classes")
                if low[0][0] > high[0][0]:
                    raise ValueError(f"a range is out of order in the pattern {self._source!r}")
                ranges.append((low[0][0], high[0][0]))
            else:
                ranges += low
        return _complement(ranges) if negated else _union(ranges)

    def _member(self) -> _Ranges:
        char = self._next()
        return self._escape(inside=True) if char == "\\" else _char(char)

    def _escape(self, inside: bool) -> _Ranges:
        char = self._next()
        if char.lower() in _CLASSES:
            ranges = _CLASSES[char.lower()]
            return ranges if char.islower() else _complement(ranges)
        if char in _CONTROLS:
            return _char(_CONTROLS[char])
        if inside and char == "b":
            return _char("\b")
        code = _CODE.match(self._source, self._at - 1)
        if code:
            self._at = code.end()
            point = int(next(filter(None, code.groups())), 16)
            low = _LOW_SURROGATE.match(self._source, self._at) if 0xD800 <= point < 0xDC00 else None
            if low:
                self._at = low.end()
                point = 0x10000 + ((point & 0x3FF) << 10) + (int(low[1], 16) & 0x3FF)
            if point > 0x10FFFF:
                raise ValueError(f"U+{point:X} in the pattern {self._source!r} is not a character")
            return _union([(point, point)])
        if (
            char == "c"
            and self._at < len(self._source)
            and self._source[self._at].isascii()
            and self._source[self._at].isalpha()
        ):
            return _char(chr(ord(self._next()) % 32))
        if char.isalnum() or not char.isascii():
            raise NotImplementedError(f"\\{char}")
        return _char(char)


def _branches(tree: _Tree) -> list[list[_Tree]]:
    """The alternatives as lists of parts; a group at either end that contains an anchor is expanded into alternatives."""
    if tree[0] == "alt":
        found = [parts for branch in tree[1] for parts in _branches(branch)]
    else:
        found = [tree[1] if tree[0] == "cat" else [tree]]
        while any(_opened(parts) for parts in found) and len(found) <= MAX_BRANCHES:
            found = [branch for parts in found for branch in _opened(parts) or [parts]]
    if len(found) > MAX_BRANCHES:
        raise NotImplementedError(f"an anchor in more than {MAX_BRANCHES} alternatives")
    return found


def _opened(parts: list[_Tree]) -> list[list[_Tree]]:
    for at in (0, len(parts) - 1) if parts else ():
        part = parts[at]
        if part[0] in ("alt", "cat") and _anchored(part):
            return [parts[:at] + inner + parts[at + 1 :] for inner in _branches(part)]
    return []


def _anchored(tree: _Tree) -> bool:
    if tree[0] == "alt" or tree[0] == "cat":
        return any(map(_anchored, tree[1]))
    return tree[0] == "anchor" or (tree[0] == "rep" and _anchored(tree[1]))


def _bounded_branch(parts: list[_Tree]) -> _Tree:
    """The parts between the anchors; any text in place of a missing anchor."""
    first, last = 0, len(parts)
    while first < last and parts[first] == ("anchor", "^"):
        first += 1
    while last > first and parts[last - 1] == ("anchor", "$"):
        last -= 1
    inner = parts[first:last]
    if any(map(_anchored, inner)):
        raise NotImplementedError("an anchor inside an expression")
    return ("cat", [*([] if first else [_ANYTHING]), *inner, *([] if last < len(parts) else [_ANYTHING])])


def _rendered(tree: _Tree) -> str:
    if tree[0] == "cat":
        return "".join(map(_rendered, tree[1]))
    if tree[0] == "alt":
        return f"(?:{'|'.join(map(_rendered, tree[1]))})"
    if tree[0] == "rep":
        count = "*" if tree[2:] == (0, None) else f"{{{tree[2]},{'' if tree[3] is None else tree[3]}}}"
        return f"(?:{_rendered(tree[1])}){count}"
    if tree[0] == "anchor":
        raise AssertionError
    if tree[1] == _ALL:
        return "[\\s\\S]"
    if not tree[1]:
        raise NotImplementedError("an empty character class")
    if len(tree[1]) == 1 and tree[1][0][0] == tree[1][0][1]:
        return _literal(tree[1][0][0])
    inverse = tree[1][0][0] == 0 and tree[1][-1][1] == 0x10FFFF
    ranges = _complement(tree[1]) if inverse else tree[1]
    return f"[{'^' * inverse}{''.join(_literal(a) if a == b else f'{_literal(a)}-{_literal(b)}' for a, b in ranges)}]"


def _literal(point: int) -> str:
    char = chr(point)
    if char.isascii():
        return char if char.isalnum() or char in "_ " else f"\\x{point:02x}"
    return char if char.isprintable() else f"\\u{{{point:x}}}"


def _ends(tree: _Tree, starts: set[int], text: str) -> set[int]:
    """Where a match that begins at one of `starts` may end."""
    if tree[0] == "set":
        return {at + 1 for at in starts if at < len(text) and any(a <= ord(text[at]) <= b for a, b in tree[1])}
    if tree[0] == "alt":
        return {end for branch in tree[1] for end in _ends(branch, starts, text)}
    if tree[0] == "cat":
        for part in tree[1]:
            starts = _ends(part, starts, text) if starts else starts
        return starts
    if tree[0] == "anchor":
        raise AssertionError
    _, inner, low, high = tree
    for _ in range(low):
        after = _ends(inner, starts, text)
        if after == starts:
            break
        starts = after
    found, new, count = set(starts), starts, low
    while new and (high is None or count < high):
        new = _ends(inner, new, text) - found
        found |= new
        count += 1
    return found


@lru_cache(maxsize=1024)
def compiled(source: str) -> Pattern:
    """The Pattern of an expression, cached."""
    return Pattern(source)


def other_than(words: list[str]) -> str:
    """The body of a Pattern that matches every text but these."""
    after: dict[str, list[str]] = {}
    for word in filter(None, words):
        after.setdefault(word[0], []).append(word[1:])
    firsts = {char: f"\\u{{{ord(char):x}}}" for char in after}
    other = Pattern(f"^[^{''.join(firsts.values())}][^]*$").body
    ways = [Pattern(f"^{first}$").body + other_than(after[char]) for char, first in firsts.items()]
    return f"(?:{'|'.join([*([] if '' in words else ['']), other, *ways])})"
