"""Every mixture of formats and sizes that a checkpoint can have gives the reference's numbers, where it lies and as a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertstream import LLM
from expertstream.checkpoint.pack import read_manifest
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.checkpoint.reader import open_checkpoint
from expertstream.convert import convert
from expertstream.errors import CheckpointError
from expertstream.formats import Affine
from expertstream.models import config_of, expert_layouts, weight_map
from expertstream.ops.reference import ReferenceOps
from expertstream.summary import summarize

from .. import oracle
from ..models.test_architectures import GPT_OSS

# MLX's CPU build is on PyPI for Linux; where it is missing, what would be written by it is not tested.
mx: Any = pytest.importorskip("mlx.core")


def written_by_mlx(
    folder: Path,
    inner: int,
    hidden: int,
    forms: dict[str, tuple[int, int] | None],
    by_layer: dict[int, dict[str, tuple[int, int] | None]] | None = None,
) -> tuple[Path, oracle.Oracle]:
    """A checkpoint quantized and saved by MLX, laid out as mlx-lm has it, and the model of transformers with the values that MLX reads
    back from it. forms: of "gate", "up", "down" of the experts and of the "trunk", (bits, group size), or None for bfloat16; by_layer: of the experts of some layers."""
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
            mine = {**forms, **(by_layer or {}).get(int(name.split(".")[2]) if "experts." in name else -1, {})}
            if name.endswith("experts.gate_up_proj"):
                gate, up = values.chunk(2, 1)
                put(f"{prefix}switch_mlp.gate_proj", gate, mine["gate"])
                put(f"{prefix}switch_mlp.up_proj", up, mine["up"])
            elif name.endswith("experts.down_proj"):
                put(f"{prefix}switch_mlp.down_proj", values, mine["down"])
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


def test_layers_may_differ_in_format(tmp_path: Path) -> None:
    plain = {"gate": None, "up": None, "down": None, "trunk": (8, 64)}
    others: dict[int, dict[str, Any]] = {
        1: {"gate": (2, 32), "up": (2, 32), "down": (8, 64)}, 2: {"gate": (8, 64), "up": (8, 64), "down": None},
    }  # fmt: skip
    path, model = written_by_mlx(tmp_path, 64, 128, plain, others)
    tokens = oracle.random_tokens(oracle.config_of(), 20)
    options: dict[str, Any] = {"memory": "64MiB", "context_length": 64, "kv_dtype": "f32"}
    expected = oracle.oracle_logits(model, tokens)
    convert(path, tmp_path / "pack", BitPolicy(), threads=2)
    got = []
    for folder in (path, tmp_path / "pack"):
        with LLM(folder, exact=True, **options) as llm:
            got.append(oracle.our_logits(llm, tokens))
        assert np.abs(got[-1] - expected).max() < 2e-3 * np.abs(expected).max()
        said = summarize(folder)
        assert said["expert_format"] == (
            "bf16; 2-bit affine, groups of 32, bf16 scales; 8-bit affine, groups of 64, bf16 scales"
        )
        weights = 3 * 64 * 128
        assert said["routed_bytes_per_token"] >= 2 * weights * (
            2 * 2 + (2 * 2.5 + 8.5) / 8 / 3 + (2 * 8.5 + 16) / 8 / 3
        )
    assert np.array_equal(*got)


@pytest.mark.parametrize("trunk", [None, (8, 64)])
def test_gpt_oss_as_mlx_has_it(tmp_path: Path, trunk: tuple[int, int] | None) -> None:
    """Experts in MLX's mxfp4 mode, gate and up apart; what is quantized beside them is affine."""
    config = {**GPT_OSS, "hidden_size": 128}
    model = oracle.make_oracle(config, torch.bfloat16)
    tensors: dict[str, Any] = {}
    table: dict[str, Any] = {}
    with torch.no_grad():
        for name, values in model.state_dict().items():
            prefix = name.partition("experts.")[0] + "experts"
            stored = mx.array(values.numpy()).astype(mx.bfloat16)
            if name.endswith("gate_up_proj_bias"):
                tensors[f"{prefix}.gate_proj.bias"], tensors[f"{prefix}.up_proj.bias"] = stored[:, ::2], stored[:, 1::2]
            elif name.endswith("down_proj_bias"):
                tensors[f"{prefix}.down_proj.bias"] = stored
            elif "experts." in name:
                rows = mx.array(values.transpose(1, 2).contiguous().numpy())
                parts = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if "gate_up" in name else {"down": rows}
                for part, w in parts.items():
                    packed, scales = mx.quantize(mx.contiguous(w), group_size=32, bits=4, mode="mxfp4")
                    tensors[f"{prefix}.{part}_proj.weight"], tensors[f"{prefix}.{part}_proj.scales"] = packed, scales
            elif trunk is not None and values.ndim == 2 and "router" not in name:
                module, (bits, group) = name.removesuffix(".weight"), trunk
                packed, scales, biases = mx.quantize(stored, group_size=group, bits=bits)
                tensors |= {f"{module}.weight": packed, f"{module}.scales": scales, f"{module}.biases": biases}
                table[module] = {"bits": bits, "group_size": group}
                wide = (scales.astype(mx.float32), biases.astype(mx.float32))
                values.copy_(torch.from_numpy(np.array(mx.dequantize(packed, *wide, group_size=group, bits=bits))))
            else:
                tensors[name] = stored
    quantization = {"bits": 4, "group_size": 32, "mode": "mxfp4", **table}
    path = oracle.save(tmp_path / "mlx", {**config, "quantization": quantization}, {})
    mx.save_safetensors(str(path / "model.safetensors"), tensors, metadata={"format": "mlx"})
    tokens = oracle.random_tokens(config, 60)
    options: dict[str, Any] = {"memory": "64MiB", "context_length": 128, "kv_dtype": "f32"}
    expected = oracle.oracle_logits(model, tokens)
    with LLM(path, ops="reference", **options) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), expected) < 1e-4
    convert(path, tmp_path / "pack", BitPolicy(), threads=2)
    got = []
    for folder in (path, tmp_path / "pack"):
        with LLM(folder, exact=True, **options) as llm:
            got.append(oracle.our_logits(llm, tokens))
    assert np.array_equal(*got)
    if trunk is None:  # the release, whose rows of gate and up alternate, stands for the same
        release = oracle.save_hf(
            tmp_path / "hf", {**config, "quantization_config": {"quant_method": "mxfp4"}}, model, torch.bfloat16
        )
        with LLM(release, exact=True, **options) as llm:
            assert np.array_equal(oracle.our_logits(llm, tokens), got[0])


