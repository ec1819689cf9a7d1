"""Every mixture of formats and sizes that a checkpoint can have gives the reference's numbers, where it lies and as a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from expertstream import LLM
from expertstream.checkpoint.pack import read_manifest
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.convert import convert
from expertstream.errors import CheckpointError
from expertstream.ops.cpu import CpuOps
from expertstream.ops.reference import ReferenceOps

from .. import oracle

NATIVE = CpuOps(2)


def mlx_of(folder: Path, inner: int, hidden: int, formats: dict[str, tuple[int, int] | None]) -> Path:
    """A checkpoint laid out as mlx-lm writes it, with experts quantized part by part: (bits, group size), or None for bfloat16."""
    config = oracle.config_of(num_experts=4, num_experts_per_tok=2, hidden_size=hidden, moe_intermediate_size=inner)
    model = oracle.make_oracle(config, torch.bfloat16)
    hf = oracle.save_hf(folder / "hf", config, model, torch.bfloat16)
    tensors, table = load_file(hf / "model.safetensors"), dict[str, Any]()
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix("experts.gate_up_proj")
        gate, up = tensors.pop(name).chunk(2, 1)
        down = tensors.pop(f"{prefix}experts.down_proj")
        for part, values in (("gate", gate), ("up", up), ("down", down)):
            module = f"{prefix}switch_mlp.{part}_proj"
            form = formats[part]
            if form is None:
                tensors[f"{module}.weight"] = values.contiguous()
                table[module] = False
                continue
            bits, group = form
            experts = [NATIVE.quantize(v.float().numpy(), bits, group) for v in values]
            packed, scales, biases = (np.stack(parts) for parts in zip(*experts, strict=True))
            rows, cols = values.shape[1:]
            tensors[f"{module}.weight"] = (
                torch.from_numpy(packed).view(torch.uint32).reshape(4, rows, cols * bits // 32)
            )
            for suffix, found in (("scales", scales), ("biases", biases)):
                tensors[f"{module}.{suffix}"] = (
                    torch.from_numpy(found).view(torch.bfloat16).reshape(4, rows, cols // group)
                )
            table[module] = {"bits": bits, "group_size": group}
    for name in list(tensors):
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            tensors[name] = tensors[name] + 1  # MLX files have it in
        if name.endswith("conv1d.weight"):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    modules = {k: v for k, v in table.items() if v}
    return oracle.save(folder / "mlx", {**config, "quantization": {"bits": 4, "group_size": 64, **modules}}, tensors)


FORMS = st.sampled_from([None, (2, 32), (4, 32), (4, 64), (8, 32), (8, 128)])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([8, 24, 32, 40, 48, 64, 72, 96, 128]), st.sampled_from([128, 256]), FORMS, FORMS)
def test_every_mixture_is_the_reference(
    tmp_path_factory: pytest.TempPathFactory, inner: int, hidden: int, gate: Any, down: Any
) -> None:
    forms = {"gate": gate, "up": gate, "down": down}  # where gate and up differ, the reader says so
    for part, cols in (("gate", hidden), ("up", hidden), ("down", inner)):
        if forms[part] is not None and cols % forms[part][1]:
            forms[part] = (4, 32) if cols % 32 == 0 else None
    folder = tmp_path_factory.mktemp("mixture")
    path = mlx_of(folder, inner, hidden, forms)
    tokens = oracle.random_tokens(oracle.config_of(hidden_size=hidden), 20)
    options: dict[str, Any] = {"memory": "64MiB", "context_length": 64}
    with LLM(path, ops="reference", **options) as llm:
        assert isinstance(llm.ops, ReferenceOps)
        expected = oracle.our_logits(llm, tokens)
    with LLM(path, exact=True, **options) as llm:
        here = oracle.our_logits(llm, tokens)
    convert(path, folder / "pack", BitPolicy(bits=16, trunk_bits=16), threads=2)
    with LLM(folder / "pack", exact=True, **options) as llm:
        packed = oracle.our_logits(llm, tokens)
    assert np.array_equal(here, packed), forms
    assert np.abs(here - expected).max() < 2e-3 * np.abs(expected).max(), forms


def test_a_damaged_pack_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path = mlx_of(tmp_path, 40, 128, {"gate": (4, 32), "up": (4, 32), "down": None})
    convert(path, tmp_path / "pack", BitPolicy(bits=16, trunk_bits=16), threads=2)
    manifest = tmp_path / "pack" / "expertstream.json"
    assert read_manifest(tmp_path / "pack")["version"] == 3
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2 packs of matrices with 40 or 128 rows are damaged; convert"):
        LLM(tmp_path / "pack")
