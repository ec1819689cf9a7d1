"""The cost of a token, calculated from a config: bytes of weights that decoding touches, and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import MatrixFormat
from ..kv_cache import state_bytes
from ..layers import DecoderConfig

__all__ = ["TokenCost", "token_cost"]


@dataclass(frozen=True)
class TokenCost:
    """The cost of decoding one token."""

    trunk_bytes: int  # weights of the trunk, without the embedding (only one row of it is read)
    expert_bytes: int  # one expert
    experts: int  # top_k · layers
    kv_bytes: int  # keys and values for each further token of a long context, in bfloat16
    multiply_adds: int  # with weights, including the output projection
    head_multiply_adds: int  # of the output projection, which a prompt needs only once

    @property
    def bytes(self) -> int:
        return self.trunk_bytes + self.experts * self.expert_bytes


def token_cost(c: DecoderConfig, trunk: dict[str, MatrixFormat], expert_bytes: int, top_k: int = 0) -> TokenCost:
    """trunk: module → format."""
    top_k = top_k or c.num_experts_per_tok
    used = {name: m for name, m in trunk.items() if name != "model.embed_tokens" or c.tie_word_embeddings}
    head = trunk["model.embed_tokens" if c.tie_word_embeddings else "lm_head"]
    long = 1 << 20
    expert_weights = 3 * c.hidden_size * c.moe_intermediate_size
    return TokenCost(
        trunk_bytes=sum(m.nbytes for m in used.values()),
        expert_bytes=expert_bytes,
        experts=top_k * c.num_hidden_layers,
        kv_bytes=state_bytes(c.states, long + 1, "bf16") - state_bytes(c.states, long, "bf16"),
        multiply_adds=sum(m.rows * m.cols for m in used.values()) + top_k * c.num_hidden_layers * expert_weights,
        head_multiply_adds=head.rows * head.cols,
    )
