"""The building blocks of models, independent of any particular one."""

from __future__ import annotations

from .attention import Attention, AttentionShape, DeltaShape, GatedDeltaNet, Mixer
from .basic import Embedding, Linear, RMSNorm
from .config import DecoderConfig
from .decoder import Decoder, DecoderLayer
from .moe import Experts, SparseMoeBlock
from .rotary import Rotary, RotaryShape
from .sizes import activation_bytes
from .weights import LoadedWeights, Weights, weight_names

__all__ = [
    "Attention",
    "AttentionShape",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "DeltaShape",
    "Embedding",
    "Experts",
    "GatedDeltaNet",
    "Linear",
    "LoadedWeights",
    "Mixer",
    "RMSNorm",
    "Rotary",
    "RotaryShape",
    "SparseMoeBlock",
    "Weights",
    "activation_bytes",
    "weight_names",
]
