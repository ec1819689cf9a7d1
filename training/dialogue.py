"""Real small talk between people (PyPI's chitchat-dataset, MIT), the second speaker as the assistant."""

from __future__ import annotations

import itertools
import json
import random
import re
from functools import cache
from pathlib import Path

from .chat import Document

__all__ = ["load"]

# Conversations with these are left out: rudeness, addresses, other people's private matters.
_UNWANTED = re.compile(
    r"\b(f+u+c+k|sh[i1]t|bitch|sex|porn|nude|dick|pussy|cunt|nigg|fag|rape|suicid|kill my|whore|slut|cock|weed|cocaine|penis"
    r"|boob|damn|wtf|hate you|stupid|idiot|drunk|@|https?:|www\.|\d{5,}|mturk|turker|hit\b|survey|experiment|study i)",
    re.IGNORECASE,
)


@cache
def load(path: Path) -> list[Document]:
    """path is the package's dataset.json. Runs of messages by one person are one turn; 2 to 10 turns a document."""
    docs = []
    for conversation in json.loads(path.read_text()).values():
        turns: list[list[str]] = []
        for group in conversation["messages"]:
            text = " ".join(" ".join(m["text"].split()) for m in group)
            if text:
                turns.append([group[0]["sender"], text])
        if any(_UNWANTED.search(text) or not text.isascii() or len(text) > 300 for _, text in turns):
            continue
        if any(a[0] == b[0] for a, b in itertools.pairwise(turns)):
            continue
        for begin in range(0, len(turns) - 1, 10):
            part = turns[begin : begin + 10]
            part = part[: len(part) // 2 * 2]
            if part:
                roles = ["user", "assistant"] * (len(part) // 2)
                messages = [{"role": role, "content": _tidy(text)} for role, (_, text) in zip(roles, part, strict=True)]
                docs.append({"c": "smalltalk", "m": messages})
    random.Random(1).shuffle(docs)
    return docs


def _tidy(text: str) -> str:
    """Capitals and an end, as a tidy writer would have it."""
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
    return text if text[-1] in ".!?" else text + "."
