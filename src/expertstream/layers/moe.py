"""Sparse mixtures of experts: a router, the experts that it selects, and optionally a shared one for every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..checkpoint.format import ExpertSpec
from ..ops import F32, I64, Elsewhere
from .weights import Weights

__all__ = ["Experts", "SparseMoeBlock"]


class Experts(Elsewhere, Protocol):
    """A model's interface to its experts: experts.routed.RoutedExperts."""

    @property
    def recordable(self) -> bool: ...
    def selected(self, experts: I64, computed: I64) -> None: ...
    def adapt(self) -> None: ...
    def expect(self, layer: int, weights: F32, selected: I64) -> None: ...
    def apply(
        self,
        layer: int,
        x: F32,
        weights: F32,
        selected: I64,
        prompt: bool,
        shared: Callable[[], F32] | None,
        ahead: Callable[[], None] | None = None,
    ) -> F32: ...


class SparseMoeBlock:
    """Σ wᵢ·expertᵢ(x) over the top-k of a softmax router, plus a gated shared expert if shared_inner is not 0."""

    def __init__(
        self,
        w: Weights,
        experts: Experts,
        layer: int,
        spec: ExpertSpec,
        top_k: int,
        *,
        router: str = "gate",
        router_bias: bool = False,
        renormalize: bool = True,
        shared_inner: int = 0,
    ) -> None:
        """router: its name in spec.module."""
        name, hidden = spec.module, spec.hidden
        self.layer, self.top_k, self.renormalize, self.experts, self.ops = layer, top_k, renormalize, experts, w.ops
        # Small, and it decides which experts run.
        self.gate = w.matrix(f"{name}.{router}", spec.count, hidden, router_bias, sensitive=True)
        self.shared_expert = [
            w.matrix(f"{name}.shared_expert.gate_proj", shared_inner, hidden),
            w.matrix(f"{name}.shared_expert.up_proj", shared_inner, hidden),
            w.matrix(f"{name}.shared_expert.down_proj", hidden, shared_inner),
            w.matrix(f"{name}.shared_expert_gate", 1, hidden, sensitive=True),
        ] if shared_inner else []  # fmt: skip

    def route(self, x: F32) -> tuple[F32, I64]:
        """Weights and experts (T, top_k) of x (T, H)."""
        return self.ops.route(x, self.gate, self.top_k, self.renormalize)

    def __call__(self, x: F32, prompt: bool, ahead: Callable[[], None] | None) -> F32:
        """x (T, H) → (T, H). ahead: runs the next layer's router meanwhile."""
        weights, selected = self.route(x)
        shared = (lambda: self.ops.shared_expert(x, *self.shared_expert)) if self.shared_expert else None
        return self.experts.apply(self.layer, x, weights, selected, prompt, shared, ahead)
