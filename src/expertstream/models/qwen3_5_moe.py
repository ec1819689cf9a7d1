"""Qwen3.5-MoE, text part: gated-delta and gated full-attention layers, each followed by a sparse MoE block.

The arithmetic is that of `transformers.models.qwen3_5_moe`, which the tests compare with.
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
    DeltaShape,
    Experts,
    GatedDeltaNet,
    Mixer,
    Rotary,
    SparseMoeBlock,
    Weights,
)

__all__ = ["Config", "Model"]

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """config.json of Qwen3.5-MoE."""

    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    shared_expert_intermediate_size: int

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> Config:
        whole = Fields(config, where)
        text = whole.inner("text_config")
        fields = cls.linear_fields(text)
        return cls(
            **{**fields, "tie_word_embeddings": whole.flag("tie_word_embeddings", fields["tie_word_embeddings"])}
        )

    @classmethod
    def linear_fields(cls, text: Fields) -> dict[str, Any]:
        """All fields of an architecture with these layers, from one object of config.json. Raises CheckpointError."""
        text.fixed(hidden_act="silu", attention_bias=False, attn_output_gate=True)
        fields = cls.common(text, cls._layer_types(text), partial_rotary=0.25)
        names = (
            "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
            "linear_conv_kernel_dim", "shared_expert_intermediate_size",
        )  # fmt: skip
        fields |= {name: text.size(name) for name in names}
        text.multiple("linear_num_value_heads", of="linear_num_key_heads")
        if not 2 <= fields["linear_conv_kernel_dim"] <= 8:
            raise text.error(f"linear_conv_kernel_dim must be from 2 to 8; got {fields['linear_conv_kernel_dim']}")
        return fields

    @staticmethod
    def _layer_types(text: Fields) -> tuple[str, ...]:
        if text.values.get("layer_types") is None:
            interval = text.size("full_attention_interval")
            return tuple(LINEAR if (i + 1) % interval else FULL for i in range(text.size("num_hidden_layers")))
        return text.layer_types(LINEAR, FULL)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.rms_norm_eps,
            plus_one=True,
            gated=True,
        )

    @property
    def delta(self) -> DeltaShape:
        return DeltaShape(
            self.linear_num_key_heads,
            self.linear_num_value_heads,
            self.linear_key_head_dim,
            self.linear_value_head_dim,
            self.linear_conv_kernel_dim,
            self.rms_norm_eps,
        )

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(self.attention.state if kind == FULL else self.delta.state for kind in self.layer_types)

    @property
    def experts(self) -> tuple[ExpertSpec, ...]:
        sizes = self.num_experts, self.moe_intermediate_size, self.hidden_size
        return tuple(ExpertSpec(f"model.layers.{i}.mlp", *sizes) for i in range(self.num_hidden_layers))


class Model(Decoder):
    """Tokens → logits."""

    def __init__(self, config: Config, w: Weights, experts: Experts, top_k: int = 0) -> None:
        """top_k: experts per token, 0 for the number that the model was trained with; fewer is lossy."""
        c = config
        top_k = top_k or c.num_experts_per_tok
        super().__init__(
            w,
            experts,
            [self._layer(c, w, experts, i, top_k) for i in range(c.num_hidden_layers)],
            Rotary(w.ops, c.rotary),
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            eps=c.rms_norm_eps,
            plus_one=True,
            tied=c.tie_word_embeddings,
        )

    def _layer(self, c: Config, w: Weights, experts: Experts, i: int, top_k: int) -> DecoderLayer:
        name, hidden, full = f"model.layers.{i}", c.hidden_size, c.layer_types[i] == FULL
        return DecoderLayer(
            w.norm(f"{name}.input_layernorm", hidden, c.rms_norm_eps, plus_one=True),
            Attention(w, f"{name}.self_attn", hidden, c.attention)
            if full
            else self.linear(c, w, f"{name}.linear_attn"),
            w.norm(f"{name}.post_attention_layernorm", hidden, c.rms_norm_eps, plus_one=True),
            SparseMoeBlock(w, experts, i, c.experts[i], top_k, shared_inner=c.shared_expert_intermediate_size),
        )

    def linear(self, c: Config, w: Weights, name: str) -> Mixer:
        """The gated-delta layer `name`."""
        s, hidden = c.delta, c.hidden_size
        qkv, z = w.matrix(f"{name}.in_proj_qkv", s.channels, hidden), w.matrix(f"{name}.in_proj_z", s.values, hidden)
        # Small, and they decide how long the state remembers.
        b, a = (w.matrix(f"{name}.in_proj_{part}", s.value_heads, hidden, sensitive=True) for part in ("b", "a"))
        return GatedDeltaNet(w, name, hidden, s, (qkv, z, a, b))
