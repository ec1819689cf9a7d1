"""Entry point of `python -m expertstream` and of the command `expertstream`."""

from __future__ import annotations

import os
import sys

# OpenBLAS would start a thread for each processor, for little work: the engine has its own threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__all__ = ["main"]


def main() -> int:
    """Runs one command; returns its exit code."""
    try:
        from .cli import main as run  # imported here, since Ctrl-C may arrive while modules load

        return run()
    except KeyboardInterrupt:
        print("expertstream: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
