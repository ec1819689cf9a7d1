"""python -m expertstream, and the command expertstream."""

from __future__ import annotations

import os
import sys

# NumPy's library would start a thread for each processor, and is given little to do: the engine has threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__all__ = ["main"]


def main() -> int:
    """Runs one command; returns its exit code."""
    try:
        from .cli import main as run  # in here, since Ctrl-C may come while modules are loaded

        return run()
    except KeyboardInterrupt:
        print("expertstream: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
