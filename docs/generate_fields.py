"""Writes the tables of docs/serving.md: what becomes of each field of a request, from the classes that requests are checked against."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertstream.server.anthropic import CountRequest, MessagesRequest, Tool
from expertstream.server.openai import ChatRequest, CompletionRequest, Function
from expertstream.server.responses import ResponsesRequest
from expertstream.server.wire import Wire

DOCUMENT = Path(__file__).parent / "serving.md"
BEGIN, END = "<!-- fields: made by docs/generate_fields.py -->\n", "<!-- end of fields -->\n"
# Tools are checked one by one, since those that are no functions are skipped.
TOOLS: dict[type[Wire], tuple[str, type[Wire]]] = {
    ChatRequest: ("tools[].function", Function),
    ResponsesRequest: ("tools[]", Function),
    MessagesRequest: ("tools[]", Tool),
}
TITLES: list[tuple[type[Wire], str, type[Wire] | None]] = [
    (ChatRequest, "`POST /v1/chat/completions`", None),
    (CompletionRequest, "`POST /v1/completions`, where it differs", ChatRequest),
    (ResponsesRequest, "`POST /v1/responses`, where it differs", ChatRequest),
    (MessagesRequest, "`POST /v1/messages`, `POST /v1/messages/count_tokens`", None),
]


def inner(annotation: Any) -> Iterator[tuple[type[Wire], bool]]:
    """The objects in a field's type, and whether they are in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Wire):
        yield annotation, False
    for part in typing.get_args(annotation):
        for kind, listed in inner(part):
            yield kind, listed or typing.get_origin(annotation) is list


def rows(kind: type[Wire], prefix: str = "", seen: dict[type[Wire], str] | None = None) -> dict[str, tuple[str, str]]:
    """Path → (effect, note). Objects that occur in several places are described once."""
    found: dict[str, tuple[str, str]] = {}
    seen = {} if seen is None else seen
    for name, info in kind.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        path = prefix + (info.alias or name)
        found[path] = (str(extra.get("x-effect", "honoured")), str(extra.get("x-why") or info.description or ""))
        for part, listed in inner(info.annotation):
            place = path + ("[]" if listed else "")
            if part in seen:
                found[place] = ("honoured", f"like `{seen[part]}`")
            else:
                seen[part] = place
                found |= rows(part, f"{place}.", seen)
    if kind in TOOLS:
        place, tool = TOOLS[kind]
        found |= rows(tool, f"{place}.")
    return found


def document() -> str:
    """The tables; fields that share their fate share a row."""
    assert MessagesRequest.model_fields.keys() == CountRequest.model_fields.keys()
    parts = []
    for kind, title, like in TITLES:
        known = rows(like) if like is not None else {}
        groups: dict[tuple[str, str], list[str]] = {}
        for path, told in rows(kind).items():
            if known.get(path) != told:
                groups.setdefault(told, []).append(f"`{path}`")
        lines = [f"{title}\n", "| | fields | |", "|---|---|---|"]
        for effect in ("honoured", "ignored", "ignored, with a warning in the log", "declined", "refused"):
            lines += [
                f"| {told[0]} | {', '.join(paths)} | {told[1]} |" for told, paths in groups.items() if told[0] == effect
            ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def written(text: str) -> str:
    """The document with the tables as they have to be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{document()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(document())
    else:
        DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
