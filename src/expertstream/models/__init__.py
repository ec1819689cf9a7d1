"""One model, one file. The file's name is the model_type it runs (without "_text")."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import CheckpointError

__all__ = ["find_model", "supported_models"]


def supported_models() -> list[str]:
    """The model types that can be run, as config.json names them."""
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
