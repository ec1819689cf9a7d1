"""What models are built from, without knowledge of any of them."""

from __future__ import annotations

from .basic import Embedding, Linear, RMSNorm, Rotary, joined
from .weights import LoadedWeights, Weights, weight_names

__all__ = ["Embedding", "Linear", "LoadedWeights", "RMSNorm", "Rotary", "Weights", "joined", "weight_names"]
