"""A decoder: layers of a mixer and a mixture of experts between an embedding and a projection to the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from threading import RLock

from ..batch import Batch
from ..kv_cache import KVCache, State
from ..ops import F32, I64
from .attention import Angles, Mixer
from .basic import RMSNorm
from .moe import Experts, SparseMoeBlock
from .rotary import Rotary
from .weights import Weights

__all__ = ["Decoder", "DecoderLayer"]


class DecoderLayer:
    """A token mixer and a mixture of experts, each applied to a normed copy of the residual stream and added to it."""

    def __init__(self, input_norm: RMSNorm, mixer: Mixer, mlp_norm: RMSNorm, mlp: SparseMoeBlock) -> None:
        self.input_norm, self.mixer, self.mlp_norm, self.mlp = input_norm, mixer, mlp_norm, mlp
        self.following: DecoderLayer | None = None

    def expect(self, h: F32) -> None:
        """Applies this layer's router to hidden states of the layer before, so that its experts can be prefetched."""
        self.mlp.experts.expect(self.mlp.layer, *self.mlp.route(self.mlp_norm(h)))

    def __call__(self, h: F32, states: Sequence[State], batch: Batch, angles: Angles) -> None:
        """Adds to h (T, H) in place. The experts of all sequences are read once."""
        h += self.mixer(self.input_norm(h), states, batch, angles)
        following = self.following
        ahead = None if following is None else lambda: following.expect(h)
        h += self.mlp(self.mlp_norm(h), batch.prompt, ahead)


class Decoder:
    """Tokens → logits. Holds the dense weights; the routed experts are in `experts`. h (T, H) is the residual stream."""

    def __init__(
        self,
        w: Weights,
        experts: Experts,
        layers: list[DecoderLayer],
        rotary: Rotary,
        *,
        vocab_size: int,
        hidden_size: int,
        eps: float,
        plus_one: bool = False,
        tied: bool = False,
    ) -> None:
        """eps, plus_one: of the final norm. tied: the embedding is also the output projection."""
        self.ops, self.experts, self.layers, self.rotary = w.ops, experts, layers, rotary
        for layer, following in pairwise(layers):
            layer.following = following
        self.embed_tokens = w.embedding("model.embed_tokens", vocab_size, hidden_size)
        self.norm = w.norm("model.norm", hidden_size, eps, plus_one)
        self.lm_head = self.embed_tokens.as_linear if tied else w.linear("lm_head", vocab_size, hidden_size)
        self._one_at_a_time = RLock()  # another sequence's tokens may be processed between two layers of a prompt

    def __call__(self, tokens: I64, cache: KVCache, all_logits: bool = False, prompt: bool = False) -> F32:
        """forward() for one sequence: tokens (T,) → logits (1, vocab) of the last one, or (T, vocab)."""
        return self.forward(Batch(tokens, [cache], prompt), all_logits)

    def forward(self, batch: Batch, all_logits: bool = False) -> F32:
        """Logits (S, vocab) of the last row of each sequence, or (T, vocab) of all rows; advances each sequence by its rows. Other threads
        wait. Raises ReadError, CancelledError."""
        with self._one_at_a_time:
            self.experts.adapt()
            with batch:
                logits = None if all_logits else self._recorded(batch)
                return self._forward(batch, all_logits) if logits is None else logits

    def _recorded(self, batch: Batch) -> F32 | None:
        """The pass of single tokens as a backend has recorded it, if it does and every expert can be found by a table."""
        single = not batch.prompt and batch.tokens.shape[0] == len(batch.segments)
        asks = any(s.cache.each_logits or s.position + 1 in s.cache.keep for s in batch.segments)
        if not single or asks or not self.experts.recordable:
            return None
        batch.between_layers()
        found = self.ops.recorded(batch, lambda recorded: self._forward(recorded, False), self.experts)
        if found is None:
            return None
        logits, selected, computed = found
        self.experts.selected(selected, computed)
        return logits

    def _forward(self, batch: Batch, all_logits: bool) -> F32:
        h = self.embed_tokens(batch.tokens)
        angles = self.rotary(batch.positions())
        for i, layer in enumerate(self.layers):
            batch.between_layers()
            layer(h, batch.states(i), batch, angles)
        for segment in batch.segments:
            if segment.cache.each_logits is not None:
                for at in range(segment.begin, segment.end, 16):  # few rows at a time: the vocabulary is large
                    logits = self.lm_head(self.norm(h[at : min(at + 16, segment.end)]))
                    segment.cache.each_logits(self.ops.host(logits))
        return self.ops.host(self.lm_head(self.norm(h if all_logits else self.ops.rows(h, batch.last_rows()))))
