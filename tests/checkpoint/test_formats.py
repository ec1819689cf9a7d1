"""Every mixture of formats and sizes that a checkpoint can have gives the reference's numbers, where it lies and as a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3_5MoeForCausalLM

from expertstream import LLM
from expertstream.checkpoint.pack import read_manifest
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.convert import convert
from expertstream.errors import CheckpointError
from expertstream.ops.reference import ReferenceOps

from .. import oracle

# MLX's CPU build is on PyPI for Linux; where it is missing, what would be written by it is not tested.
mx: Any = pytest.importorskip("mlx.core")


def written_by_mlx(
    folder: Path, inner: int, hidden: int, forms: dict[str, tuple[int, int] | None]
) -> tuple[Path, Qwen3_5MoeForCausalLM]:
    """A checkpoint quantized and saved by MLX, laid out as mlx-lm has it, and the model of transformers with the values that MLX reads
    back from it. forms: of "gate", "up", "down" of the experts and of the "trunk", (bits, group size), or None for bfloat16."""
    config = oracle.config_of(num_experts=4, num_experts_per_tok=2, hidden_size=hidden, moe_intermediate_size=inner)
    model = oracle.make_oracle(config, torch.bfloat16)
    tensors: dict[str, Any] = {}
    table: dict[str, Any] = {}

    def put(module: str, values: torch.Tensor, form: tuple[int, int] | None) -> None:
        """And writes the values as they are read back into `values`."""
        array = mx.array(values.detach().numpy()).astype(mx.bfloat16)
        if form is None or array.shape[-1] % form[1]:
            tensors[f"{module}.weight"] = array
            return
        bits, group = form
        packed, scales, biases = mx.quantize(array, group_size=group, bits=bits)
        tensors.update({f"{module}.weight": packed, f"{module}.scales": scales, f"{module}.biases": biases})
        table[module] = {"bits": bits, "group_size": group}
        back = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits)
        values.copy_(torch.from_numpy(np.array(back)))

    with torch.no_grad():
        for name, values in model.state_dict().items():
            prefix = name.partition("experts.")[0]
            if name.endswith("experts.gate_up_proj"):
                gate, up = values.chunk(2, 1)
                put(f"{prefix}switch_mlp.gate_proj", gate, forms["gate"])
                put(f"{prefix}switch_mlp.up_proj", up, forms["up"])
            elif name.endswith("experts.down_proj"):
                put(f"{prefix}switch_mlp.down_proj", values, forms["down"])
            elif values.ndim == 2 and not name.endswith("mlp.gate.weight"):
                put(name.removesuffix(".weight"), values, forms["trunk"])
            else:
                stored = values.transpose(1, 2) if name.endswith("conv1d.weight") else values
                if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
                    stored = values + 1  # MLX files have it in
                tensors[name] = mx.array(stored.contiguous().numpy()).astype(mx.bfloat16)
                if stored is not values and not name.endswith("conv1d.weight"):  # the sum was rounded
                    values.copy_(torch.from_numpy(np.array(tensors[name].astype(mx.float32))) - 1)
    path = oracle.save(folder / "mlx", {**config, "quantization": {"bits": 4, "group_size": 64, **table}}, {})
    mx.save_safetensors(str(path / "model.safetensors"), tensors, metadata={"format": "mlx"})
    return path, model


FORMS = st.sampled_from([None, (2, 32), (4, 32), (4, 64), (8, 32), (8, 128)])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([8, 24, 32, 40, 48, 64, 72, 96, 128]), st.sampled_from([96, 128, 256]), FORMS, FORMS, FORMS)
def test_every_mixture_is_what_mlx_wrote(
    tmp_path_factory: pytest.TempPathFactory, inner: int, hidden: int, gate: Any, down: Any, trunk: Any
) -> None:
    """By NumPy, by the kernels on the files as they lie, and as a pack."""
    forms = {"gate": gate, "up": gate, "down": down, "trunk": trunk}  # where gate and up differ, the reader says so
    for part, cols in (("gate", hidden), ("up", hidden), ("down", inner)):
        if forms[part] is not None and cols % forms[part][1]:
            forms[part] = (4, 32) if cols % 32 == 0 else None
    folder = tmp_path_factory.mktemp("mixture")
    path, model = written_by_mlx(folder, inner, hidden, forms)
    tokens = oracle.random_tokens(oracle.config_of(hidden_size=hidden), 20)
    options: dict[str, Any] = {"memory": "64MiB", "context_length": 64, "kv_dtype": "f32"}
    expected = oracle.oracle_logits(model, tokens)
    with LLM(path, ops="reference", **options) as llm:
        assert isinstance(llm.ops, ReferenceOps)
        reference = oracle.our_logits(llm, tokens)
    with LLM(path, exact=True, **options) as llm:
        here = oracle.our_logits(llm, tokens)
    convert(path, folder / "pack", BitPolicy(bits=16, trunk_bits=16), threads=2)
    with LLM(folder / "pack", exact=True, **options) as llm:
        packed = oracle.our_logits(llm, tokens)
    assert np.array_equal(here, packed), forms
    assert np.abs(reference - expected).max() < 1e-4 * np.abs(expected).max(), forms
    assert np.abs(here - expected).max() < 2e-3 * np.abs(expected).max(), forms


def test_a_damaged_pack_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path, _ = written_by_mlx(tmp_path, 40, 128, {"gate": (4, 32), "up": (4, 32), "down": None, "trunk": (8, 64)})
    convert(path, tmp_path / "pack", BitPolicy(bits=16, trunk_bits=16), threads=2)
    manifest = tmp_path / "pack" / "expertstream.json"
    assert read_manifest(tmp_path / "pack")["version"] == 3
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 2'))
    with pytest.raises(CheckpointError, match="version 2 packs of matrices with 40 or 128 rows are damaged; convert"):
        LLM(tmp_path / "pack")
