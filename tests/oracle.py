"""Random checkpoints and the oracle: Hugging Face's Qwen3_5MoeForCausalLM with the same weights, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from expertstream.checkpoint.reader import open_checkpoint
from expertstream.engine import LLM, embedded_model
from expertstream.models import qwen3_5_moe
from expertstream.ops.reference import dequantize, untile

LINEAR, FULL = "linear_attention", "full_attention"

BASE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, LINEAR, LINEAR, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 0,
}

# Sizes on both sides of the vector width, each kind of layer alone, and the extremes of top-k.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixed": {},
    "odd sizes": {
        "hidden_size": 72, "head_dim": 24, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "vocab_size": 301,
        "linear_key_head_dim": 24, "linear_value_head_dim": 40, "linear_num_key_heads": 3, "linear_num_value_heads": 6,
        "num_attention_heads": 6, "num_key_value_heads": 3, "num_experts": 7, "num_experts_per_tok": 3, "linear_conv_kernel_dim": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "one linear layer": {"num_hidden_layers": 1, "layer_types": [LINEAR]},
    "one full layer": {"num_hidden_layers": 1, "layer_types": [FULL], "tie_word_embeddings": True},
    "top-k 1": {"num_experts_per_tok": 1, "num_attention_heads": 5, "num_key_value_heads": 1},
    "top-k all": {"num_experts_per_tok": 8, "num_hidden_layers": 2, "layer_types": [FULL, LINEAR]},
}  # fmt: skip


def config_of(**changes: Any) -> dict[str, Any]:
    return {**BASE, **changes}


def make_oracle(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen3_5MoeForCausalLM:
    """Random weights in which every tensor matters, rounded to dtype; computes in float32."""
    torch.manual_seed(seed)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.log(torch.rand_like(p) * 3 + 0.1))
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.2)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(torch.randn_like(p))
            elif "conv1d" in name:
                p.copy_(torch.randn_like(p) * 0.5)
            else:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
            p.copy_(p.to(dtype).float())
    model.tie_weights()
    return model


def save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with this project's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder


def state_of(model: Qwen3_5MoeForCausalLM, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that `transformers` would save, under model.layers.N.…"""
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def save_hf(folder: Path, config: dict[str, Any], model: Qwen3_5MoeForCausalLM, dtype: torch.dtype) -> Path:
    return save(folder, config, state_of(model, dtype))


