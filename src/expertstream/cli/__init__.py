"""The command line, one file per command. Commands import what they need when they run."""

from __future__ import annotations

from .main import build_parser, main

__all__ = ["build_parser", "main"]
