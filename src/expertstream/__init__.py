"""expertstream: runs Mixture-of-Experts language models larger than memory by streaming their experts from the SSD."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine import LLM
    from .errors import (
        BudgetError,
        CheckpointError,
        ConvertError,
        DeviceError,
        ExpertStreamError,
        ReadError,
        RequestError,
        UsageError,
    )
    from .responses import GenerationResponse, GenerationStats, TokenLogprob
    from .sampling import SamplingParams
    from .session import Session

__all__ = [
    "LLM",
    "BudgetError",
    "CheckpointError",
    "ConvertError",
    "DeviceError",
    "EngineConfig",
    "ExpertStreamError",
    "GenerationResponse",
    "GenerationStats",
    "ReadError",
    "RequestError",
    "SamplingParams",
    "Session",
    "TokenLogprob",
    "UsageError",
]
__version__ = "0.1.0"

_HOMES = {"EngineConfig": "config", "SamplingParams": "sampling", "LLM": "engine", "Session": "session"} | {
    name: "responses" for name in ("GenerationResponse", "GenerationStats", "TokenLogprob")
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `expertstream --help` does not load NumPy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
