"""gpt-oss: full and sliding-window attention with sinks, biases everywhere, clamped SwiGLU experts in MXFP4, YaRN.

The arithmetic is that of `transformers.models.gpt_oss`, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.fields import Fields
from ..checkpoint.format import ExpertSpec
from ..formats import Activation
from ..kv_cache import StateSpec
from ..layers import (
    Attention,
    AttentionShape,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    Experts,
    Rotary,
    SparseMoeBlock,
    Weights,
)

__all__ = ["Config", "Model"]

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """config.json of gpt-oss."""

    sliding_window: int
    swiglu_alpha: float
    swiglu_limit: float

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> Config:
        text = Fields(config, where)
        text.fixed(hidden_act="silu", attention_bias=True)
        return cls(
            **cls.common(text, cls._layer_types(text), "num_local_experts", "intermediate_size"),
            sliding_window=text.size("sliding_window"),
            swiglu_alpha=text.number("swiglu_alpha", 0, 1e3, 1.702),
            swiglu_limit=text.number("swiglu_limit", 0, 1e6, 7.0),
        )

    @staticmethod
    def _layer_types(text: Fields) -> tuple[str, ...]:
        if text.values.get("layer_types") is None:
            return tuple(FULL if i % 2 else SLIDING for i in range(text.size("num_hidden_layers")))
        return text.layer_types(SLIDING, FULL)

    def attention(self, layer: int) -> AttentionShape:
        return AttentionShape(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            bias=True,
            sinks=True,
            window=self.sliding_window if self.layer_types[layer] == SLIDING else 0,
        )

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(self.attention(i).state for i in range(self.num_hidden_layers))

    @property
    def experts(self) -> tuple[ExpertSpec, ...]:
        sizes = self.num_experts, self.moe_intermediate_size, self.hidden_size
        activation = Activation(self.swiglu_alpha, self.swiglu_limit)
        return tuple(
            ExpertSpec(f"model.layers.{i}.mlp", *sizes, activation, biased=True) for i in range(self.num_hidden_layers)
        )


class Model(Decoder):
    """Tokens → logits."""

    def __init__(self, config: Config, w: Weights, experts: Experts, top_k: int = 0) -> None:
        """top_k: experts per token, 0 for the number that the model was trained with; fewer is lossy."""
        c, hidden, eps = config, config.hidden_size, config.rms_norm_eps
        top_k = top_k or c.num_experts_per_tok
        layers = [
            DecoderLayer(
                w.norm(f"{name}.input_layernorm", hidden, eps),
                Attention(w, f"{name}.self_attn", hidden, c.attention(i)),
                w.norm(f"{name}.post_attention_layernorm", hidden, eps),
                # Softmax over the selected experts alone equals softmax over all, renormalized.
                SparseMoeBlock(w, experts, i, c.experts[i], top_k, router="router", router_bias=True),
            )
            for i, name in enumerate(f"model.layers.{i}" for i in range(c.num_hidden_layers))
        ]
        super().__init__(
            w,
            experts,
            layers,
            Rotary(w.ops, c.rotary),
            vocab_size=c.vocab_size,
            hidden_size=hidden,
            eps=eps,
            tied=c.tie_word_embeddings,
        )
