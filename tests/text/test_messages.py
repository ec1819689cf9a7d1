"""Conversations as clients send them, in the form that every template takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream.text.messages import standard_messages

CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f"}}, {"function": {"name": "g"}}],
}


def say(*pairs: str) -> list[dict[str, Any]]:
    """ "system:x" and so on."""
    return [dict(zip(("role", "content"), pair.split(":"), strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (say("system:a", "user:q"), say("system:a", "user:q")),
        (say("system:a", "system:b", "user:q"), say("system:a\n\nb", "user:q")),
        (say("user:q", "system:late"), say("user:q\n\nlate")),
        (say("user:q", "assistant:x", "system:late", "user:r"), say("user:q", "assistant:x", "user:late\n\nr")),
        (say("user:q", "system:late", "user:r"), say("user:q\n\nlate", "user:r")),
        (say("system:only"), say("system:only", "user:")),
        (say("system:a", "assistant:x"), say("system:a", "user:", "assistant:x")),
        (say("assistant:x", "system:late"), say("assistant:x", "user:late")),
        ([*say("user:q"), CALL, *say("system:s", "tool:1", "tool:2", "user:r")], [*say("user:q"), CALL, *say("tool:1", "tool:2", "user:s\n\nr")]),
        ([*say("user:q"), CALL, *say("tool:1", "system:s", "tool:2")], [*say("user:q"), CALL, *say("tool:1", "tool:2", "user:s")]),
        ([*say("user:q"), CALL, *say("system:s")], [*say("user:q"), CALL, *say("user:s")]),
        ([], say("user:")),
    ],
)  # fmt: skip
def test_system_messages_find_their_place(given: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    before = [dict(m) for m in given]
    assert standard_messages(given) == expected
    assert given == before


ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


@given(st.lists(st.tuples(ROLES, st.text("abc", min_size=1, max_size=3)), max_size=8))
def test_nothing_is_dropped_and_only_the_first_is_a_system_message(pairs: list[tuple[str, str]]) -> None:
    found = standard_messages([{"role": role, "content": text} for role, text in pairs])
    assert sorted("".join(m["content"] for m in found).replace("\n", "")) == sorted("".join(text for _, text in pairs))
    assert all(m["role"] != "system" for m in found[1:])
    assert any(m["role"] == "user" for m in found)
    assert standard_messages(found) == found


@given(st.lists(st.tuples(ROLES, st.text("abc", min_size=1, max_size=3)), max_size=8))
def test_a_later_turn_begins_like_this_one(pairs: list[tuple[str, str]]) -> None:
    """But for the last message, which an instruction of the system may still extend."""
    now = [{"role": role, "content": text} for role, text in [("user", "q"), *pairs]]
    later = [*now, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    assert standard_messages(later)[: len(standard_messages(now)) - 1] == standard_messages(now)[:-1]


def test_results_stand_in_the_order_of_their_calls() -> None:
    calls = [{"id": name, "function": {"name": "f"}} for name in ("a", "b", "c")]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("c", "a", "b", "stranger")]
    found = standard_messages(
        [*say("user:q"), {"role": "assistant", "content": "", "tool_calls": calls}, *results, *say("user:r")]
    )
    assert [m["content"] for m in found] == ["q", "", "a", "b", "c", "stranger", "r"]
    assert standard_messages(found) == found
