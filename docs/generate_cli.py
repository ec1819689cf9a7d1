"""Prints docs/cli.md: every --help as it is. A test compares; `make docs` writes it."""

from __future__ import annotations

import argparse

from expertstream.cli import build_parser


def document() -> str:
    parser = build_parser()
    parts = ["# Command line\n\nMade from `--help` by `make docs`; a test compares the two.\n"]
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in [("expertstream", parser), *((f"expertstream {n}", p) for n, p in commands.choices.items())]:
        parts.append(f"## {name}\n\n```\n{sub.format_help().rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
