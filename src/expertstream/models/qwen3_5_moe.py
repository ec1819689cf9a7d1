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

import numpy as np

from ..checkpoint.format import ExpertLayout, WeightSpec
from ..checkpoint.reader import Checkpoint
from ..errors import CheckpointError, RequestError
from ..experts.cache import ExpertCache
from ..kv_cache import AttentionState, DeltaState, KVCache, attention_state, delta_state
from ..layers import Embedding, Linear, RMSNorm, Rotary
from ..ops import F32, I64, AttentionWeights, DeltaWeights, Ops

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
        text = config.get("text_config", config)
        if not isinstance(text, dict):
            raise CheckpointError(f"{where}: config.json: text_config must be an object, not {text!r}")

        def get(name: str, kind: type[int] | type[float] = int) -> Any:
            value = text.get(name)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise CheckpointError(f"{where}: config.json: {name} must be {kind.__name__}, not {value!r}")
            if not 0 < value < 1 << 40:  # and so not NaN
                raise CheckpointError(f"{where}: config.json: {name} must be more than 0 and not absurd, not {value!r}")
            return value

        rope = text.get("rope_parameters") or text
        rope_type = rope.get("rope_type", "default") if isinstance(rope, dict) else rope
        if rope_type != "default" or text.get("rope_scaling"):
            raise CheckpointError(
                f"{where}: config.json: rope_parameters of type {rope_type!r} or rope_scaling are not supported"
            )
        theta: Any = rope.get("rope_theta")
        factor: Any = rope.get(
            "partial_rotary_factor", text.get("partial_rotary_factor", 0.25)
        )  # the architecture's default
        for name, value, least, most in (("rope_theta", theta, 1, 1e12), ("partial_rotary_factor", factor, 0, 1)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= most:
                raise CheckpointError(
                    f"{where}: config.json: {name} must be more than {least} and at most {most:g}, not {value!r}"
                )
        if (
            text.get("hidden_act", "silu") != "silu"
            or text.get("attention_bias", False)
            or not text.get("attn_output_gate", True)
        ):
            raise CheckpointError(
                f"{where}: config.json: hidden_act must be silu, attention_bias false and attn_output_gate true"
            )
        layers = get("num_hidden_layers")
        kinds = text.get("layer_types")
        if kinds is None:
            interval = get("full_attention_interval")
            kinds = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers)]
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (LINEAR, FULL) for kind in kinds):
            raise CheckpointError(
                f"{where}: config.json: layer_types must name {LINEAR} or {FULL} for each of {layers} layers"
            )
        names = (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
            "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_experts",
            "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "max_position_embeddings",
        )  # fmt: skip
        values = {name: get(name) for name in names}
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        if type(tied) is not bool:
            raise CheckpointError(f"{where}: config.json: tie_word_embeddings must be true or false, not {tied!r}")
        result = cls(
            **values,
            num_hidden_layers=layers,
            layer_types=tuple(kinds),
            rms_norm_eps=float(get("rms_norm_eps", float)),
            rope_theta=float(theta),
            rotary_dims=int(values["head_dim"] * factor),
            tie_word_embeddings=tied,
        )
        if (
            result.num_experts_per_tok > result.num_experts
            or result.num_attention_heads % result.num_key_value_heads
            or result.linear_num_value_heads % result.linear_num_key_heads
            or not 2 <= result.linear_conv_kernel_dim <= 8
            or result.rotary_dims % 2
            or result.rotary_dims == 0
            or result.rms_norm_eps >= 1
        ):
            raise CheckpointError(f"{where}: config.json: sizes that do not go together: {result}")
        return result

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_dim + self.value_dim

    def make_cache(self, capacity: int, kv_dtype: str) -> KVCache:
        layers: list[AttentionState | DeltaState] = [
            attention_state(self.num_key_value_heads, capacity, self.head_dim, kv_dtype)
            if kind == FULL
            else delta_state(
                self.linear_conv_kernel_dim,
                self.conv_channels,
                self.linear_num_value_heads,
                self.linear_key_head_dim,
                self.linear_value_head_dim,
            )
            for kind in self.layer_types
        ]
        return KVCache(layers, capacity)

    def state_bytes(self, capacity: int, kv_dtype: str) -> int:
        """What make_cache() will take."""
        full = self.layer_types.count(FULL)
        row = {"bf16": 2 * self.head_dim, "f32": 4 * self.head_dim, "int8": self.head_dim + 4}[kv_dtype]
        kv = 2 * self.num_key_value_heads * row * capacity
        delta = (self.linear_conv_kernel_dim - 1) * self.conv_channels + self.value_dim * self.linear_key_head_dim
        return full * kv + (len(self.layer_types) - full) * delta * 4

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
    """Every trunk tensor by canonical name; a matrix by its module, whose tensor is `.weight` (and `.scales`, `.biases`)."""
    c, h = config, config.hidden_size
    specs: dict[str, WeightSpec] = {"model.embed_tokens": WeightSpec("matrix", (c.vocab_size, h))}

    def matrix(name: str, rows: int, cols: int) -> None:
        specs[name] = WeightSpec("matrix", (rows, cols))

    for i, kind in enumerate(c.layer_types):
        layer = f"model.layers.{i}"
        specs[f"{layer}.input_layernorm.weight"] = WeightSpec("norm", (h,))
        if kind == LINEAR:
            mixer = f"{layer}.linear_attn"
            matrix(f"{mixer}.in_proj_qkv", c.conv_channels, h)
            matrix(f"{mixer}.in_proj_z", c.value_dim, h)
            matrix(f"{mixer}.in_proj_b", c.linear_num_value_heads, h)
            matrix(f"{mixer}.in_proj_a", c.linear_num_value_heads, h)
            specs[f"{mixer}.conv1d.weight"] = WeightSpec("conv", (c.conv_channels, 1, c.linear_conv_kernel_dim))
            specs[f"{mixer}.A_log"] = WeightSpec("vector", (c.linear_num_value_heads,))
            specs[f"{mixer}.dt_bias"] = WeightSpec("vector", (c.linear_num_value_heads,))
            specs[f"{mixer}.norm.weight"] = WeightSpec("vector", (c.linear_value_head_dim,))  # this one has no +1
            matrix(f"{mixer}.out_proj", h, c.value_dim)
        else:
            mixer, kv = f"{layer}.self_attn", c.num_key_value_heads * c.head_dim
            matrix(f"{mixer}.q_proj", 2 * c.num_attention_heads * c.head_dim, h)  # rows by head: query, gate
            matrix(f"{mixer}.k_proj", kv, h)
            matrix(f"{mixer}.v_proj", kv, h)
            matrix(f"{mixer}.o_proj", h, c.num_attention_heads * c.head_dim)
            specs[f"{mixer}.q_norm.weight"] = WeightSpec("norm", (c.head_dim,))
            specs[f"{mixer}.k_norm.weight"] = WeightSpec("norm", (c.head_dim,))
        specs[f"{layer}.post_attention_layernorm.weight"] = WeightSpec("norm", (h,))
        matrix(f"{layer}.mlp.gate", c.num_experts, h)
        matrix(f"{layer}.mlp.shared_expert.gate_proj", c.shared_expert_intermediate_size, h)
        matrix(f"{layer}.mlp.shared_expert.up_proj", c.shared_expert_intermediate_size, h)
        matrix(f"{layer}.mlp.shared_expert.down_proj", h, c.shared_expert_intermediate_size)
        matrix(f"{layer}.mlp.shared_expert_gate", 1, h)
    specs["model.norm.weight"] = WeightSpec("norm", (h,))
    if not c.tie_word_embeddings:
        matrix("lm_head", c.vocab_size, h)
    return specs


