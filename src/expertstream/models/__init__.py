"""One model, one file. The file's name is the model_type it runs (without "_text")."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checkpoint.format import ExpertLayout, WeightSpec
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError
from ..layers import Decoder, DecoderConfig, Experts, Weights, activation_bytes, weight_names

__all__ = [
    "build",
    "config_of",
    "expert_layouts",
    "find_model",
    "read_config",
    "scratch_bytes",
    "supported_models",
    "weight_map",
]


def supported_models() -> list[str]:
    """The supported model types, as named in config.json."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "__init__")


def find_model(config: dict[str, Any], where: str) -> ModuleType:
    """The module that runs config["model_type"]. Raises CheckpointError for one that is not supported."""
    model_type = config.get("model_type")
    name = str(model_type).removesuffix("_text")
    if name not in supported_models():
        raise CheckpointError(
            f"{where}: unsupported model_type {model_type!r}; supported: {', '.join(supported_models())}"
        )
    return import_module(f".{name}", __package__)


def read_config(config: dict[str, Any], where: str) -> DecoderConfig:
    """The contents of a config.json, checked. where: for errors. Raises CheckpointError."""
    found: DecoderConfig = find_model(config, where).Config.from_json(config, where)
    return found


def config_of(checkpoint: Checkpoint) -> DecoderConfig:
    """The checked config.json of a checkpoint. Raises CheckpointError."""
    return read_config(checkpoint.config, str(checkpoint.path))


def build(config: DecoderConfig, w: Weights, experts: Experts, top_k: int = 0) -> Decoder:
    """Builds the model described by a config."""
    architecture: Any = sys.modules[type(config).__module__]
    model: Decoder = architecture.Model(config, w, experts, top_k)
    return model


def weight_map(config: DecoderConfig) -> dict[str, WeightSpec]:
    """Every dense tensor, by canonical name."""
    nothing: Any = None
    return weight_names(lambda weights: build(config, weights, nothing))


def expert_layouts(config: DecoderConfig, checkpoint: Checkpoint) -> list[ExpertLayout]:
    """The location of each layer's routed experts. Raises CheckpointError."""
    return [checkpoint.experts(i, spec) for i, spec in enumerate(config.experts)]


def scratch_bytes(config: DecoderConfig, tokens: int, capacity: int, threads: int) -> int:
    """An upper bound of the activations while the last `tokens` of `capacity` prompt tokens go through the model."""
    return activation_bytes(lambda w, experts: build(config, w, experts), config, tokens, capacity, threads)
