"""What the evaluation asks, training never says."""

from __future__ import annotations

import json
import random
import re

import pytest

from training import questions, tools
from training.everyday import SCENES
from training.unseen import QUESTIONS, TOOLS
from training.words import Sense


@pytest.fixture(autouse=True)
def few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """WordNet need not be installed."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    made = [a + b + c for a in syllables for b in syllables for c in ("n", "r", "l")][:9001]
    senses = [Sense(word, "noun", "a thing", (f"this is a {word} of ours",), "thing", 1) for word in made]
    for module in (questions, tools):
        monkeypatch.setattr(module, "senses", lambda: senses)
    monkeypatch.setattr(tools, "nouns", lambda most=0: made[: most or 3000])
    monkeypatch.setattr(tools, "examples", lambda: [s.examples[0] for s in senses])


def bare(text: str) -> str:
    return re.sub(r"\{\w+\}", "{}", text).lower().strip(" ?.!")


def test_everyday_functions_share_no_name_and_no_wording_with_the_unseen_ones() -> None:
    assert not {n for s in SCENES for n in s.names} & {t.name for t in TOOLS}
    said = {bare(w if isinstance(w, str) else w[0]) for s in SCENES for w in s.wordings}
    assert not said & {bare(w) for t in TOOLS for w in t.wordings}


def test_every_wording_names_or_implies_what_its_function_requires() -> None:
    for scene in SCENES:
        for wording in scene.wordings:
            text, implied = (wording, {}) if isinstance(wording, str) else wording
            named = set(re.findall(r"\{(\w+)\}", text)) | set(implied)
            assert {s.name for s in scene.slots if s.required} <= named <= {s.name for s in scene.slots}, text


def test_no_question_of_the_evaluation_is_made() -> None:
    unseen = {bare(q) for q, _ in QUESTIONS}
    r = random.Random(4)
    for _ in range(3000):
        for message in questions.ask(r)["m"]:
            assert bare(message["content"]) not in unseen


def test_calls_fit_their_schemas() -> None:
    r = random.Random(5)
    types = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}
    for _ in range(1500):
        doc = tools.conversation(r)
        schemas = {s["function"]["name"]: s["function"]["parameters"] for s in doc["tools"]}
        for message in doc["m"]:
            for call in message.get("tool_calls") or []:
                schema = schemas[call["name"]]
                assert set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
                for key, value in call["arguments"].items():
                    given = schema["properties"][key]
                    assert isinstance(value, types[given["type"]])
                    assert value in given.get("enum", [value]), json.dumps(given)
