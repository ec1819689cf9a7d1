"""Regular expressions of JSON Schema, as they are read here and by llguidance."""

from __future__ import annotations

import llguidance
import pytest

from expertstream.text.pattern import Pattern

from .test_schema import TOKENIZER, accepts


@pytest.mark.parametrize(
    ("pattern", "found", "missing"),
    [
        ("^a$", ["a"], ["ba", "a\n"]), ("a", ["bab"], ["b"]), ("^a|b$", ["ax", "xb"], ["xa"]), ("(^a|b)c", ["ac", "xbc"], ["xac"]), ("^(a|b)$", ["a"], ["ab"]),
        (r"^\d{2,3}$", ["12", "123"], ["1", "1234", "１２"]), (r"^[^\W_]+$", ["aZ9"], ["_", "é"]), (r"^\S+@\S+$", ["a@b"], ["a b@"]), ("^$", [""], ["x"]), ("^", ["", "x"], []),
        (r"\ud83d\udc32", ["🐲"], ["x"]), (r"^\u{1F432}*$", ["", "🐲🐲"], ["x"]), ("^(a+)+$", ["a" * 99], ["a" * 2000 + "b"]), (r"^/a\/.*$", ["/a/b"], ["/a/\n", "a/"]), (r"^.{2}$", ["😀é"], ["é"]),
        (r"^[\]\-\\&&~]+$", ["]-\\&~"], ["a"]), ("^(?<year>[0-9]{4})-(?:x|)$", ["2026-x", "2026-"], ["26-x"]), (r"^\cA\x41\0?$", ["\x01A", "\x01A\0"], ["A"]), ("^a{2}b*?c+$", ["aac", "aabbcc"], ["ac"]),
    ],
)  # fmt: skip
def test_patterns_are_read_alike_here_and_by_llguidance(pattern: str, found: list[str], missing: list[str]) -> None:
    grammar = llguidance.LLMatcher(TOKENIZER, f"start: X\nX: /{Pattern(pattern).body}/\n", log_level=0)
    assert not grammar.is_error(), grammar.get_error()
    for text in (*found, *missing):
        assert Pattern(pattern).matches(text) == accepts(grammar, text) == (text in found), text


def test_broken_patterns_and_those_that_cannot_be_held() -> None:
    for pattern in ("(", ")", "[a", "a**", "*", "x{3,2}", "[z-a]", "\\"):
        with pytest.raises(ValueError):
            Pattern(pattern)
    for pattern in ("(?=a)", "(a)\\1", "\\bx", "a{,3}", "(?i)a", "\\Z", "a^b", "x{99999}", "\\p{L}"):
        with pytest.raises(NotImplementedError):
            Pattern(pattern)
    with pytest.raises(ValueError, match="a parenthesis is closed but not opened in the pattern 'a\\)'"):
        Pattern("a)")