def expert_layouts(config: Config, checkpoint: Checkpoint) -> list[ExpertLayout]:
    """Where each layer's routed experts lie. Raises CheckpointError."""
    c = config
    return [
        checkpoint.experts(i, c.num_experts, c.moe_intermediate_size, c.hidden_size) for i in range(c.num_hidden_layers)
    ]


class Weights:
    """The trunk, loaded by name as weight_map() lists it."""

    def __init__(self, config: Config, checkpoint: Checkpoint, ops: Ops) -> None:
        self.config, self.checkpoint, self.ops = config, checkpoint, ops
        self.specs = weight_map(config)

    def linear(self, module: str) -> Linear:
        return Linear(self.checkpoint.weight(module, self.specs[module]), self.ops)

    def vector(self, name: str) -> F32:
        return self.checkpoint.vector(name, self.specs[name])

    def norm(self, module: str) -> RMSNorm:
        return RMSNorm(self.vector(f"{module}.weight"), self.config.rms_norm_eps, self.ops)


class GatedDeltaNet:
    """Linear attention with a gated delta rule (Yang et al., Gated Delta Networks, 2024)."""

    def __init__(self, w: Weights, name: str) -> None:
        c, self.ops = w.config, w.ops
        # All four read the same input, so they are multiplied together.
        self.in_proj = [w.linear(f"{name}.in_proj_{part}").weight for part in ("qkv", "z", "a", "b")]
        self.out_proj = w.linear(f"{name}.out_proj")
        self.weights = DeltaWeights(
            conv=w.vector(f"{name}.conv1d.weight"),
            a_log=w.vector(f"{name}.A_log"),
            dt_bias=w.vector(f"{name}.dt_bias"),
            norm=w.vector(f"{name}.norm.weight"),
            key_heads=c.linear_num_key_heads,
            value_heads=c.linear_num_value_heads,
            key_dim=c.linear_key_head_dim,
            eps=c.rms_norm_eps,
        )

    def __call__(self, x: F32, state: DeltaState, position: int, keep: Sequence[int], chunked: bool) -> F32:
        """keep: positions among these tokens at which the state is kept."""
        inputs = self.ops.project(x, self.in_proj)
        if not keep:
            return self.out_proj(self._mix(inputs, state, chunked))
        outputs, begin = [], 0
        for at in (*keep, position + x.shape[0]):
            end = at - position
            if end > begin:
                outputs.append(self._mix([part[begin:end] for part in inputs], state, chunked))
            if at in keep and at not in state.kept:
                state.kept[at] = state.copies()
            begin = end
        return self.out_proj(np.concatenate(outputs))

    def of_each(self, x: F32, states: Sequence[DeltaState]) -> F32:
        """A token of each of several texts: x (B, H), a state for each."""
        inputs = self.ops.project(x, self.in_proj)
        mixed = [self._mix([part[i : i + 1] for part in inputs], s, chunked=False) for i, s in enumerate(states)]
        return self.out_proj(np.concatenate(mixed))

    def _mix(self, inputs: Sequence[F32], state: DeltaState, chunked: bool) -> F32:
        qkv, z, a, b = inputs
        return self.ops.delta_net(self.weights, qkv, z, a, b, state.conv_state, state.recurrent_state, chunked)


