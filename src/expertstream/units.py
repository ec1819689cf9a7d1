"""Parsing and formatting of sizes in bytes."""

from __future__ import annotations

import re

from .errors import UsageError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_bytes(text: str | int) -> int:
    """ "8GiB", "500M", 1024 → bytes. K, M, G, T are powers of 1000; Ki, Mi, Gi, Ti of 1024. Raises UsageError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str) or len(text) > 40:
        raise UsageError(f"{str(text)[:40]!r} is not a size; write for example 8GiB or 500M")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write for example 8GiB or 500M")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """A readable size, in powers of 1024: 1536 → "1.5 KiB"."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 1024 or unit == "TiB":
            break
    return f"{count:.1f} {unit}" if abs(count) < 100 else f"{count:.0f} {unit}"