def oracle_logits(model: Qwen3_5MoeForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """(T,) → (T, vocab) float32."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


def oracle_greedy(model: Qwen3_5MoeForCausalLM, tokens: np.ndarray, count: int) -> list[int]:
    text = tokens.tolist()
    for _ in range(count):
        text.append(int(oracle_logits(model, np.array(text))[-1].argmax()))
    return text[len(tokens) :]


def our_logits(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    return llm.model(tokens, llm.session().cache, all_logits=True)


def our_greedy(llm: LLM, tokens: np.ndarray, count: int) -> list[int]:
    cache, out = llm.session().cache, []
    logits = llm.model(tokens, cache)[0]
    for _ in range(count):
        out.append(int(logits.argmax()))
        logits = llm.model(np.array([out[-1]], np.int64), cache)[0]
    return out


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def random_tokens(config: dict[str, Any], count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, config["vocab_size"], count)


def dequantized_oracle(folder: Path, config: dict[str, Any]) -> Qwen3_5MoeForCausalLM:
    """The oracle with the values that a quantized checkpoint of ours stands for."""
    checkpoint = open_checkpoint(folder)
    c = qwen3_5_moe.Config.from_json(checkpoint.config, "test")
    state: dict[str, torch.Tensor] = {}
    for name, spec in qwen3_5_moe.weight_map(c).items():
        if spec.kind == "matrix":
            w = checkpoint.weight(name, spec)
            state[f"{name}.weight"] = torch.from_numpy(dequantize(w.format, w.data, w.scales, w.biases))
            continue
        values = torch.from_numpy(checkpoint.vector(name, spec))
        if spec.kind == "norm":
            values = values - 1  # the oracle adds it again
        if spec.kind == "conv":
            values = values.T[:, None, :]
        state[name] = values
    for layout in qwen3_5_moe.expert_layouts(c, checkpoint):
        experts = [dequantize_expert(layout, e) for e in range(layout.num_experts)]
        prefix = f"model.layers.{layout.layer}.mlp.experts"
        state[f"{prefix}.gate_up_proj"] = torch.from_numpy(np.stack([np.concatenate(m[:2]) for m in experts]))
        state[f"{prefix}.down_proj"] = torch.from_numpy(np.stack([m[2] for m in experts]))
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**config)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def dequantize_expert(layout: Any, expert: int) -> list[np.ndarray]:
    """gate, up, down of one expert as float32, by reading its ranges."""
    ranges = []
    for r, length in enumerate(layout.lengths):
        with layout.files[layout.file_index[expert, r]].open("rb") as file:
            file.seek(int(layout.offsets[expert, r]))
            ranges.append(np.frombuffer(file.read(length), np.uint8))
    matrices = []
    for i, m in enumerate(layout.format.matrices):
        pieces = zip(layout.pieces[3 * i : 3 * i + 3], m.part_bytes, strict=True)
        parts = [ranges[r][at : at + n] for (r, at), n in pieces]
        matrices.append(dequantize(m, *(untile(m, *parts) if m.quantized and layout.tiled else parts)))
    return matrices


def save_mlx(folder: Path, pack: Path, config: dict[str, Any], default: tuple[int, int], shards: int = 1) -> Path:
    """The same values as a pack of ours, laid out as mlx-lm writes them: stacked experts, norms with their +1, overrides of the bits."""
    checkpoint = open_checkpoint(pack)
    c = qwen3_5_moe.Config.from_json(checkpoint.config, "test")
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Any] = {"bits": default[0], "group_size": default[1]}

    def put(
        module: str, m: Any, data: np.ndarray, scales: np.ndarray, biases: np.ndarray, lead: tuple[int, ...] = ()
    ) -> None:
        name = f"language_model.{module}"
        kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
        if not m.quantized:
            tensors[f"{name}.weight"] = (
                torch.from_numpy(data.copy()).view(kinds[m.dtype]).reshape(*lead, m.rows, m.cols)
            )
            return
        tensors[f"{name}.weight"] = (
            torch.from_numpy(data.copy()).view(torch.uint32).reshape(*lead, m.rows, m.cols * m.bits // 32)
        )
        for suffix, values in (("scales", scales), ("biases", biases)):
            tensors[f"{name}.{suffix}"] = (
                torch.from_numpy(values.copy()).view(kinds[m.dtype]).reshape(*lead, m.rows, m.cols // m.group_size)
            )
        if (m.bits, m.group_size) != default:
            table[name] = {"bits": m.bits, "group_size": m.group_size}

    for name, spec in qwen3_5_moe.weight_map(c).items():
        if spec.kind == "matrix":
            w = checkpoint.weight(name, spec)
            put(name, w.format, w.data, w.scales, w.biases)
            continue
        values = torch.from_numpy(checkpoint.vector(name, spec))
        tensors[f"language_model.{name}"] = values.T[:, :, None].contiguous() if spec.kind == "conv" else values
    for layout in qwen3_5_moe.expert_layouts(c, checkpoint):
        raw = [
            np.fromfile(layout.files[0], np.uint8, layout.lengths[0], offset=int(layout.offsets[e, 0]))
            for e in range(layout.num_experts)
        ]
        for i, (part, m) in enumerate(zip(("gate", "up", "down"), layout.format.matrices, strict=True)):
            pieces = [(at, at + n) for (_, at), n in zip(layout.pieces[3 * i : 3 * i + 3], m.part_bytes, strict=True)]
            experts = [[record[a:b] for a, b in pieces] for record in raw]
            if m.quantized:
                experts = [list(untile(m, *parts)) for parts in experts]
            stacked = [np.concatenate(part) for part in zip(*experts, strict=True)]
            put(f"model.layers.{layout.layer}.mlp.switch_mlp.{part}_proj", m, *stacked, lead=(layout.num_experts,))
    tensors["vision_tower.patch_embed.weight"] = torch.zeros(4, 4)
    full_config = {
        "model_type": "qwen3_5_moe",
        "text_config": config,
        "quantization": table,
        "quantization_config": table,
    }
    full_config["tie_word_embeddings"] = config["tie_word_embeddings"]
    if shards == 1:
        return save(folder, full_config, tensors)
    save(folder, full_config, {})
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[s::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[s::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
