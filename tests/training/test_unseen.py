"""What the evaluation asks, training never says."""

from __future__ import annotations

import json
import random
import re

import pytest

from training import questions, tools, values
from training.everyday import SCENES
from training.unseen import QUESTIONS, TOOLS
from training.words import Sense


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordNet need not be installed."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    made = [a + b + c for a in syllables for b in syllables for c in ("n", "r", "l")][:9001]
    senses = [Sense(word, "noun", "a thing", (f"this is a {word} of ours",), "thing", 1) for word in made]
    for module in (questions, tools, values):
        monkeypatch.setattr(module, "senses", lambda: senses)
        monkeypatch.setattr(module, "examples", lambda: [s.examples[0] for s in senses], raising=False)
    monkeypatch.setattr(values, "nouns", lambda: made[:3000])
    values.use_vocabulary([])


def bare(text: str) -> str:
    return re.sub(r"\{\w+\}", "{}", text).lower().strip(" ?.!")


def test_everyday_functions_share_no_name_and_no_wording_with_the_unseen_ones() -> None:
    names = [n for s in SCENES for n in s.names]
    assert len(set(names)) == len(names)
    assert not set(names) & {t.name for t in TOOLS}
    assert not {bare(w.text) for s in SCENES for w in s.wordings} & {bare(w) for t in TOOLS for w in t.wordings}


def test_every_scene_has_known_kinds_and_wordings_that_name_or_imply_what_it_requires() -> None:
    for scene in SCENES:
        assert scene.names and scene.description and scene.wordings
        for slot in scene.slots:
            assert slot.kind in values.SLOTS or slot.kind == "bool" or "/" in slot.kind, slot
        for text, implied in scene.wordings:
            named = set(re.findall(r"\{(\w+)\}", text)) | set(implied)
            assert {s.name for s in scene.slots if s.required} <= named <= {s.name for s in scene.slots}, text


def test_no_question_of_the_evaluation_is_made() -> None:
    unseen = {bare(q) for q, _ in QUESTIONS}
    r = random.Random(4)
    for _ in range(3000):
        for message in questions.ask(r)["m"]:
            assert bare(message["content"]) not in unseen


@pytest.mark.parametrize("known", [[], ["dishes", "pasta", "eggs", "track"]])
def test_calls_fit_their_schemas(known: list[str]) -> None:
    r = random.Random(5)
    values.use_vocabulary(known)
    met = set[str]()
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for _ in range(1500):
        doc = tools.conversation(r)
        schemas = {s["function"]["name"]: s["function"]["parameters"] for s in doc["tools"]}
        met |= set(re.findall("[a-z]+", json.dumps(doc["tools"]))) & set(known)
        for schema in schemas.values():
            enums = [p["enum"] for p in schema["properties"].values() if "enum" in p]
            assert all(len(set(e)) == len(e) for e in enums)
        for message in doc["m"]:
            for call in message.get("tool_calls") or []:
                schema = schemas[call["name"]]
                assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
                for key, value in call["arguments"].items():
                    given = schema["properties"][key]
                    assert isinstance(value, types[given["type"]])
                    assert value in given.get("enum", [value]), json.dumps(given)
    values.use_vocabulary([])
    assert met == set(known)
