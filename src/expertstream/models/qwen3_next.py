"""Qwen3-Next and Qwen3-Coder-Next: Qwen3.5-MoE's layers, with the inputs of each gated-delta layer in two matrices.

The arithmetic is that of `transformers.models.qwen3_next`, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.fields import Fields
from ..layers import GatedDeltaNet, Mixer, Weights
from . import qwen3_5_moe

__all__ = ["Config", "Model"]


@dataclass(frozen=True, kw_only=True)
class Config(qwen3_5_moe.Config):
    """config.json of Qwen3-Next."""

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> Config:
        text = Fields(config, where)
        text.fixed(mlp_only_layers=[], decoder_sparse_step=1, norm_topk_prob=True)
        return cls(**cls.linear_fields(text))


class Model(qwen3_5_moe.Model):
    """Tokens → logits."""

    def linear(self, c: qwen3_5_moe.Config, w: Weights, name: str) -> Mixer:
        s, hidden = c.delta, c.hidden_size
        share = s.value_heads // s.key_heads
        # For each key head: a query, a key, and the values and gates of its share of the value heads.
        q, k, v, z = rows_by_head(s.key_heads, s.key_dim, s.key_dim, share * s.value_dim, share * s.value_dim)
        qkv_weight, z_weight = w.split(f"{name}.in_proj_qkvz", hidden, [q + k + v, z])
        b_weight, a_weight = w.split(
            f"{name}.in_proj_ba", hidden, rows_by_head(s.key_heads, share, share), sensitive=True
        )
        return GatedDeltaNet(w, name, hidden, s, (qkv_weight, z_weight, a_weight, b_weight))


def rows_by_head(heads: int, *sizes: int) -> list[list[int]]:
    """The row numbers of several matrices that are stored head by head, `sizes` rows of each per head."""
    rows: list[list[int]] = [[] for _ in sizes]
    at = 0
    for _ in range(heads):
        for of_one, size in zip(rows, sizes, strict=True):
            of_one.extend(range(at, at + size))
            at += size
    return rows
