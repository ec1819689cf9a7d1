"""expertstream: Mixture-of-Experts language models larger than memory, their experts streamed from the SSD."""

from __future__ import annotations

from .config import EngineConfig
from .engine import LLM, GenerationResponse, GenerationStats, Session, TokenLogprob
from .errors import (
    BudgetError,
    CheckpointError,
    ConvertError,
    ExpertStreamError,
    ReadError,
    RequestError,
    UsageError,
)
from .sampling import SamplingParams

__all__ = [
    "LLM",
    "BudgetError",
    "CheckpointError",
    "ConvertError",
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
