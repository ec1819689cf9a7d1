"""Writes the same values as a GGUF file, for llama.cpp: Q4_0 and Q8_0 blocks hold symmetric groups of 32 exactly.

Only the order differs. llama.cpp pairs value head h with key head h mod Hk where Hugging Face pairs it with h div (Hv/Hk), so rows of
the value parts (qkv, z, a, b, A, dt, conv) and columns of out_proj are rearranged; norms are stored with their +1, A as −exp(A_log).
(llama.cpp, conversion/qwen.py.) A GGUF expert tensor holds all experts of a layer, so a layer's experts are buffered until complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..formats import ExpertFormat, MatrixFormat
from ..formats.numbers import from_bf16
from ..layers import DecoderConfig
from ..models import weight_map
from ..models.qwen3_5_moe import LINEAR, Config

__all__ = ["GGUFTwin", "config_for_twin"]

# expertstream's names to llama.cpp's; names inside a layer without their prefix.
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "linear_attn.in_proj_qkv": "attn_qkv.weight",
    "linear_attn.in_proj_z": "attn_gate.weight",
    "linear_attn.in_proj_b": "ssm_beta.weight",
    "linear_attn.in_proj_a": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj": "ssm_out.weight",
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate": "ffn_gate_inp.weight",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp.weight",
    "model.embed_tokens": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head": "output.weight",
}
_EXPERTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight")


def config_for_twin(c: DecoderConfig) -> Config:
    """The config of a model for which a twin can be written. Raises UsageError."""
    if type(c) is not Config or c.rotary.scaling is not None:
        raise UsageError(
            "a GGUF twin requires the sizes of a Qwen3.5-MoE model, without rope scaling; choose another geometry or omit the twin"
        )
    return c


class GGUFTwin:
    """Written like the pack: tensors in the order of weight_map(), then the experts layer by layer."""

    def __init__(
        self, path: Path, c: Config, formats: dict[str, MatrixFormat], experts: ExpertFormat, tokenizer: Path
    ) -> None:
        try:
            import gguf
        except ImportError:
            raise UsageError("a GGUF twin needs the package gguf: pip install 'expertstream[bench]'") from None
        self.c, self.formats, self.experts, self.gguf = c, formats, experts, gguf
        self.writer = gguf.GGUFWriter(path, "qwen35moe", use_temp_file=False)
        self._metadata(tokenizer)
        for name, spec in weight_map(c).items():
            m = formats.get(name)
            shape = spec.shape if m is not None else tuple(n for n in spec.shape if n != 1 or spec.kind != "conv")
            self._declare(_gguf_name(name), shape if shape[0] > 1 or m is None else shape[1:], m)
        for layer in range(c.num_hidden_layers):
            for name, m in zip(_EXPERTS, experts.matrices, strict=True):
                self._declare(f"blk.{layer}.{name}", (c.num_experts, m.rows, m.cols), m)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self._pending: list[NDArray[np.uint8]] = []  # one layer: blocks of gate, up and down of all its experts

    def _declare(self, name: str, shape: tuple[int, ...], m: MatrixFormat | None) -> None:
        if m is None or not m.quantized:
            self.writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
            return
        kind = self.gguf.GGMLQuantizationType.Q4_0 if m.kernel.bits == 4 else self.gguf.GGMLQuantizationType.Q8_0
        row_bytes = m.cols // 32 * (2 + 4 * m.kernel.bits)
        nbytes = int(np.prod(shape[:-1])) * row_bytes
        self.writer.add_tensor_info(name, (*shape[:-1], row_bytes), np.dtype(np.uint8), nbytes, raw_dtype=kind)

    def _metadata(self, tokenizer: Path) -> None:
        c, w = self.c, self.writer
        w.add_name("synthetic")
        w.add_block_count(c.num_hidden_layers)
        w.add_context_length(c.max_position_embeddings)
        w.add_embedding_length(c.hidden_size)
        w.add_feed_forward_length(c.moe_intermediate_size)
        w.add_head_count(c.num_attention_heads)
        w.add_head_count_kv(c.num_key_value_heads)
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
        w.add_rope_freq_base(c.rotary.theta)
        w.add_rope_dimension_count(c.rotary.dims)
        # For text, the positions in all three sections are equal, so only the sum matters.
        w.add_rope_dimension_sections([c.rotary.dims // 2, 0, 0, 0])
        w.add_layer_norm_rms_eps(c.rms_norm_eps)
        w.add_expert_count(c.num_experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(c.moe_intermediate_size)
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
        w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
        w.add_ssm_state_size(c.linear_key_head_dim)
        w.add_ssm_group_count(c.linear_num_key_heads)
        w.add_ssm_time_step_rank(c.linear_num_value_heads)
        w.add_ssm_inner_size(c.delta.values)
        w.add_array("qwen35moe.attention.recurrent_layers", [kind == LINEAR for kind in c.layer_types])
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
        added = {t["content"] for t in model["added_tokens"]}
        ids = {**model["model"]["vocab"], **{t["content"]: t["id"] for t in model["added_tokens"]}}
        tokens = [f"[PAD{i}]" for i in range(c.vocab_size)]
        kinds = [int(self.gguf.TokenType.UNUSED)] * c.vocab_size
        for text, i in ids.items():
            if i < c.vocab_size:
                tokens[i] = text
                kinds[i] = int(self.gguf.TokenType.CONTROL if text in added else self.gguf.TokenType.NORMAL)
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("qwen35")
        w.add_token_list(tokens)
        w.add_token_types(kinds)
        w.add_token_merges(merges)

    def matrix(self, module: str, w: Any) -> None:
        m, c = w.format, self.c
        part = module.rpartition(".")[2]
        if not m.quantized:
            values = from_bf16(w.data.view(np.uint16)).reshape(m.rows, m.cols)
            if part in ("in_proj_a", "in_proj_b"):
                values = values[self._value_heads(1)]
            self.writer.write_tensor_data(np.ascontiguousarray(values if m.rows > 1 else values[0]))
            return
        blocks = _blocks(m, w.data, w.parts[1])  # (rows, cols/32, block bytes)
        if part == "in_proj_qkv":
            order = np.concatenate(
                [np.arange(2 * c.delta.keys), 2 * c.delta.keys + self._value_heads(c.linear_value_head_dim)]
            )
            blocks = blocks[order]
        elif part == "in_proj_z":
            blocks = blocks[self._value_heads(c.linear_value_head_dim)]
        elif part == "out_proj":
            blocks = blocks[:, self._value_heads(c.linear_value_head_dim // 32)]
        self.writer.write_tensor_data(np.ascontiguousarray(blocks.reshape(m.rows, -1)))

    def vector(self, name: str, values: NDArray[np.float32]) -> None:
        c = self.c
        if name.endswith("A_log"):
            values = -np.exp(values)[self._value_heads(1)]
        elif name.endswith("dt_bias"):
            values = values[self._value_heads(1)]
        elif "conv1d" in name:
            order = np.concatenate(
                [np.arange(2 * c.delta.keys), 2 * c.delta.keys + self._value_heads(c.linear_value_head_dim)]
            )
            values = values[:, 0][order]
        elif not name.endswith("linear_attn.norm.weight"):
            values = values + np.float32(1)
        self.writer.write_tensor_data(np.ascontiguousarray(values, np.float32))

    def expert(self, layer: int, expert: int, part: int, w: Any) -> None:
        """Experts arrive one by one, their tensors part by part: a layer is buffered until it is complete."""
        if expert == 0:
            if part == 0:
                self._pending = []
            blocks = w.format.cols // 32 * (2 + 4 * w.format.kernel.bits)
            self._pending.append(np.empty((self.c.num_experts, w.format.rows, blocks), np.uint8))
        self._pending[part][expert] = _blocks(w.format, w.data, w.parts[1]).reshape(w.format.rows, -1)
        if expert == self.c.num_experts - 1 and part == 2:
            for tensor in self._pending:
                self.writer.write_tensor_data(tensor)

    def _value_heads(self, width: int) -> NDArray[np.int64]:
        """Rows (or columns) of value heads, `width` each, in llama.cpp's order."""
        c = self.c
        heads = np.arange(c.linear_num_value_heads).reshape(c.linear_num_key_heads, -1).T.ravel()
        return (heads[:, None] * width + np.arange(width)).ravel()

    def close(self) -> None:
        self.writer.close()


def _gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}"


def _blocks(m: MatrixFormat, data: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(rows, cols/32, bytes): Q4_0, a float16 scale and 16 bytes whose low halves are the first 16 values, or Q8_0, a scale and 32
    signed bytes. (ggml, ggml-common.h.)"""
    groups = m.cols // 32
    out = np.empty((m.rows, groups, 2 + 4 * m.kernel.bits), np.uint8)
    out[..., :2] = scales.reshape(m.rows, groups, 2)
    packed = data.reshape(m.rows, groups, -1)
    if m.kernel.bits == 8:
        out[..., 2:] = packed ^ 0x80
        return out
    values = np.empty((m.rows, groups, 32), np.uint8)
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    out[..., 2:] = values[..., :16] | values[..., 16:] << 4
    return out
