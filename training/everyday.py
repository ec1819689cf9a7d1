"""Functions that assistants are usually given, and how people ask for them: scenes.txt, read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["SCENES", "Scene", "Slot", "Wording"]


class Slot(NamedTuple):
    """A parameter. kind: of values.py, "bool", or choices as "on/off"."""

    name: str
    kind: str
    description: str
    required: bool


class Wording(NamedTuple):
    """A request with {parameters}, and the values that it implies without naming them."""

    text: str
    implied: dict[str, bool]


class Scene(NamedTuple):
    names: tuple[str, ...]
    description: str
    slots: tuple[Slot, ...]
    wordings: tuple[Wording, ...]


def _slot(line: str) -> Slot:
    head, description = line.split(": ", 1)
    name, kind = head.split()
    return Slot(name.rstrip("?"), kind, description, not name.endswith("?"))


def _wording(line: str) -> Wording:
    text, _, implied = line.removeprefix("- ").partition(" => ")
    return Wording(text, {name: value == "true" for name, value in (part.split("=") for part in implied.split())})


def _scene(paragraph: str) -> Scene:
    names, *lines = paragraph.splitlines()
    names, description = names.split(" | ")
    return Scene(
        tuple(names.split()),
        description,
        tuple(_slot(line) for line in lines if not line.startswith("- ")),
        tuple(_wording(line) for line in lines if line.startswith("- ")),
    )


SCENES = tuple(
    _scene(paragraph.strip())
    for paragraph in (Path(__file__).parent / "scenes.txt").read_text(encoding="utf-8").split("\n\n")
    if paragraph.strip() and not paragraph.startswith("#")
)
