"""Qwen3-MoE: full attention with normed queries and keys, and a sparse MoE block without a shared expert, in every layer.

The arithmetic is that of `transformers.models.qwen3_moe`, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.fields import Fields
from ..checkpoint.format import ExpertSpec
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


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """config.json of Qwen3-MoE."""

    norm_topk_prob: bool
    attention_bias: bool

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> Config:
        text = Fields(config, where)
        text.fixed(hidden_act="silu", mlp_only_layers=[], decoder_sparse_step=1, use_sliding_window=False)
        return cls(
            **cls.common(text, ("full_attention",) * text.size("num_hidden_layers")),
            norm_topk_prob=text.flag("norm_topk_prob", False),
            attention_bias=text.flag("attention_bias", False),
        )

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.rms_norm_eps,
            bias=self.attention_bias,
        )

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return (self.attention.state,) * self.num_hidden_layers

    @property
    def experts(self) -> tuple[ExpertSpec, ...]:
        sizes = self.num_experts, self.moe_intermediate_size, self.hidden_size
        return tuple(ExpertSpec(f"model.layers.{i}.mlp", *sizes) for i in range(self.num_hidden_layers))


class Model(Decoder):
    """Tokens → logits."""

    def __init__(self, config: Config, w: Weights, experts: Experts, top_k: int = 0) -> None:
        """top_k: experts per token, 0 for the number that the model was trained with; fewer is lossy."""
        c, hidden, eps = config, config.hidden_size, config.rms_norm_eps
        top_k = top_k or c.num_experts_per_tok
        layers = [
            DecoderLayer(
                w.norm(f"{name}.input_layernorm", hidden, eps),
                Attention(w, f"{name}.self_attn", hidden, c.attention),
                w.norm(f"{name}.post_attention_layernorm", hidden, eps),
                SparseMoeBlock(w, experts, i, c.experts[i], top_k, renormalize=c.norm_topk_prob),
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
