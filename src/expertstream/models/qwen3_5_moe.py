"""Qwen3.5-MoE, text part: gated-delta and gated full-attention layers, each followed by a sparse MoE block.

The arithmetic is that of `transformers.models.qwen3_5_moe`, which the tests compare with. x is (T, H) float32, T tokens;
h is the residual stream. Only the experts come from disk; everything else is the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import RLock
from typing import Any

from ..batch import Batch
from ..checkpoint.fields import Fields
from ..checkpoint.format import ExpertLayout, WeightSpec
from ..checkpoint.reader import Checkpoint
from ..experts.routed import RoutedExperts
from ..kv_cache import AttentionSpec, AttentionState, DeltaSpec, DeltaState, KVCache, StateSpec
from ..layers import Rotary, Weights, joined, weight_names
from ..ops import F32, I64, AttentionWeights, DeltaWeights

__all__ = ["Config", "Model", "expert_layouts", "weight_map"]

LINEAR, FULL = "linear_attention", "full_attention"


@dataclass(frozen=True)
class Config:
    """Hugging Face's keys, from config.json; nothing is assumed that it does not say."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dims: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str) -> Config:
        """Raises CheckpointError for a missing or impossible value."""
        whole = Fields(config, where)
        text = whole.inner("text_config")
        text.fixed(hidden_act="silu", attention_bias=False, attn_output_gate=True, rope_scaling={})
        rope = text if text.values.get("rope_parameters") is None else text.inner("rope_parameters")
        rope.fixed(rope_type="default")
        layers = text.size("num_hidden_layers")
        kinds = text.values.get("layer_types")
        if kinds is None:
            interval = text.size("full_attention_interval")
            kinds = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (LINEAR, FULL) for kind in kinds):
            raise text.error(f"layer_types must name {LINEAR} or {FULL} for each of {layers} layers")
        names = (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
            "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "max_position_embeddings",
        )  # fmt: skip
        sizes = {name: text.size(name) for name in names}
        text.multiple("num_attention_heads", of="num_key_value_heads")
        text.multiple("linear_num_value_heads", of="linear_num_key_heads")
        if sizes["num_experts_per_tok"] > sizes["num_experts"]:
            raise text.error(
                f"num_experts_per_tok ({sizes['num_experts_per_tok']}) is more than num_experts ({sizes['num_experts']})"
            )
        if not 2 <= sizes["linear_conv_kernel_dim"] <= 8:
            raise text.error(f"linear_conv_kernel_dim must be from 2 to 8, not {sizes['linear_conv_kernel_dim']}")
        # The architecture's default; an older place for it is beside rope_parameters.
        default = text.number("partial_rotary_factor", 0, 1, 0.25)
        rotary_dims = int(sizes["head_dim"] * rope.number("partial_rotary_factor", 0, 1, default))
        if rotary_dims == 0 or rotary_dims % 2:
            raise text.error(
                f"partial_rotary_factor rotates {rotary_dims} of {sizes['head_dim']} dimensions; it must be an even number"
            )
        return cls(
            **sizes,
            num_hidden_layers=layers,
            layer_types=tuple(kinds),
            rms_norm_eps=text.number("rms_norm_eps", 0, 0.999),
            rope_theta=rope.number("rope_theta", 1, 1e12),
            rotary_dims=rotary_dims,
            tie_word_embeddings=whole.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
        )

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_dim + self.value_dim

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What each layer remembers of a sequence."""
        full = AttentionSpec(self.num_key_value_heads, self.head_dim)
        linear = DeltaSpec(
            (self.linear_conv_kernel_dim - 1, self.conv_channels),
            (self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim),
        )
        return tuple(full if kind == FULL else linear for kind in self.layer_types)

    def scratch_bytes(self, tokens: int, capacity: int, threads: int) -> int:
        """Activations that live at once while `tokens` tokens go through a layer, from above. In floats; rounded activations, two
        bytes and some sums each, count as 0.6."""
        h, top_k, inner = self.hidden_size, self.num_experts_per_tok, self.moe_intermediate_size
        queries = self.num_attention_heads * self.head_dim
        attention = 4 * queries + 2 * self.num_key_value_heads * self.head_dim + 0.6 * (h + queries)
        delta = self.conv_channels + 2 * self.value_dim + 4 * self.linear_num_value_heads + 0.6 * (h + self.value_dim)
        routing = self.num_experts + 8 * top_k
        shared = 2.6 * self.shared_expert_intermediate_size + 0.6 * h
        pair = 2.6 * inner + 1.6 * h  # a token's part in one expert; of pairs, as many as tokens or 1,024 at a time
        moe = routing + max(shared, pair) + 64 * threads
        of_tokens = tokens * (4 * h + max(attention, delta, moe)) + 1024 * pair
        of_threads = threads * (400 * self.head_dim + 16384 + 3 * 128 * self.linear_value_head_dim)
        segments = -(-capacity // 1024) * (queries + 2 * self.num_attention_heads)
        return int(4 * (of_tokens + of_threads + segments + 2 * self.vocab_size))


def weight_map(config: Config) -> dict[str, WeightSpec]:
    """Every dense tensor, by canonical name."""
    return weight_names(lambda weights: Model(config, weights, None))


def expert_layouts(config: Config, checkpoint: Checkpoint) -> list[ExpertLayout]:
    """Where each layer's routed experts lie. Raises CheckpointError."""
    c = config
    return [
        checkpoint.experts(i, c.num_experts, c.moe_intermediate_size, c.hidden_size) for i in range(c.num_hidden_layers)
    ]


