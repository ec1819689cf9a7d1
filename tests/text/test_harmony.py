"""gpt-oss's format: what is written is read however it comes in pieces, and conversations are rendered as its template wants them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream.text.family import HarmonyFamily, TagFamily, family_of
from expertstream.text.harmony import HarmonyParser, harmony_messages
from expertstream.text.output_base import CallDelta, CallEnd, CallStart, Content, Event, Reasoning
from expertstream.text.tokenizer import Tokenizer

from ..fetch_fixtures import TEMPLATES
from .test_real_templates import tokenizer_with


def joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of one kind as one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Content) and isinstance(last, Content):
            found[-1] = Content(last.text + event.text)
        elif isinstance(event, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + event.text)
        else:
            found.append(event)
    return found


def read(pieces: list[str], cut: bool = False, in_answer: bool = False) -> list[Event]:
    parser, events = HarmonyParser(in_answer), list[Event]()
    for piece in pieces:
        events += parser.feed(piece)
    return joined(events + parser.finish(cut))


def call(name: str = "f", index: int = 0, **arguments: Any) -> list[Event]:
    text = json.dumps(arguments, ensure_ascii=False)
    return [CallStart(index, name), CallDelta(index, text), CallEnd(index, name, arguments, True)]


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|>"
CALL = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
EXAMPLES: list[tuple[str, bool, list[Event]]] = [
    ("<|channel|>final<|message|>Hello <b>", False, [Content("Hello <b>")]),
    (THOUGHT + "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>", False, [Reasoning("Hm."), Content("Yes.")]),
    (THOUGHT + CALL + '{"a": 1}<|call|>', False, [Reasoning("Hm."), *call(a=1)]),
    (THOUGHT + CALL + '{"a":1, "b": "ü"}', False, [Reasoning("Hm."), *call(a=1, b="ü")]),
    ("<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>", False, call()),
    (" to=functions.f<|channel|>commentary json<|message|>{}", False, call()),
    (THOUGHT + CALL, False, [Reasoning("Hm."), *call()]),
    (CALL + '{"a": [1, {"b": 2', False, call(a=[1, {"b": 2}])),
    (CALL + '{"a": "x', True, [CallStart(0, "f"), CallDelta(0, '{"a": "x"}'), CallEnd(0, "f", {"a": "x"}, True)]),
    (CALL + "nonsense", False, [Content("nonsense")]),
    (CALL + "nonsense", True, [CallStart(0, "f"), CallDelta(0, "nonsense"), CallEnd(0, "f", {}, False)]),
    (
        "<|channel|>commentary<|message|>I will look.<|end|>" + CALL + '{"a": 1}<|call|>' + CALL + '{"a": 2}',
        False, [Content("I will look."), *call(a=1), *call(index=1, a=2)],
    ),
    (
        "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then.",
        False, [Content("First.\n\nThen.")],
    ),
    ("Just text, no header.", False, [Content("Just text, no header.")]),
    ("asking", False, [Content("asking")]),
    ("<|channel|>fin", True, []),
    ("<|channel|>analysis<|message|>cut in the mid", True, [Reasoning("cut in the mid")]),
    ("<|channel|>final<|message|>a <|en b", False, [Content("a <|en b")]),
    ("", False, []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cut", "expected"), EXAMPLES)
def test_what_is_written_is_read_however_it_comes(text: str, cut: bool, expected: list[Event]) -> None:
    assert read([text], cut) == expected
    assert read(list(text), cut) == expected


PIECES = st.lists(
    st.sampled_from(
        ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|return|>", "<|constrain|>", "analysis", "final", "commentary",
         " to=functions.f", " to=", "assistant", '{"a": ', "1}", "x", " ", "<", "<|", "json", "\n"]
    ),
    max_size=14,
)  # fmt: skip


@given(PIECES, st.booleans(), st.booleans(), st.data())
def test_pieces_never_matter(parts: list[str], cut: bool, in_answer: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(pieces, cut, in_answer) == read([text], cut, in_answer) == read(list(text), cut, in_answer)


def test_the_family_is_found_by_the_template() -> None:
    assert isinstance(family_of("<|start|>{{ x }}<|channel|>final<|message|>"), HarmonyFamily)
    assert isinstance(family_of("<|im_start|>"), TagFamily) and isinstance(family_of(""), TagFamily)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = TEMPLATES / "openai-gpt-oss-120b.jinja"
    if not file.exists():
        pytest.skip("python tests/fetch_fixtures.py fetches the templates")
    return tokenizer_with(file.read_text(), tmp_path_factory.mktemp("gpt-oss") / "model")


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Look."},
    {
        "role": "assistant", "content": "", "reasoning_content": "Two calls.",
        "tool_calls": [{"id": str(i), "type": "function", "function": {"name": "f", "arguments": {"n": i}}} for i in range(2)],
    },
    {"role": "tool", "tool_call_id": "1", "content": "second"},
    {"role": "tool", "tool_call_id": "0", "content": "first"},
]  # fmt: skip


def test_the_real_template_takes_conversations(gpt_oss: Tokenizer) -> None:
    prompt = gpt_oss.apply_chat_template(CONVERSATION, tools=TOOLS)
    assert "# Instructions\n\nBe short." in prompt and "type f = () => any;" in prompt
    assert "<|channel|>analysis<|message|>Two calls.<|end|>" in prompt
    calls = [
        f'to=functions.f<|channel|>commentary json<|message|>{{"n": {i}}}<|call|><|start|>functions.f to=assistant'
        for i in range(2)
    ]
    first, second = (prompt.index(text) for text in calls)
    assert first < prompt.index('"first"') < second < prompt.index('"second"')
    assert gpt_oss.family.reasons(prompt)
    answered = [
        *CONVERSATION,
        {"role": "assistant", "content": "Done.", "reasoning_content": "x"},
        {"role": "user", "content": "More."},
    ]
    assert "<|channel|>final<|message|>Done.<|end|><|start|>user<|message|>More." in gpt_oss.apply_chat_template(
        answered
    )
    both = [{**m, "content": "I look."} if m["role"] == "assistant" else m for m in CONVERSATION]
    assert "<|channel|>analysis<|message|>I look.<|end|>" in gpt_oss.apply_chat_template(both)
    for effort, shown in ((None, "medium"), ("high", "high"), ("none", "low")):
        from expertstream.server.request import thinking_variables

        variables = thinking_variables(effort=effort)
        prompt = gpt_oss.chat_prompt(CONVERSATION[:2], template_variables=variables).text
        assert f"Reasoning: {shown}\n" in prompt


def test_nothing_is_lost_of_a_conversation() -> None:
    found = harmony_messages(CONVERSATION)
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    stray = {"role": "tool", "tool_call_id": "x", "content": "third"}
    assert harmony_messages([*CONVERSATION, stray])[-1] is stray
