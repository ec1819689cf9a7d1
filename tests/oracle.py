"""Random checkpoints and the oracle: Hugging Face's models with the same weights, in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from expertstream.checkpoint.reader import open_checkpoint
from expertstream.engine import LLM, embedded_model
from expertstream.formats import Affine
from expertstream.models import config_of as read_config_of
from expertstream.models import expert_layouts, weight_map

Oracle = Any  # a transformers model for causal language modelling

# model_type → the classes of its model and its config.
CLASSES = {
    "qwen3_5_moe_text": (transformers.Qwen3_5MoeForCausalLM, transformers.Qwen3_5MoeTextConfig),
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig),
    "qwen3_next": (transformers.Qwen3NextForCausalLM, transformers.Qwen3NextConfig),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig),
}
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


def build_oracle(config: dict[str, Any]) -> Oracle:
    """The model that a config.json describes, computing in float32."""
    model, settings = CLASSES[config["model_type"]]
    return model(settings(**config, attn_implementation="eager", experts_implementation="eager")).eval()


def make_oracle(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> Oracle:
    """Random weights in which every tensor matters, rounded to dtype; computes in float32."""
    torch.manual_seed(seed)
    model = build_oracle(config)
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
            if config["model_type"] == "gpt_oss" and name.endswith("_proj") and p.ndim == 3:
                blocks, scales = mxfp4_blocks(p)
                p.copy_(mxfp4_values(blocks, scales))
    model.tie_weights()
    return model


def mxfp4_blocks(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts as transformers holds them, (experts, in, out), in the release's form, written by MLX: blocks (experts, out, in/32, 16) and
    scales (experts, out, in/32), uint8."""
    import mlx.core as mx

    rows = experts.detach().transpose(1, 2).contiguous()
    codes, scales = mx.quantize(mx.array(rows.numpy()), group_size=32, bits=4, mode="mxfp4")
    shape = (*rows.shape[:2], rows.shape[2] // 32)
    blocks = np.array(codes).view(np.uint8).reshape(*shape, 16)
    return torch.from_numpy(blocks), torch.from_numpy(np.array(scales).reshape(shape))


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What transformers reads from them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


def save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with this project's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    return folder


def state_of(model: Oracle, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that `transformers` would save, under model.layers.N.…"""
    state = {k: v.to(dtype) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if model.config.model_type == "gpt_oss":
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            state[f"{name}_blocks"], state[f"{name}_scales"] = mxfp4_blocks(state.pop(name).float())
    return state


def save_hf(folder: Path, config: dict[str, Any], model: Oracle, dtype: torch.dtype) -> Path:
    return save(folder, config, state_of(model, dtype))


def oracle_logits(model: Oracle, tokens: np.ndarray) -> np.ndarray:
    """(T,) → (T, vocab) float32."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()


def oracle_greedy(model: Oracle, tokens: np.ndarray, count: int) -> list[int]:
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


def dequantized_oracle(folder: Path, config: dict[str, Any]) -> Oracle:
    """The oracle with the values that a quantized checkpoint of ours stands for."""
    checkpoint = open_checkpoint(folder)
    c = read_config_of(checkpoint)
    state: dict[str, torch.Tensor] = {}
    for name, spec in weight_map(c).items():
        if spec.kind == "matrix":
            w = checkpoint.weight(name, spec)
            state[f"{name}.weight"] = torch.from_numpy(w.format.dequantize(w.parts))
            continue
        values = torch.from_numpy(checkpoint.vector(name, spec))
        if spec.kind == "norm":
            values = values - 1  # the oracle adds it again
        if spec.kind == "conv":
            values = values.T[:, None, :]
        state[name] = values
    for layout in expert_layouts(c, checkpoint):
        experts = [dequantize_expert(layout, e) for e in range(layout.num_experts)]
        prefix = f"model.layers.{layout.layer}.mlp.experts"
        if layout.format.bias_dtype:  # gpt-oss: transposed, gate and up alternate
            gate, up, down = (torch.from_numpy(np.stack(part)) for part in zip(*(m for m, _ in experts), strict=True))
            biases = [torch.from_numpy(np.stack(part)) for part in zip(*(b for _, b in experts), strict=True)]
            state[f"{prefix}.gate_up_proj"] = torch.stack([gate, up], 2).flatten(1, 2).transpose(1, 2).contiguous()
            state[f"{prefix}.gate_up_proj_bias"] = torch.stack(biases[:2], 2).flatten(1, 2)
            state[f"{prefix}.down_proj"] = down.transpose(1, 2).contiguous()
            state[f"{prefix}.down_proj_bias"] = biases[2]
            continue
        state[f"{prefix}.gate_up_proj"] = torch.from_numpy(np.stack([np.concatenate(m[:2]) for m, _ in experts]))
        state[f"{prefix}.down_proj"] = torch.from_numpy(np.stack([m[2] for m, _ in experts]))
    model = build_oracle(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def expert_parts(layout: Any, expert: int) -> list[np.ndarray]:
    """The parts of one expert, row after row, by reading its ranges."""
    memory = np.zeros(sum(layout.lengths), np.uint8)
    starts = np.cumsum((0, *layout.lengths))
    for r, length in enumerate(layout.lengths):
        with layout.files[layout.file_index[expert, r]].open("rb") as file:
            file.seek(int(layout.offsets[expert, r]))
            memory[starts[r] : starts[r] + length] = np.frombuffer(file.read(length), np.uint8)
    pieces = [int(starts[r]) + at for r, at in layout.pieces]
    if not layout.tiled:
        return layout.stored_parts(memory, pieces)
    parts = [memory[at : at + part.nbytes] for at, part in zip(pieces, layout.format.parts, strict=True)]
    flat: list[np.ndarray] = []
    for m in layout.format.matrices:
        flat += m.untile(parts[: len(m.parts)])
        flat += parts[len(m.parts) :][: bool(layout.format.bias_dtype)]
        parts = parts[len(m.parts) + bool(layout.format.bias_dtype) :]
    return flat


def dequantize_expert(layout: Any, expert: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """gate, up, down of one expert as float32, and their biases."""
    parts, matrices, biases = expert_parts(layout, expert), [], []
    for m in layout.format.matrices:
        matrices.append(m.dequantize(parts[: len(m.parts)]))
        parts = parts[len(m.parts) :]
        if layout.format.bias_dtype:
            biases.append(parts.pop(0).view(np.float32))
    return matrices, biases


def save_mlx(folder: Path, pack: Path, config: dict[str, Any], default: tuple[int, int], shards: int = 1) -> Path:
    """The same values as a pack of ours, laid out as mlx-lm writes them: stacked experts, norms with their +1, overrides of the bits."""
    checkpoint = open_checkpoint(pack)
    c = read_config_of(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    table: dict[str, Any] = {"bits": default[0], "group_size": default[1]}
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

    def put(module: str, m: Any, parts: list[np.ndarray], lead: tuple[int, ...] = ()) -> None:
        name, k = f"language_model.{module}", m.kernel
        for part, data in zip(m.parts, parts, strict=True):
            shape = (
                *lead,
                m.rows,
                m.cols // k.group_size if part.name != "weight" else m.cols * k.bits // (32 if m.quantized else k.bits),
            )
            kind = torch.uint32 if m.quantized and part.name == "weight" else kinds[k.dtype]
            tensors[f"{name}.{part.name}"] = torch.from_numpy(data.copy()).view(kind).reshape(shape)
        if isinstance(m, Affine) and (m.bits, m.group_size) != default:
            table[name] = {"bits": m.bits, "group_size": m.group_size}

    for name, spec in weight_map(c).items():
        if spec.kind == "matrix":
            w = checkpoint.weight(name, spec)
            put(name, w.format, list(w.parts))
            continue
        values = torch.from_numpy(checkpoint.vector(name, spec))
        tensors[f"language_model.{name}"] = values.T[:, :, None].contiguous() if spec.kind == "conv" else values
    for layout in expert_layouts(c, checkpoint):
        experts = [expert_parts(layout, e) for e in range(layout.num_experts)]
        for part, m in zip(("gate", "up", "down"), layout.format.matrices, strict=True):
            stacked = [np.concatenate([parts.pop(0) for parts in experts]) for _ in m.parts]
            put(f"model.layers.{layout.layer}.mlp.switch_mlp.{part}_proj", m, stacked, lead=(layout.num_experts,))
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
    names, index = sorted(tensors), {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[s::shards]}, folder / file)
        index |= dict.fromkeys(names[s::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