class Attention:
    """Grouped-query attention with normed, partly rotated queries and keys, and an output gate."""

    def __init__(self, w: Weights, name: str) -> None:
        c, self.ops = w.config, w.ops
        self.in_proj = [w.linear(f"{name}.{part}_proj").weight for part in ("q", "k", "v")]
        self.o_proj = w.linear(f"{name}.o_proj")
        q_norm, k_norm = (w.norm(f"{name}.{part}_norm").weight for part in ("q", "k"))
        self.weights = AttentionWeights(q_norm, k_norm, heads=c.num_attention_heads, eps=c.rms_norm_eps)

    def __call__(self, x: F32, state: AttentionState, position: int, cos: F32, sin: F32) -> F32:
        inputs = self.ops.project(x, self.in_proj)
        return self.o_proj(self._attend(inputs, state, position, cos, sin))

    def of_each(self, x: F32, states: Sequence[AttentionState], positions: Sequence[int], cos: F32, sin: F32) -> F32:
        """A token of each of several texts: x (B, H), cos and sin (B, half), a state and a position for each."""
        inputs = self.ops.project(x, self.in_proj)
        rows = [slice(i, i + 1) for i in range(len(states))]
        attended = [
            self._attend([part[row] for part in inputs], state, position, cos[row], sin[row])
            for row, state, position in zip(rows, states, positions, strict=True)
        ]
        return self.o_proj(np.concatenate(attended))

    def _attend(self, inputs: Sequence[F32], state: AttentionState, position: int, cos: F32, sin: F32) -> F32:
        q_gate, k, v = inputs
        return self.ops.attention(self.weights, q_gate, k, v, cos, sin, state.keys, state.values, position)


