"""The fenced blocks of docs/clients.md: what the document tells users to do is what the tests do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ADDRESS", "Block", "blocks"]

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "127.0.0.1:8080"  # of the server, in the document
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    text: str

    def at(self, port: int) -> str:
        """For a server on this port."""
        return self.text.replace(ADDRESS, f"127.0.0.1:{port}")


def blocks(client: str, language: str) -> list[Block]:
    """Those of a client's section; of the beginning of the document for client ""."""
    sections = dict(
        (part.partition("\n")[0] if i else "", part)
        for i, part in enumerate(re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE))
    )
    return [Block(*found) for found in _FENCE.findall(sections[client]) if found[0] == language]
