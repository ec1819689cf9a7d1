"""What a model writes, parsed into events: the same wherever the stream is cut, and no text lost or moved into another argument."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import expertstream
from expertstream.text.output import CallDelta, CallEnd, CallStart, Content, Event, OutputParser, Reasoning
from expertstream.text.template import render_template

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"}, "other": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "number"},
                "yes": {"type": "boolean"}, "list": {"type": "array"}, "maybe": {"type": ["integer", "null"]},
                "unit": {"enum": ["a", "b"]}, "any": {},
            },
        },
    },
}  # fmt: skip
TOOLS: list[dict[str, Any]] = [TOOL, {"name": "g"}]  # the bare function is a tool as well


def raw_events(
    pieces: list[str],
    reasoning: bool = False,
    held: bool = False,
    cut: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> list[Event]:
    parser = OutputParser(TOOLS if tools is None else tools, reasoning, held)
    return [event for piece in pieces for event in parser.feed(piece)] + parser.finish(cut)


def merged(found: list[Event]) -> list[Event]:
    """Neighbours of a kind are put together, as whoever reads a stream does."""

    def kind(event: Event) -> Any:
        return (
            (type(event), event.index)
            if isinstance(event, CallDelta)
            else type(event)
            if isinstance(event, Content | Reasoning)
            else event
        )

    whole: list[Event] = []
    for _, group in groupby(found, lambda event: id(event) if isinstance(event, CallStart | CallEnd) else kind(event)):
        events = list(group)
        first = events[0]
        if isinstance(first, CallDelta):
            whole.append(
                CallDelta(first.index, "".join(event.json for event in events if isinstance(event, CallDelta)))
            )
        elif isinstance(first, Content | Reasoning):
            whole.append(type(first)("".join(event.text for event in events if isinstance(event, Content | Reasoning))))
        else:
            whole.append(first)
    return whole


def check(found: list[Event], cut: bool = False) -> None:
    """What holds for the events of any text."""
    calls = 0
    for i, event in enumerate(found):
        if isinstance(event, CallStart):
            assert event.index == calls
            following = found[i + 1 : i + 3]
            delta = following[0] if isinstance(following[0], CallDelta) else CallDelta(calls, "")
            end = following[-1] if isinstance(following[0], CallDelta) else following[0]
            assert isinstance(end, CallEnd) and {delta.index, end.index} == {calls} and end.name == event.name
            whole = json.dumps(end.arguments, ensure_ascii=False)
            whole.encode()
            assert delta.json == whole or (cut and not end.complete and whole.startswith(delta.json))
            calls += 1
        assert not isinstance(event, Content | Reasoning) or event.text


def events(*pieces: str, **options: Any) -> list[Event]:
    found = merged(raw_events(list(pieces), **options))
    check(found, options.get("cut", False))
    return found


def call(index: int = 0, name: str = "f", /, **arguments: Any) -> list[Event]:
    return [
        CallStart(index, name),
        CallDelta(index, json.dumps(arguments, ensure_ascii=False)),
        CallEnd(index, name, arguments, True),
    ]


def part(delta: str, index: int = 0, /, **arguments: Any) -> list[Event]:
    return [CallStart(index, "f"), *([CallDelta(index, delta)] if delta else []), CallEnd(index, "f", arguments, False)]


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


XML = xml(("text", "a\nb"), ("n", "3"))
JSON = '<tool_call>\n{"name": "f", "arguments": {"text": "a\\nb", "n": 3}}\n</tool_call>'
CALL = call(text="a\nb", n=3)
EMPTY = call(0, "g")
OPEN = "<tool_call>\n<function=f>\n"
CLOSE = "</function>\n</tool_call>"
THIRD = "<parameter=n>\n3\n</parameter>\n"
EDIT = '<root>\n  <parameter=b>x</parameter>\n</root> </function> <tool_call>no</tool_call>\n</tool_call>\n"'

# Text, whether the prompt ends inside <think>, what it is. The first ones are the Splitter's.
TEXTS: list[tuple[str, bool, list[Event]]] = [
    ("Hello.", False, [Content("Hello.")]),
    ("<think>\nHm.\n</think>\n\nHello.\n", False, [Reasoning("Hm."), Content("Hello.")]),
    ("<think>\n\n</think>\n\nHello.", False, [Content("Hello.")]),
    ("Hm.\n</think>\n\nHello.", True, [Reasoning("Hm."), Content("Hello.")]),
    ("Hm, no end", True, [Reasoning("Hm, no end")]),
    (XML, False, CALL),
    (JSON, False, CALL),
    (f"<think>\n</think>\n\nI look.\n\n{XML}\n{JSON}", False, [Content("I look."), *CALL, *call(1, text="a\nb", n=3)]),
    (f"Hm.</think>{XML}", True, [Reasoning("Hm."), *CALL]),
    (XML.removesuffix("\n</tool_call>"), False, CALL),
    (f"{XML} and more", False, [*CALL, Content("and more")]),
    ("<tool_call>\nno call\n</tool_call>", False, [Content("<tool_call>\nno call\n</tool_call>")]),
    ("<tool_call>\n<function=f>\n<parameter=n>\n3", False, [Content("<tool_call>\n<function=f>\n<parameter=n>\n3")]),
    ("Write <tool_call> to call.", False, [Content("Write <tool_call> to call.")]),
    (f"Hm.</think>\n\nSo: <tool_call>no</tool_call>\n{XML}", True, [Reasoning("Hm."), Content("So: <tool_call>no</tool_call>"), *CALL]),
    ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', False, [Content('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>')]),
    ('<tool_call>{"name": "f", "arguments": {"maybe": "null"}}</tool_call>', False, call(maybe="null")),
    ("a < b, a <t and <tool", False, [Content("a < b, a <t and <tool")]),
    ("Tags are written <think>so</think>.", False, [Content("Tags are written <think>so</think>.")]),
    ("", False, []),
    (" \n ", False, []),
    # A call inside of reasoning.
    (f"<think>I look.\n{XML}\n</think>\n\nDone.", False, [Reasoning("I look."), *CALL, Content("Done.")]),
    (f"I look.\n{JSON} So. </think> Done.", True, [Reasoning("I look."), *CALL, Content("So.  Done.")]),
    ("I write <tool_call>\n<function=f> there.</think>Done.", True, [Reasoning("I write <tool_call>\n<function=f> there."), Content("Done.")]),
    ("I write <tool_call>\n<function=f>\n<parameter=text>\na.</think>Done.", True, [Reasoning("I write <tool_call>\n<function=f>\n<parameter=text>\na."), Content("Done.")]),
    ('I write <tool_call>{"name": "f", "arg.</think>Done.', True, [Reasoning('I write <tool_call>{"name": "f", "arg.'), Content("Done.")]),
    # Tags of reasoning that are not in pairs.
    ("<think>\n<think>\nHm.</think></think>\nHello.", False, [Reasoning("Hm."), Content("Hello.")]),
    ("\n<think>\nHm.</think>Hello.", True, [Reasoning("Hm."), Content("Hello.")]),
    ("Hm. <think> is a tag.</think>Hello.", True, [Reasoning("Hm. <think> is a tag."), Content("Hello.")]),
    (" </think>\nHello.", False, [Content("Hello.")]),
    ("Hello </think> you.", False, [Content("Hello </think> you.")]),
    # Closing tags doubled or missing.
    (OPEN + "<parameter=text>\na\n</parameter>\n</parameter>\n" + THIRD + CLOSE, False, call(text="a", n=3)),
    (OPEN + "<parameter=text>a</parameter></parameter>" + THIRD + "</function>" + CLOSE, False, call(text="a", n=3)),
    (OPEN + "<parameter=text>\na\n" + THIRD + CLOSE, False, call(text="a", n=3)),
    (OPEN + "<parameter=text>\n" + THIRD + CLOSE, False, call(text="", n=3)),
    (OPEN + THIRD + "<parameter=text>\na\n" + CLOSE, False, call(n=3, text="a")),
    (OPEN + THIRD + "<parameter=text>\na\n</function>", False, call(n=3, text="a")),
    (OPEN + THIRD + "<parameter=text>\na\n</tool_call>\n", False, call(n=3, text="a")),
    (OPEN + "<parameter=text>\na\n" + CLOSE + "\nSo.\n" + xml(name="g"), False, [*call(text="a"), Content("So."), *call(1, "g")]),
    (OPEN + "<parameter=text>\na\n" + CLOSE + "\nSo.\n" + xml(name="g") + "\n" + XML, False, [*call(text="a"), Content("So."), *call(1, "g"), *call(2, text="a\nb", n=3)]),
    (OPEN + "<parameter=text>\na\n" + CLOSE + "\n" + xml(("n", "4")), False, [*call(text="a"), *call(1, n=4)]),
    (OPEN + "<parameter=text>\na\n" + CLOSE + "\n" + OPEN + "<parameter=n>\n4\n" + CLOSE, False, [*call(text="a"), *call(1, n=4)]),
    (OPEN + "<parameter=text>\na\n" + CLOSE + "x" + OPEN + "<parameter=text>\nb\n" + CLOSE + "y", False, [*call(text="a"), Content("x"), *call(1, text="b"), Content("y")]),
    (OPEN + THIRD + "</tool_call>", False, call(n=3)),
    (OPEN + THIRD, False, call(n=3)),
    (OPEN + THIRD.rstrip(), False, call(n=3)),
    (OPEN + THIRD + "</func", False, call(n=3)),
    (OPEN + THIRD + XML, False, [*call(n=3), *call(1, text="a\nb", n=3)]),
    (OPEN + "</function>", False, call()),
    # Values with tags in them.
    (xml(("text", EDIT), ("other", EDIT)), False, call(text=EDIT, other=EDIT)),
    (xml(("text", "x</parameter>"), ("other", "</parameter></parameter>x")), False, call(text="x</parameter>", other="</parameter></parameter>x")),
    (xml(("text", "</function>\n</tool_call>\nx")), False, call(text="</function>\n</tool_call>\nx")),
    (xml(("text", "a <parameter=n> b\n<parameter=text>\n<parameter=unknown>")), False, call(text="a <parameter=n> b\n<parameter=text>\n<parameter=unknown>")),
    (xml(("n", "1"), ("text", "a\n<parameter=n>\n2")), False, call(n=1, text="a\n<parameter=n>\n2")),
    (JSON.replace("a\\nb", "</tool_call>}{"), False, call(text="</tool_call>}{", n=3)),
    # Several calls in a block.
    (f"{OPEN}{THIRD}</function>\n<function=g>\n{CLOSE}", False, [*call(n=3), *call(1, "g")]),
    (f"{OPEN}{THIRD}<function=g>\n{CLOSE}", False, [*call(n=3), *call(1, "g")]),
    ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n{"name": "g", "arguments": {}},\n{"name": "g", "arguments": {}}}\n</tool_call>', False, [*call(n=1), *call(1, "g"), *call(2, "g")]),
    ('<tool_call>[{"name": "f", "arguments": {"n": 1}}, {"name": "g", "parameters": "{}"}]</tool_call>', False, [*call(n=1), *call(1, "g")]),
    # A call without its opener.
    (f"I look.\n<function=f>\n{THIRD}{CLOSE}\nSo.", False, [Content("I look."), *call(n=3), Content("So.")]),
    ("<function=g>\n</function>", False, EMPTY),
    ("<function=g>\n</function>\n<function=g></function>", False, [*EMPTY, *call(1, "g")]),
    ("See <function=g></function>.\n<function=h></function>", False, [Content("See <function=g></function>.\n<function=h></function>")]),
    ("<function=g> is a tag.", False, [Content("<function=g> is a tag.")]),
    # Names and values.
    (xml(("a", "True"), name="h"), False, call(0, "h", a="True")),
    (xml(("list", "['a', True]"), ("yes", "True")), False, call(list=["a", True], yes=True)),
    ('<tool_call>{"name": "f", "parameters": {"n": 1}}</tool_call>', False, call(n=1)),
    ('<tool_call>{"name": "f", "arguments": "{\\"n\\": 1}"}</tool_call>', False, call(n=1)),
    ("<tool_call>{'name': 'f', 'arguments': {'text': 'it\\'s \"}\"', 'yes': True,},}</tool_call>", False, call(text='it\'s "}"', yes=True)),
    ('<tool_call>{"name": "f", "arguments": {"text": "a\nb\t"}}</tool_call>!', False, [*call(text="a\nb\t"), Content("!")]),
    ('<tool_call>{"name": "f", "arguments": {"n": 1}\n</tool_call>!', False, [*call(n=1), Content("!")]),
    ('<tool_call>{"name": "f", "arguments": {"n": [1]', False, call(n=[1])),
    ('<tool_call>{"name": "f", "arguments": {"n": [1]}\n</tool_c', False, [*call(n=[1]), Content("</tool_c")]),
    # Beyond repair.
    ('<tool_call>{"name": "f", "arguments": {"text": "a}}\n</tool_call>\n' + XML, False, [Content('<tool_call>{"name": "f", "arguments": {"text": "a}}\n</tool_call>'), *CALL]),
    ('<tool_call>{"name": "f", "arguments": {"text": "a}}</tool_call>\n' + XML, False, [Content('<tool_call>{"name": "f", "arguments": {"text": "a}}</tool_call>'), *CALL]),
    ('x <tool_call>{"name": "f"}</tool_call>', False, [Content('x <tool_call>{"name": "f"}</tool_call>')]),
    ("<tool_call>[]</tool_call>", False, [Content("<tool_call>[]</tool_call>")]),
    (OPEN + "x" + THIRD + CLOSE, False, [Content(OPEN + "x" + THIRD + CLOSE)]),
    (OPEN + THIRD + "<parameter=text>\na </parameter> b\n" + CLOSE, False, [Content(OPEN + THIRD + "<parameter=text>\na </parameter> b\n" + CLOSE)]),
    ("x\n<tool_call>\n<function=>\n</function>", False, [Content("x\n<tool_call>\n<function=>\n</function>")]),
    (f"{OPEN}{THIRD}</function>, x</tool_call>", False, [*call(n=3), Content(", x</tool_call>")]),
]  # fmt: skip


def partitions(text: str) -> list[list[str]]:
    return [list(text), *([text[:at], text[at:]] for at in range(len(text) + 1))]


@pytest.mark.parametrize(("text", "reasoning", "expected"), TEXTS)
def test_every_partition_gives_the_same(text: str, reasoning: bool, expected: list[Event]) -> None:
    assert events(text, reasoning=reasoning) == expected
    for pieces in partitions(text):
        assert events(*pieces, reasoning=reasoning) == expected
    for held, cut in ((False, True), (True, False), (True, True)):
        whole = events(text, reasoning=reasoning, held=held, cut=cut)
        for pieces in partitions(text):
            assert events(*pieces, reasoning=reasoning, held=held, cut=cut) == whole


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=g>", "</function>", "<parameter=n>", "<parameter=text>", "</parameter>", "\n", " ", "x", "{", "3", "<", '{"name": "f", "arguments": {}}']  # fmt: skip
WHOLES = [OPEN, "\n</parameter>\n", "\n" + CLOSE, '<tool_call>\n{"name": "f", "arguments": {', '"text": "', '"n": ', ", ", "}", '"', "'", "[", "]", "\\", "\\ud83d", "\\ude00", "\\n", "12", "null"]  # fmt: skip


@settings(deadline=None, max_examples=800, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([*TAGS, *WHOLES]), max_size=14),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_any_text_is_parsed_alike_however_it_is_cut(
    parts: list[str], reasoning: bool, held: bool, cut: bool, tools: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    options: dict[str, Any] = {"reasoning": reasoning, "held": held, "cut": cut, "tools": None if tools else []}
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = events(text, **options)
    assert events(*pieces, **options) == whole == events(*text, **options)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_text_without_a_call_is_all_content(parts: list[str]) -> None:
    found = events(text := "x" + "".join(parts))
    if not any(isinstance(event, CallStart) for event in found):
        assert found == [Content(text.rstrip())]


HELD: list[tuple[str, list[Event]]] = [
    (XML, CALL),
    (JSON, CALL),
    (xml(name="g"), EMPTY),
    (f"Hi.\n\n{XML}\n{XML}", [Content("Hi."), *CALL, *call(1, text="a\nb", n=3)]),
    (xml(("text", ""), ("other", "\n"), ("any", "\n\n x")), call(text="", other="\n", any="\n\n x")),
    (xml(("text", '</parameter>\n</tool_call>"\\\n<parameter=n>\n\n</parameter> \n</function>é\x00😀'), ("list", '["</parameter>\\n"]'), ("unit", "a")),
     call(text='</parameter>\n</tool_call>"\\\n<parameter=n>\n\n</parameter> \n</function>é\x00😀', list=["</parameter>\n"], unit="a")),
    ('<tool_call>\n{"name":"f","arguments":{"text":"\\u00e9\\/\\\\\\ud83d\\ude00\\ud83d \\ude00","x":1e2,"list":[ 1,{"a":"}]"} ],"maybe":null,"any":""}}\n</tool_call>',
     call(text="é/\\😀\ufffd \ufffd", x=100.0, list=[1, {"a": "}]"}], maybe=None, any="")),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', [*call(), *call(1, "g")]),
    # It ends early, or is not what was promised.
    (OPEN + "<parameter=text>\na\n", part('{"text": "a"}', text="a")),
    (OPEN + THIRD, call(n=3)),
    (OPEN + THIRD + "<parameter=text>\na\n</parameter>", call(n=3, text="a")),
    (OPEN + THIRD + THIRD, [*part('{"n": 3}', n=3), Content(THIRD.rstrip())]),
    (OPEN + "x", [*part("{}"), Content("x")]),
    ('<tool_call>{"name": "f", "arguments": {"text": "a\\x"}}', [*part('{"text": "a"}', text="a"), Content('\\x"}}')]),
    ('<tool_call>{"name": "f", "arguments": {"n": 1, "list": [1, 2', part('{"n": 1, "list": [1, 2]}', n=1, list=[1, 2])),
    (xml(("a", "b"), name="h"), call(0, "h", a="b")),  # not among the tools: nobody vouches for it
    (f"<think>I call {XML}</think>Hi.", [Reasoning("I call"), *CALL, Content("Hi.")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), HELD)
def test_calls_of_a_grammar(text: str, expected: list[Event]) -> None:
    for pieces in ([text], *partitions(text)):
        assert events(*pieces, held=True) == expected


CUT: list[tuple[str, list[Event]]] = [
    ("Hello <tool_", [Content("Hello")]),
    ("Hello <", [Content("Hello <")]),
    ("Hi\n<function=", [Content("Hi")]),
    ("Hi\n<tool_call>\n<func", [Content("Hi")]),
    ("<tool_call>\n<function=f", []),
    (OPEN, part("")),
    (OPEN + "<parameter=te", part("")),
    (OPEN + "<parameter=text>", part('{"text": "', text="")),
    (OPEN + "<parameter=text>\na\n</para", part('{"text": "a', text="a")),
    (OPEN + "<parameter=text>\na\n</parameter>", part('{"text": "a"', text="a")),
    (OPEN + THIRD, part('{"n": 3', n=3)),
    (OPEN + THIRD + "</func", part('{"n": 3', n=3)),
    (OPEN + THIRD + "</function>", call(n=3)),
    (OPEN + THIRD + "<parameter=list>\n[1, {", part('{"n": 3, "list": [1, {}]', n=3, list=[1, {}])),
    ('<tool_call>\n{"name": "f', []),
    ('<tool_call>\n{"name": "f", ', part("")),
    ('<tool_call>\n{"name": "f", "arguments": {"n": 1 </tool', part('{"n": 1', n=1)),
    ('<tool_call>\n{"name": "f", "arguments": {"n": 1, "text": "a\\u00', part('{"n": 1, "text": "a', n=1, text="a")),
    ('<tool_call>\n{"name": "f", "arguments": {"n": 1, "list": [1, {"a": "', part('{"n": 1, "list": [1, {"a": ""}]', n=1, list=[1, {"a": ""}])),
    (f'{XML}\n<tool_call>\n{{"name": "f", "arguments": {{', [*CALL, *part("", 1)]),
]  # fmt: skip


def test_what_a_grammar_has_closed_is_whole_in_a_text_that_is_cut() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {}'
    assert events(text, held=True, cut=True) == call()
    text = OPEN + "<parameter=text>\na\n</function>\n</tool_call"
    assert events(text, held=False, cut=True) == part('{"text": "a', text="a")


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(("text", "expected"), CUT)
def test_a_text_cut_at_its_greatest_length(text: str, expected: list[Event], held: bool) -> None:
    def ends(found: list[Event]) -> list[Event]:
        return [event for event in found if not isinstance(event, CallDelta)]

    for pieces in ([text], *partitions(text)):
        found = events(*pieces, held=held, cut=True)
        assert ends(found) == ends(expected)
        if text.startswith(OPEN):
            assert found == expected


def test_a_held_call_is_streamed() -> None:
    parser = OutputParser(TOOLS, held=True)
    assert parser.feed("Hi\n<tool_call>\n<function=f") == [Content("Hi")]
    assert parser.feed(">") == [CallStart(0, "f")]
    assert parser.feed("\n<parameter=text>\n") == [CallDelta(0, '{"text": "')]
    assert parser.feed('a "b"') == [CallDelta(0, 'a \\"b\\"')]
    assert parser.feed("\n</parameter>\nc") == [CallDelta(0, "\\n</parameter>\\nc")]
    assert parser.feed("\n</parameter>\n<") == []
    assert parser.feed("parameter=") == [CallDelta(0, '"')]
    assert parser.feed("list>\n[1,") == []
    assert parser.feed("2]\n</parameter>\n</function>") == [CallDelta(0, ', "list": [1, 2]'), CallDelta(0, "}"), CallEnd(0, "f", {"text": 'a "b"\n</parameter>\nc', "list": [1, 2]}, True)]  # fmt: skip
    assert parser.feed("\n</tool_call>") == parser.finish() == []


def test_a_held_call_in_json_is_streamed() -> None:
    parser = OutputParser(TOOLS, held=True)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.feed("{") == [CallStart(0, "f")]
    assert merged(parser.feed('"text": "a\\n\\')) == [CallDelta(0, '{"text": "a\\n')]
    assert merged(parser.feed('u00e9", "list": [')) == [CallDelta(0, 'é"')]
    assert merged(parser.feed("1]}")) == [
        CallDelta(0, ', "list": [1]}'),
        CallEnd(0, "f", {"text": "a\né", "list": [1]}, True),
    ]
    assert parser.feed("}\n</tool_call>") == parser.finish() == []


def test_a_free_call_comes_when_it_ends() -> None:
    parser = OutputParser(TOOLS)
    assert parser.feed(XML.removesuffix("</function>\n</tool_call>")) == []
    assert parser.feed("</function>") == CALL
    assert parser.feed("\n</tool_call>") == []


def test_without_tools_calls_are_found_and_openers_needed() -> None:
    assert events(XML, tools=[]) == call(text="a\nb", n="3")
    assert events("<function=f>\n</function>", tools=[]) == [Content("<function=f>\n</function>")]


@pytest.mark.parametrize(
    "parameters", [None, {}, {"properties": None}, {"properties": {"n": True}}, {"properties": []}]
)
def test_a_schema_that_says_little_leaves_arguments_as_text(parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for held in (False, True):
        text = "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
        assert events(text, tools=tools, held=held) == call(n="3")


def test_half_of_a_character_does_not_leave() -> None:
    text = xml(("list", '["\\ud83d", "\\ud83d\\ude00"]'))
    assert events(text) == events(text, held=True) == call(list=["\ufffd", "😀"])


MEGABYTE, LESS = 1 << 20, 1 << 18


@pytest.mark.timeout(60)  # each takes about a second; quadratic time would be an hour
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        xml(("text", "x y\n" * (MEGABYTE // 4))),
        xml(("text", "</parameter>\n" * (MEGABYTE // 13) + "x")),
        xml(("list", json.dumps(["ab"] * (LESS // 6)))),
        '<tool_call>{"name": "f", "arguments": {"text": "' + "a\\n\\u00e9" * (MEGABYTE // 9) + '"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"any": [' + "{}," * (LESS // 3) + "{}]}}</tool_call>",
        (OPEN + "<parameter=text>\na\n" + CLOSE + "x") * (LESS // 70),
        ("<tool_call>" * (LESS // 11)),
        "x" + " " * LESS + "y",
        OPEN + " " * LESS + THIRD + "</function>",
        xml(("text", "</parameter>" + "\n" * LESS)),
        OPEN + "<parameter=" + "x" * LESS + ">\n",
        OPEN * (LESS // len(OPEN)),
        ('<tool_call>{"name": "f", "arguments": {"text": "a}}</tool_call>\n') * (LESS // 66),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_time_is_linear_in_the_text(text: str, held: bool) -> None:
    found = raw_events([text[at : at + 16] for at in range(0, len(text), 16)], held=held)
    assert merged(found) == events(text, held=held)


TEMPLATE = (Path(expertstream.__file__).parent / "embedded" / "chat_template.jinja").read_text()


def rendered(arguments: dict[str, Any]) -> str:
    """A call as the embedded template writes it in the history."""
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]  # fmt: skip
    text = render_template(TEMPLATE, {"messages": messages})
    return text[text.index("</think>") + len("</think>") : text.rindex("<|im_end|>")]


# A value is told apart unless a line of it is the end of one, or the beginning of another parameter of the function: these cannot be.
WORDS = ["</parameter>", "</tool_call>", " <parameter=n>", "<parameter=b>", "</function>", "<tool_call>", "<think>", "</think>", "\n", " ", "x", '"', "\\", "é", "<", "😀"]  # fmt: skip
VALUES = st.lists(
    st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=10
).map("".join)


def can_be_told_apart(value: str) -> bool:
    squeezed = "".join((value + "\n").split())
    ends = ["</parameter>" + tag for tag in ("<parameter=", "</function>", "</tool_call>")]
    return (
        not any(end in squeezed for end in ends)
        and not value.endswith("</parameter>")
        and not value.rstrip().endswith("</parameter>")
    )


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(["text", "other", "any"]), VALUES.filter(can_be_told_apart), min_size=1))
@example({"text": "", "other": "\n", "any": "\n\n"})
@example(
    {
        "text": "a\n</parameter>\nb </tool_call>",
        "other": "a <parameter=b> c\n</function>\n</tool_call>",
        "any": "</think>\n",
    }
)
@example({"text": "</parameter>x", "other": "\n</tool_call>\n", "any": "<tool_call>\n<function=f>\n</function>"})
def test_a_call_of_the_history_is_read_as_it_was(arguments: dict[str, str]) -> None:
    assert events(rendered(arguments)) == call(**arguments)


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries({}, optional={"n": st.integers(-(2**53), 2**53), "x": st.floats(allow_nan=False, allow_infinity=False), "yes": st.booleans(), "list": st.lists(st.integers() | VALUES), "maybe": st.none() | st.integers(), "text": st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]))}))  # fmt: skip
def test_arguments_come_back_with_their_types(arguments: dict[str, Any]) -> None:
    for held in (False, True):
        found = events(rendered(arguments), held=held)
        if held or all(can_be_told_apart(part) for part in arguments.get("list", []) if isinstance(part, str)):
            assert found == call(**arguments)


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}}}, {"n": 3, "s": "3"}),
        ({"additionalProperties": {"type": "integer"}}, {"n": 3, "s": 3}),
        ({"anyOf": [{"properties": {"n": {"type": "integer"}}}, {"properties": {"n": {"type": "boolean"}}}]}, {"n": 3, "s": "3"}),
        ({"allOf": [{"properties": {"n": {"type": "integer"}}}], "patternProperties": {"^s": {"type": "integer"}}}, {"n": 3, "s": 3}),
    ],
)  # fmt: skip
def test_arguments_are_typed_wherever_the_schema_says_it(parameters: Any, arguments: dict[str, Any]) -> None:
    text = "<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n<parameter=s>\n3\n</parameter>\n</function>\n</tool_call>"
    for held in (False, True):
        parser = OutputParser([{"name": "f", "parameters": parameters}], held=held)
        found = [e for char in text for e in parser.feed(char)] + parser.finish()
        assert found[-1] == CallEnd(0, "f", arguments, True)
        assert "".join(e.json for e in found if isinstance(e, CallDelta)) == json.dumps(arguments)
