"""Appends rows of results to a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["append_rows"]


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the header if the file is new."""
    exists = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if not exists:
            writer.writeheader()
        writer.writerows(rows)