class GatedDeltaNet:
    """Linear attention with a gated delta rule (Yang et al., Gated Delta Networks, 2024)."""

    def __init__(self, w: Weights, c: Config, name: str) -> None:
        self.ops, hidden = w.ops, c.hidden_size
        qkv = w.matrix(f"{name}.in_proj_qkv", c.conv_channels, hidden)
        z = w.matrix(f"{name}.in_proj_z", c.value_dim, hidden)
        b, a = (w.matrix(f"{name}.in_proj_{part}", c.linear_num_value_heads, hidden) for part in ("b", "a"))
        self.in_proj = [qkv, z, a, b]  # all four read the same input, so they are multiplied together
        self.weights = DeltaWeights(
            conv=w.vector(f"{name}.conv1d.weight", c.conv_channels, 1, c.linear_conv_kernel_dim, kind="conv"),
            a_log=w.vector(f"{name}.A_log", c.linear_num_value_heads),
            dt_bias=w.vector(f"{name}.dt_bias", c.linear_num_value_heads),
            norm=w.vector(f"{name}.norm.weight", c.linear_value_head_dim),  # this norm has no +1
            key_heads=c.linear_num_key_heads,
            value_heads=c.linear_num_value_heads,
            key_dim=c.linear_key_head_dim,
            eps=c.rms_norm_eps,
        )
        self.out_proj = w.linear(f"{name}.out_proj", hidden, c.value_dim)

    def __call__(self, x: F32, states: Sequence[DeltaState], batch: Batch) -> F32:
        inputs, mixed = self.ops.project(x, self.in_proj), []
        for state, segment in zip(states, batch.segments, strict=True):
            begin = segment.begin
            for end in segment.cuts:
                qkv, z, a, b = (part[begin:end] for part in inputs)
                mixed.append(
                    self.ops.delta_net(
                        self.weights, qkv, z, a, b, state.conv_state, state.recurrent_state, batch.prompt
                    )
                )
                state.keep_if_asked(segment.cache, segment.position + end - segment.begin)
                begin = end
        return self.out_proj(joined(mixed))


class Attention:
    """Grouped-query attention with normed, partly rotated queries and keys, and an output gate."""

    def __init__(self, w: Weights, c: Config, name: str) -> None:
        self.ops, hidden = w.ops, c.hidden_size
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        # Rows of q_proj by head: query, gate.
        self.in_proj = [
            w.matrix(f"{name}.{part}_proj", n, hidden) for part, n in (("q", 2 * queries), ("k", keys), ("v", keys))
        ]
        self.o_proj = w.linear(f"{name}.o_proj", hidden, queries)
        q_norm, k_norm = (w.norm(f"{name}.{part}_norm", c.head_dim, c.rms_norm_eps).weight for part in ("q", "k"))
        self.weights = AttentionWeights(q_norm, k_norm, heads=c.num_attention_heads, eps=c.rms_norm_eps)

    def __call__(self, x: F32, states: Sequence[AttentionState], batch: Batch, cos: F32, sin: F32) -> F32:
        inputs, attended = self.ops.project(x, self.in_proj), []
        for state, segment in zip(states, batch.segments, strict=True):
            rows = slice(segment.begin, segment.end)
            q_gate, k, v = (part[rows] for part in inputs)
            attended.append(
                self.ops.attention(
                    self.weights, q_gate, k, v, cos[rows], sin[rows], state.keys, state.values, segment.position
                )
            )
        return self.o_proj(joined(attended))


