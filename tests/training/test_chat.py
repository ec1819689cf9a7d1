"""The chat template that ships, and the renderer that training marks its tokens with, write the same text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream import RequestError
from expertstream.engine import embedded_model
from expertstream.text.tokenizer import Tokenizer
from training.chat import SPECIALS, segments
from training.evaluate import loops, parse_calls
from training.generate import clean

TOKENIZER = Tokenizer(embedded_model())
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
WORDS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)
VALUES = st.one_of(WORDS, st.integers(0, 999), st.booleans(), st.lists(WORDS, max_size=3))
CALLS = st.lists(
    st.fixed_dictionaries({"name": WORDS, "arguments": st.dictionaries(WORDS, VALUES, max_size=3)}),
    min_size=1,
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(WORDS)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if draw(st.booleans()):
            calls = draw(CALLS)
            messages.append(
                {"role": "assistant", "content": draw(st.sampled_from(["", "One moment."])), "tool_calls": calls}
            )
            messages += [{"role": "tool", "content": draw(WORDS)} for _ in calls]
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return {"c": "x", "m": messages, "tools": [TOOL] if draw(st.booleans()) else None}


@given(conversations())
def test_training_text_is_what_the_template_writes(doc: dict[str, Any]) -> None:
    written = TOKENIZER.apply_chat_template(doc["m"], tools=doc["tools"], add_generation_prompt=False)
    assert "".join(text for text, _ in segments(doc)) == written


@given(conversations(), st.booleans())
def test_a_prompt_ends_where_learning_begins(doc: dict[str, Any], think: bool) -> None:
    """So the tokens that the model is asked to continue are those that it has seen."""
    prompt = TOKENIZER.apply_chat_template(doc["m"][:-1], tools=doc["tools"], enable_thinking=think)
    pieces = segments({**doc, "think": think})
    assert "".join(text for text, _ in pieces[:-1]) == prompt and pieces[-1][1]


def test_the_template_refuses_what_it_does_not_know() -> None:
    with pytest.raises(RequestError, match="unknown role"):
        TOKENIZER.apply_chat_template([{"role": "wizard", "content": "x"}])


@pytest.mark.parametrize("special", SPECIALS)
def test_every_control_token_of_the_family_is_one_token(special: str) -> None:
    assert len(TOKENIZER.encode(special)) == 1


@given(CALLS)
def test_calls_are_found_again(calls: list[dict[str, Any]]) -> None:
    text = segments({"c": "x", "m": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": calls}]})[
        -1
    ][0]
    found = parse_calls(text.removesuffix("<|im_end|>\n"))
    assert found is not None and [name for name, _ in found] == [call["name"] for call in calls]
    assert [set(arguments) for _, arguments in found] == [set(call["arguments"]) for call in calls]
    assert parse_calls(text.replace("</function>", "", 1)) is None


def test_the_teachers_loops_are_cut() -> None:
    assert clean("qa", [("user", "q"), ("assistant", "The cat sat on the red mat all day long. It was happy. It was happy. It was sad.")]) == [
        ("user", "q"), ("assistant", "The cat sat on the red mat all day long. It was happy.")
    ]  # fmt: skip
    assert (
        clean(
            "qa",
            [("user", "q"), ("assistant", "As an AI language model I cannot say what the color of the sky is today.")],
        )
        is None
    )
    assert loops("a b c d e f g h and then a b c d e f g h") and not loops("a b c d e f g h and no more")