def test_mlx_reads_what_the_tests_write_in_its_layout_as_we_do(mlx_folder: Path) -> None:
    """oracle.save_mlx lays a pack's values out as mlx-lm does: MLX itself finds the same values in it."""
    tensors = mx.load(str(mlx_folder / "model.safetensors"))
    checkpoint = open_checkpoint(mlx_folder)
    c = config_of(checkpoint)
    specs = weight_map(c)
    found = 0
    for name, spec in specs.items():
        if spec.kind != "matrix" or f"language_model.{name}.scales" not in tensors:
            continue
        w = checkpoint.weight(name, spec)
        assert isinstance(w.format, Affine)
        parts = [tensors[f"language_model.{name}.{part.name}"] for part in w.format.parts]
        wide = [part.astype(mx.float32) for part in parts[1:]]
        theirs = mx.dequantize(parts[0], *wide, group_size=w.format.group_size, bits=w.format.bits)
        assert np.array_equal(np.array(theirs), w.format.dequantize(w.parts)), name
        found += 1
    for layout in expert_layouts(c, checkpoint):
        prefix = f"language_model.model.layers.{layout.layer}.mlp.switch_mlp"
        for part, m, ours in zip(
            ("gate", "up", "down"), layout.format.matrices, oracle.dequantize_expert(layout, 3)[0], strict=True
        ):
            assert isinstance(m, Affine)
            stored = [tensors[f"{prefix}.{part}_proj.{p.name}"][3] for p in m.parts]
            wide = [s.astype(mx.float32) for s in stored[1:]]
            assert np.array_equal(np.array(mx.dequantize(stored[0], *wide, group_size=m.group_size, bits=m.bits)), ours)
            found += 1
    assert found > 20