class SparseMoeBlock:
    """Σ wᵢ·expertᵢ(x) over the top-k of a softmax router, plus a gated shared expert."""

    def __init__(self, w: Weights, c: Config, layer: int, top_k: int, experts: RoutedExperts) -> None:
        name, hidden, inner = f"model.layers.{layer}.mlp", c.hidden_size, c.shared_expert_intermediate_size
        self.layer, self.top_k, self.experts, self.ops = layer, top_k, experts, w.ops
        self.gate = w.matrix(f"{name}.gate", c.num_experts, hidden)
        self.shared_expert = [
            w.matrix(f"{name}.shared_expert.gate_proj", inner, hidden),
            w.matrix(f"{name}.shared_expert.up_proj", inner, hidden),
            w.matrix(f"{name}.shared_expert.down_proj", hidden, inner),
            w.matrix(f"{name}.shared_expert_gate", 1, hidden),
        ]

    def route(self, x: F32) -> tuple[F32, I64]:
        """Weights and experts (T, top_k) of x (T, H)."""
        return self.ops.route(x, self.gate, self.top_k)

    def __call__(self, x: F32, prompt: bool, ahead: Callable[[], None] | None) -> F32:
        """x (T, H) → (T, H). ahead: asks the next layer's router meanwhile."""
        weights, selected = self.route(x)
        return self.experts.apply(
            self.layer, x, weights, selected, prompt, lambda: self.ops.shared_expert(x, *self.shared_expert), ahead
        )


class DecoderLayer:
    """A token mixer and a sparse MoE block, each on a normed copy of the residual stream and added to it."""

    def __init__(self, w: Weights, c: Config, layer: int, top_k: int, experts: RoutedExperts) -> None:
        name, full = f"model.layers.{layer}", c.layer_types[layer] == FULL
        self.input_layernorm = w.norm(f"{name}.input_layernorm", c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(w, c, f"{name}.self_attn") if full else None
        self.linear_attn = None if full else GatedDeltaNet(w, c, f"{name}.linear_attn")
        self.post_attention_layernorm = w.norm(f"{name}.post_attention_layernorm", c.hidden_size, c.rms_norm_eps)
        self.mlp = SparseMoeBlock(w, c, layer, top_k, experts)
        self.following: DecoderLayer | None = None

    def expect(self, h: F32) -> None:
        """Asks this layer's router about hidden states of the layer before, so that its experts may be read ahead."""
        self.mlp.experts.expect(self.mlp.layer, *self.mlp.route(self.post_attention_layernorm(h)))

    def __call__(self, h: F32, states: Sequence[Any], batch: Batch, cos: F32, sin: F32) -> None:
        """Adds to h (T, H) in place. The experts of all sequences are read once."""
        x = self.input_layernorm(h)
        if self.self_attn is not None:
            h += self.self_attn(x, states, batch, cos, sin)
        else:
            assert self.linear_attn is not None
            h += self.linear_attn(x, states, batch)
        following = self.following
        ahead = None if following is None else lambda: following.expect(h)
        h += self.mlp(self.post_attention_layernorm(h), batch.prompt, ahead)


class Model:
    """Tokens → logits. Holds the dense weights; experts come through `experts`."""

    def __init__(self, config: Config, w: Weights, experts: Any, top_k: int = 0) -> None:
        """top_k: experts a token, 0 for as many as the model was trained with; fewer is lossy. experts: RoutedExperts, or None where only
        the names of weights are wanted."""
        c = config
        self.config, self.experts = config, experts
        self.top_k = top_k or c.num_experts_per_tok
        self.embed_tokens = w.embedding("model.embed_tokens", c.vocab_size, c.hidden_size)
        self.layers = [DecoderLayer(w, c, i, self.top_k, experts) for i in range(c.num_hidden_layers)]
        for layer, following in pairwise(self.layers):
            layer.following = following
        self.norm = w.norm("model.norm", c.hidden_size, c.rms_norm_eps)
        self.lm_head = (
            self.embed_tokens.as_linear if c.tie_word_embeddings else w.linear("lm_head", c.vocab_size, c.hidden_size)
        )
        self.rotary = Rotary(config.rotary_dims, config.rope_theta)
        self._one_at_a_time = RLock()  # another text's tokens may go through between two layers of a prompt

    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """One sequence: tokens (T,) → logits (1, vocab) of the last one, or (T, vocab). As forward()."""
        return self.forward(Batch(tokens, [cache], prompt), all_logits)

    def forward(self, batch: Batch, all_logits: bool = False) -> F32:
        """Logits (S, vocab) of the last row of each sequence, or (T, vocab) of all rows; the sequences move on by their rows. Other
        threads wait. Raises ReadError, CancelledError."""
        with self._one_at_a_time:
            self.experts.adapt()
            with batch:
                return self._forward(batch, all_logits)

    def _forward(self, batch: Batch, all_logits: bool) -> F32:
        h = self.embed_tokens(batch.tokens)
        cos, sin = self.rotary(batch.positions())
        for i, layer in enumerate(self.layers):
            batch.between_layers()
            layer(h, batch.states(i), batch, cos, sin)
        for segment in batch.segments:
            if segment.cache.each_logits is not None:
                for at in range(segment.begin, segment.end, 16):  # few rows at a time: a vocabulary is long
                    segment.cache.each_logits(self.lm_head(self.norm(h[at : min(at + 16, segment.end)])))
        return self.lm_head(self.norm(h if all_logits else batch.last_rows(h)))