class SparseMoeBlock:
    """Σ wᵢ·expertᵢ(x) over the top-k of a softmax router, plus a gated shared expert.

    Outputs are summed in ascending order of expert number, whatever order they became ready in.
    """

    def __init__(self, w: Weights, layer: int, top_k: int, experts: ExpertCache) -> None:
        name = f"model.layers.{layer}.mlp"
        self.layer, self.top_k, self.experts, self.ops = layer, top_k, experts, w.ops
        self.gate = w.linear(f"{name}.gate").weight
        self.look_ahead: Callable[[F32], None] | None = None  # the next layer's guess()
        self._one_token, self._one_each = np.zeros(top_k, np.int64), np.arange(top_k + 1)
        parts = ("shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate")
        self.shared_expert = [w.linear(f"{name}.{part}").weight for part in parts]

    def __call__(self, x: F32, h: F32, prompt: bool) -> None:
        """Adds the block's output for x (T, H) to h (T, H), in place. prompt: the rows are of one, not of several sequences' tokens."""
        ops = self.ops
        routing_weights, selected_experts = ops.route(x, self.gate, self.top_k)  # (T, top_k)
        # Pairs of (token, expert), grouped by expert.
        if x.shape[0] == 1:
            pair_token, pair_start, weights = self._one_token, self._one_each, routing_weights[0]
            ids = selected_experts[0].tolist()
            block = self.experts.resident_block(self.layer, ids)
            if block is not None:  # nothing to wait for, nothing to put together
                acc = ops.shared_expert(x, *self.shared_expert)
                ops.moe(acc, x, block, pair_start, pair_token, weights)
                h += acc
                return
        else:
            order = np.argsort(selected_experts, axis=None, kind="stable")
            pair_token, weights = order // self.top_k, routing_weights.ravel()[order]
            distinct, counts = np.unique(selected_experts, return_counts=True)
            pair_start, ids = np.concatenate([[0], np.cumsum(counts)]), distinct.tolist()
        # The reads of all missing experts are under way before anything is computed.
        with self.experts.fetch(self.layer, ids, prompt) as fetch:
            if self.look_ahead is not None and not prompt and self.experts.prefetcher.most:
                self.look_ahead(h)
            acc = ops.shared_expert(x, *self.shared_expert)
            # In order, each part is summed at once; else outputs wait until all are there.
            y = None if fetch.ordered else np.empty((pair_token.shape[0], x.shape[1]), np.float32)
            for part in fetch:
                starts = pair_start[part.positions]
                lengths = pair_start[np.array(part.positions) + 1] - starts
                part_start = np.concatenate([[0], np.cumsum(lengths)])
                if y is None:  # neighbours: one run of pairs
                    run = slice(starts[0], starts[0] + part_start[-1])
                    ops.moe(acc, x, part.block, part_start, pair_token[run], weights[run])
                else:
                    pairs = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
                    y[pairs] = ops.experts(x, part.block, part_start, pair_token[pairs])
            if y is not None:
                ops.accumulate(acc, y, pair_token, weights)
        h += acc


class DecoderLayer:
    """A token mixer and a sparse MoE block, each on a normed copy of the residual stream and added to it."""

    def __init__(self, w: Weights, layer: int, top_k: int, experts: ExpertCache) -> None:
        name = f"model.layers.{layer}"
        self.input_layernorm = w.norm(f"{name}.input_layernorm")
        self.post_attention_layernorm = w.norm(f"{name}.post_attention_layernorm")
        full = w.config.layer_types[layer] == FULL
        self.self_attn = Attention(w, f"{name}.self_attn") if full else None
        self.linear_attn = None if full else GatedDeltaNet(w, f"{name}.linear_attn")
        self.mlp = SparseMoeBlock(w, layer, top_k, experts)

    def guess(self, h: F32) -> None:
        """Asks this layer's router about tokens' hidden states of the layer before, so that its experts may be read ahead."""
        mlp = self.mlp
        weights, selected_experts = mlp.ops.route(self.post_attention_layernorm(h), mlp.gate, mlp.top_k)
        likeliest_first = np.argsort(-weights, axis=None, kind="stable")
        mlp.experts.hint(mlp.layer, list(dict.fromkeys(selected_experts.ravel()[likeliest_first].tolist())))

    def __call__(
        self,
        h: F32,
        state: AttentionState | DeltaState,
        position: int,
        keep: Sequence[int],
        cos: F32,
        sin: F32,
        prompt: bool,
    ) -> None:
        x = self.input_layernorm(h)
        if self.self_attn is not None:
            assert isinstance(state, AttentionState)
            h += self.self_attn(x, state, position, cos, sin)
        else:
            assert isinstance(state, DeltaState) and self.linear_attn is not None
            h += self.linear_attn(x, state, position, keep, chunked=prompt)
        self.mlp(self.post_attention_layernorm(h), h, prompt)

    def of_each(self, h: F32, states: Sequence[Any], positions: Sequence[int], cos: F32, sin: F32) -> None:
        """A token of each of several texts, h (B, H); their experts are read once for all."""
        x = self.input_layernorm(h)
        if self.self_attn is not None:
            h += self.self_attn.of_each(x, states, positions, cos, sin)
        else:
            assert self.linear_attn is not None
            h += self.linear_attn.of_each(x, states)
        self.mlp(self.post_attention_layernorm(h), h, prompt=False)


