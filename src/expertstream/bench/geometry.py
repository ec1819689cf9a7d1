"""The sizes of known models, in the form of config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_json
from ..models import read_config

__all__ = ["GEOMETRIES", "TRACE", "geometry_config"]

TRACE = "routing-trace.npz"  # in a synthetic model's folder: the experts that its router selects in benchmarks

_COMMON: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 248320, "head_dim": 256, "num_key_value_heads": 2, "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "attn_output_gate": True, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}, "full_attention_interval": 4,
    "eos_token_id": None,
}  # fmt: skip


def _sizes(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, top_k: int, inner: int, **others: Any
) -> dict[str, Any]:
    return {
        **_COMMON, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "linear_num_value_heads": value_heads, "num_experts": experts, "num_experts_per_tok": top_k, "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner, **others,
    }  # fmt: skip


_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "tie_word_embeddings": False, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "eos_token_id": None,
}  # fmt: skip
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
    "attention_bias": True, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 150000, "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "eos_token_id": None,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}  # fmt: skip

# From the config.json of the releases.
GEOMETRIES: dict[str, dict[str, Any]] = {
    # The width of its experts is what 2.4 T parameters leave for it.
    "qwen3.8-2.4t-a95b": _sizes(8192, 92, 64, 128, 512, 10, 2048, num_key_value_heads=4),
    "qwen3.5-397b-a17b": _sizes(4096, 60, 32, 64, 512, 10, 1024),
    "qwen3.5-122b-a10b": _sizes(3072, 48, 32, 64, 256, 8, 1024),
    "qwen3.5-35b-a3b": _sizes(2048, 40, 16, 32, 256, 8, 512),
    "qwen3-next-80b": _sizes(
        2048, 48, 16, 32, 512, 10, 512, model_type="qwen3_next", vocab_size=151936, norm_topk_prob=True, mlp_only_layers=[]
    ),
    "qwen3-235b-a22b": {
        **_QWEN3, "hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536,
    },
    "qwen3-30b-a3b": {
        **_QWEN3, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768,
    },
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    # For tests and quick experiments: written in seconds, and larger than a small control group.
    "small": _sizes(
        1024, 12, 8, 8, 128, 4, 512, head_dim=128, linear_num_key_heads=4, linear_key_head_dim=64, linear_value_head_dim=64, vocab_size=8192
    ),
}  # fmt: skip

# Other names of the same sizes.
_SAME = {"qwen3.6-35b-a3b": "qwen3.5-35b-a3b"}


def geometry_config(name: str, layers: int = 0) -> dict[str, Any]:
    """The config of a named geometry (a unique part of a name is enough), or of a config.json or a folder with one; only the first
    `layers` layers if not 0. Raises UsageError, CheckpointError."""
    path = Path(name)
    if path.name == "config.json" or (path / "config.json").is_file():
        whole = read_json(path if path.name == "config.json" else path / "config.json")
        config = dict(whole.get("text_config") or whole)
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
    else:
        name = _SAME.get(name.lower(), name)
        # A whole word of a name takes precedence over a part of one: 35b is not 235b.
        found = [known for known in GEOMETRIES if name.lower() in known.split("-")]
        found = found or [known for known in GEOMETRIES if name.lower() in known]
        if name not in GEOMETRIES and len(found) != 1:
            raise UsageError(
                f"unknown geometry {name!r}; give one of {', '.join([*GEOMETRIES, *_SAME])}, or a config.json"
            )
        config = dict(GEOMETRIES[name if name in GEOMETRIES else found[0]])
    if layers:
        c = read_config(config, name)
        if not 0 < layers <= c.num_hidden_layers:
            raise UsageError(f"--layers must be from 1 to {c.num_hidden_layers}, the layers of {name}; got {layers}")
        config |= {"num_hidden_layers": layers, "layer_types": list(c.layer_types[:layers])}
    read_config(config, name)
    return config
