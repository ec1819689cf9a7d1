"""The config.json fields that all models share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..checkpoint.fields import Fields
from ..checkpoint.format import ExpertSpec
from ..kv_cache import StateSpec
from .rotary import RotaryShape

__all__ = ["DecoderConfig"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ABC):
    """Hugging Face's keys, from config.json; nothing beyond them is assumed."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    rms_norm_eps: float
    rotary: RotaryShape
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    @abstractmethod
    def from_json(cls, config: dict[str, Any], where: str) -> DecoderConfig:
        """Raises CheckpointError for a missing or impossible value."""

    @property
    @abstractmethod
    def states(self) -> tuple[StateSpec, ...]:
        """What each layer remembers of a sequence."""

    @property
    @abstractmethod
    def experts(self) -> tuple[ExpertSpec, ...]:
        """The routed experts of each layer."""

    @staticmethod
    def common(
        text: Fields,
        layer_types: tuple[str, ...],
        num_experts: str = "num_experts",
        inner: str = "moe_intermediate_size",
        partial_rotary: float = 1.0,
    ) -> dict[str, Any]:
        """The fields above from an object of config.json, checked. num_experts, inner: the names of these fields. partial_rotary: see
        RotaryShape.from_fields(). Raises CheckpointError."""
        names = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "num_experts_per_tok", "max_position_embeddings",
        )  # fmt: skip
        sizes = {name: text.size(name) for name in names}
        sizes |= {"num_experts": text.size(num_experts), "moe_intermediate_size": text.size(inner)}
        text.multiple("num_attention_heads", of="num_key_value_heads")
        if sizes["num_experts_per_tok"] > sizes["num_experts"]:
            raise text.error(
                f"num_experts_per_tok ({sizes['num_experts_per_tok']}) must be at most {num_experts} ({sizes['num_experts']})"
            )
        rotary = RotaryShape.from_fields(text, sizes["head_dim"], partial_rotary)
        if rotary.scaling is not None:
            sizes["max_position_embeddings"] = max(sizes["max_position_embeddings"], rotary.scaling.context)
        return {
            **sizes,
            "layer_types": layer_types,
            "rms_norm_eps": text.number("rms_norm_eps", 0, 0.999),
            "rotary": rotary,
            "tie_word_embeddings": text.flag("tie_word_embeddings", False),
        }