class Model:
    """Tokens → logits. Holds the trunk; experts come through `experts`."""

    def __init__(self, config: Config, checkpoint: Checkpoint, ops: Ops, experts: ExpertCache, top_k: int = 0) -> None:
        """top_k: experts a token, 0 for as many as the model was trained with; fewer is lossy."""
        w = Weights(config, checkpoint, ops)
        self.config, self.experts = config, experts
        self.top_k = top_k or config.num_experts_per_tok
        self.embed_tokens = Embedding(checkpoint.weight("model.embed_tokens", w.specs["model.embed_tokens"]), ops)
        self.layers = [DecoderLayer(w, i, self.top_k, experts) for i in range(config.num_hidden_layers)]
        for layer, following in pairwise(self.layers):
            layer.mlp.look_ahead = following.guess
        self.norm = w.norm("model.norm")
        self.lm_head = self.embed_tokens.as_linear if config.tie_word_embeddings else w.linear("lm_head")
        self.rotary = Rotary(config.rotary_dims, config.rope_theta)
        self._one_at_a_time = RLock()  # another text's tokens may go through between two layers of a prompt

    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """tokens (T,) → logits (1, vocab) of the last one, or (T, vocab); the cache moves on by T. Other threads wait.
        `prompt`: the tokens are (a part of) a prompt, and take the chunked gated-delta form. Both forms are one computation but
        for rounding, so which one is taken must not depend on how a prompt is cut: parts are multiples of 64 but for the last.
        Raises RequestError if the cache has no room, or holds half a token after an error.
        """
        with self._one_at_a_time:
            return self._forward(tokens, cache, all_logits, prompt)

    def _check(self, cache: KVCache, tokens: int) -> None:
        end = cache.position + tokens
        if end > cache.capacity:
            raise RequestError(f"{end} tokens do not fit a context of {cache.capacity}; make --context at least {end}")
        if not cache.valid:
            raise RequestError("this session stopped in the middle of a token; reset it")

    def _forward(self, tokens: I64, cache: KVCache, all_logits: bool, prompt: bool) -> F32:
        T, position = tokens.shape[0], cache.position
        self._check(cache, T)
        self.experts.adapt()
        cache.valid = False
        keep = sorted(at for at in cache.keep if position < at <= position + T) if cache.keep else ()
        h = self.embed_tokens(tokens)
        cos, sin = self.rotary(position, T)
        for layer, state in zip(self.layers, cache.layers, strict=True):
            cache.between_layers()
            layer(h, state, position, keep, cos, sin, prompt)
        cache.position += T
        cache.valid = True
        if cache.each_logits is not None:
            for at in range(0, T, 16):  # few rows at a time: a vocabulary is long
                cache.each_logits(self.lm_head(self.norm(h[at : at + 16])))
        last = h if all_logits else h[-1:]
        return self.lm_head(self.norm(np.ascontiguousarray(last)))

    def of_each(self, tokens: I64, caches: Sequence[KVCache]) -> F32:
        """The next token of each of several texts (B,) → logits (B, vocab); every cache moves on by one. Raises as a call does."""
        with self._one_at_a_time:
            for cache in caches:
                self._check(cache, 1)
            self.experts.adapt()
            for cache in caches:
                cache.valid = False
            positions = [cache.position for cache in caches]
            rotary = [self.rotary(position, 1) for position in positions]
            cos, sin = (np.concatenate(parts) for parts in zip(*rotary, strict=True))
            h = self.embed_tokens(tokens)
            for i, layer in enumerate(self.layers):
                layer.of_each(h, [cache.layers[i] for cache in caches], positions, cos, sin)
            for cache in caches:
                cache.position += 1
                cache.valid = True
            return self.lm_head(self.norm(h))
