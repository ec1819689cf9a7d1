"""Ctrl-C at a chosen line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["interrupted"]


class _Interrupt(KeyboardInterrupt):
    pass


def interrupted(run: Callable[[], object], line: int, files: tuple[str, ...]) -> bool:
    """Runs something, with a KeyboardInterrupt at the line-th line that is executed in files whose names end so; whether it was reached."""
    left = [line]

    def tracer(frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise _Interrupt
        return tracer

    sys.settrace(tracer)
    try:
        run()
    except _Interrupt:
        return True
    finally:
        sys.settrace(None)
    return False
