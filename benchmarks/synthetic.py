"""Random packs of a given geometry, written at disk speed: to measure with, and to test models larger than memory.

Run: python -m benchmarks.synthetic FOLDER [--geometry small|35b-a3b] [--layers N] [--experts N]
Codes are uniform and zero-mean, so that activations stay of one size through any depth and routing is near uniform: random weights
without that care freeze the router on a few experts and show hit rates that no real model has.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from expertstream.checkpoint.format import (
    MANIFEST,
    PACK_FORMAT,
    PACK_VERSION,
    record_pieces,
)
from expertstream.checkpoint.pack import TRUNK, experts_file, write_records
from expertstream.checkpoint.safetensors import header_bytes
from expertstream.engine import embedded_model
from expertstream.models.qwen3_5_moe import Config, weight_map
from expertstream.ops import ExpertFormat, MatrixFormat, to_bf16
from expertstream.ops.cpu import CpuOps

COMMON: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "vocab_size": 8192, "num_key_value_heads": 2, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    "full_attention_interval": 4, "eos_token_id": None,
}  # fmt: skip
GEOMETRIES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 128, "linear_num_key_heads": 4,
        "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "num_experts": 128, "num_experts_per_tok": 4,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
    # Qwen3.5-35B-A3B but for the vocabulary, which is the embedded tokenizer's.
    "35b-a3b": {
        "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 256,
        "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    },
}  # fmt: skip
_NAMES = {"bf16": "BF16", "f32": "F32"}


def write_pack(folder: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Writes a pack with 4-bit experts and an 8-bit trunk; returns its bytes."""
    folder.mkdir(parents=True)
    c, rng = Config.from_json(config, str(folder)), np.random.default_rng(seed)
    trunk_checksums = _write_trunk(folder / TRUNK, c, rng)
    shapes = ((c.moe_intermediate_size, c.hidden_size),) * 2 + ((c.hidden_size, c.moe_intermediate_size),)
    format = ExpertFormat(*(MatrixFormat(rows, cols, 4, 64, "bf16") for rows, cols in shapes))
    layers = []
    for layer in range(c.num_hidden_layers):
        with (folder / experts_file(layer)).open("wb") as file:
            layers.append(write_records(file, layer, c.num_experts, format, _records(c.num_experts, format, rng)))
    table = {n: {"bits": 8, "group_size": 64} for n, s in weight_map(c).items() if s.kind == "matrix" and _bits(n) == 8}
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"bits": 4, "group_size": 64, **table}}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, folder / name)
    manifest = {
        "format": PACK_FORMAT, "version": PACK_VERSION, "convention": "hf", "source": {"name": "synthetic", "seed": seed},
        "trunk_checksums": trunk_checksums, "layers": layers,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return sum(file.stat().st_size for file in folder.iterdir())


def _bits(module: str) -> int:
    return 16 if module.endswith((".mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b")) else 8


def _write_trunk(path: Path, c: Config, rng: np.random.Generator) -> dict[str, str]:
    ops, tensors, data = CpuOps(2), {}, []

    def put(name: str, dtype: str, shape: tuple[int, ...], values: np.ndarray) -> None:
        raw = np.ascontiguousarray(values).view(np.uint8).ravel()
        tensors[name] = (dtype, shape, raw.nbytes)
        data.append(raw)

    for name, spec in weight_map(c).items():
        if spec.kind != "matrix":
            values = np.zeros(spec.shape, np.float32)  # norms: 1 once their +1 is added
            if name.endswith("A_log"):
                values = np.log(rng.uniform(1, 16, spec.shape)).astype(np.float32)
            elif name.endswith("dt_bias"):
                values -= 4
            elif name.endswith("linear_attn.norm.weight"):
                values += 1
            elif spec.kind == "conv":
                values = rng.standard_normal(spec.shape).astype(np.float32) * 0.5
            put(name, "F32", spec.shape, values)
            continue
        rows, cols = spec.shape
        w = rng.standard_normal(spec.shape, np.float32) * np.float32(cols**-0.5)
        if name.endswith(("o_proj", "out_proj", "down_proj")):
            w *= np.float32(0.3)
        elif "embed" in name:
            w *= np.float32(cols**0.5)
        if _bits(name) == 16:
            put(f"{name}.weight", "BF16", spec.shape, to_bf16(w))
            continue
        packed, scales, biases = ops.quantize(w, 8, 64)
        put(f"{name}.weight", "U32", (rows, cols // 4), packed)
        put(f"{name}.scales", "BF16", scales.shape, scales)
        put(f"{name}.biases", "BF16", biases.shape, biases)
    with path.open("wb") as file:
        file.write(header_bytes(tensors, {"format": "pt"}, aligned=True))
        for raw in data:
            file.write(raw.data)
    return {name: xxhash.xxh3_64_hexdigest(raw.data) for name, raw in zip(tensors, data, strict=True)}


def _records(count: int, format: ExpertFormat, rng: np.random.Generator) -> Iterator[np.ndarray]:
    offsets, record_bytes = record_pieces(format)
    for _ in range(count):
        # Codes are random bytes; scales make a column's values of size cols^-½ (uniform codes 0…15 have deviation 4.61).
        record = np.frombuffer(rng.bytes(record_bytes), np.uint8).copy()
        for i, m in enumerate(format.matrices):
            step = np.float32(m.cols**-0.5 / 4.61) * np.float32(0.3 if i == 2 else 1.0)
            for at, value in ((offsets[3 * i + 1], step), (offsets[3 * i + 2], -7.5 * step)):
                record[at : at + m.scale_bytes].view(np.uint16)[:] = to_bf16(np.array([value], np.float32))
        yield record


def config_for(geometry: str, layers: int = 0, experts: int = 0) -> dict[str, Any]:
    config = {**COMMON, **GEOMETRIES[geometry]}
    if layers:
        config["num_hidden_layers"] = layers
    if experts:
        config["num_experts"] = experts
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="small")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--experts", type=int, default=0)
    args = parser.parse_args()
    print(f"{write_pack(args.folder, config_for(args.geometry, args.layers, args.experts)):,} bytes")


if __name__ == "__main__":
    main()
