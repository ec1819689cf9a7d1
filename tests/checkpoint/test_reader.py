"""Each kind of checkpoint runs where it lies; each way one can be broken is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from expertstream import LLM, CheckpointError, RequestError
from expertstream.bench.machine import disk_rates
from expertstream.bench.plan import load_model
from expertstream.bench.speed import drop_page_cache
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.checkpoint.reader import open_checkpoint
from expertstream.convert import convert
from expertstream.summary import summarize

from .. import oracle
from ..conftest import SMALL

TOKENS = oracle.random_tokens(SMALL, 40)


def logits(folder: Path, **options: Any) -> np.ndarray:
    with LLM(folder, memory="64MiB", context_length=256, **options) as llm:
        return oracle.our_logits(llm, TOKENS)


def test_both_name_families_are_one_model(hf_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(hf_folder / "model.safetensors")
    renamed = {
        k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v for k, v in tensors.items()
    }
    renamed |= {
        "model.visual.blocks.0.weight": torch.zeros(2),
        "mtp.fc.weight": torch.zeros(2),
        "mtp.norm.weight": torch.zeros(2),
    }
    folder = oracle.save(tmp_path / "other", {"model_type": "qwen3_5_moe", "text_config": SMALL}, renamed)
    assert np.array_equal(logits(folder), logits(hf_folder))
    assert summarize(folder)["skipped_tensors"] == {"vision": 1, "MTP": 2}


def test_experts_may_be_separate_tensors(hf_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(hf_folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        gate_up, down = tensors.pop(name), tensors.pop(prefix + "down_proj")
        for e in range(SMALL["num_experts"]):
            gate, up = gate_up[e].chunk(2)
            tensors |= {
                f"{prefix}{e}.gate_proj.weight": gate,
                f"{prefix}{e}.up_proj.weight": up,
                f"{prefix}{e}.down_proj.weight": down[e],
            }
    assert np.array_equal(logits(oracle.save(tmp_path / "x", SMALL, tensors)), logits(hf_folder))


def test_mlx_checkpoints_give_the_packs_bits(pack_folder: Path, mlx_folder: Path, tmp_path: Path) -> None:
    expected = logits(pack_folder)
    assert open_checkpoint(mlx_folder).kind == "mlx"
    for residency in ("slots", "os"):
        assert np.array_equal(logits(mlx_folder, residency=residency), expected)
    # Overrides decide the bits: the trunk is 8-bit, the default 4.
    overrides = [
        v for v in json.loads((mlx_folder / "config.json").read_text())["quantization"].values() if isinstance(v, dict)
    ]
    assert {"bits": 8, "group_size": 64} in overrides
    sharded = oracle.save_mlx(tmp_path / "sharded", pack_folder, SMALL, (4, 64), shards=3)
    assert np.array_equal(logits(sharded), expected)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


GATE = "model.layers.1.mlp.gate.weight"
SCALES = "language_model.model.layers.0.mlp.switch_mlp.up_proj.scales"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("hf", lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": ("hf", lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "config a list": ("hf", lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "other model": ("hf", lambda f: edit_config(f, lambda c: c.update(model_type="llama")), "unsupported model_type 'llama'; supported: gpt_oss, qwen3_5_moe, qwen3_moe, qwen3_next"),
    "no weights": ("hf", lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
    "truncated": ("hf", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5000]), "out of range"),
    "missing tensor": ("hf", lambda f: edit_tensors(f, lambda t: t.pop(GATE)), f"missing tensor {GATE}"),
    "missing experts": ("hf", lambda f: edit_tensors(f, lambda t: t.pop("model.layers.2.mlp.experts.down_proj")), "missing tensor model.layers.2.mlp.experts.down_proj"),
    "wrong shape": ("hf", lambda f: edit_tensors(f, lambda t: t.update({GATE: t[GATE][:5]})), r"model.layers.1.mlp.gate.weight has shape \(5, 128\), expected \(24, 128\)"),
    "wrong dtype": ("hf", lambda f: edit_tensors(f, lambda t: t.update({GATE: t[GATE].to(torch.int32)})), "has dtype I32, expected one of BF16, F16, F32"),
    "expert shape": ("hf", lambda f: edit_config(f, lambda c: c.update(num_experts=25)), "has shape"),
    "GPTQ": ("hf", lambda f: edit_config(f, lambda c: c.update(quantization_config={"quant_method": "gptq"})), "quantization 'gptq' is not supported"),
    "unknown mode": ("mlx", lambda f: edit_config(f, lambda c: c["quantization"].update(mode="mxfp8")), "unknown quantization 'mxfp8' in config.json; affine and mxfp4 are supported"),
    "mxfp4 in other groups": ("mlx", lambda f: edit_config(f, lambda c: c["quantization"].update(mode="mxfp4")), "unknown quantization of the model"),
    "3 bits": ("mlx", lambda f: edit_config(f, lambda c: c["quantization"].update(bits=3)), "quantized with 3 bits"),
    "no bits": ("mlx", lambda f: edit_config(f, lambda c: c["quantization"].pop("bits")), "unknown quantization of the model"),
    "no table": ("mlx", lambda f: edit_config(f, lambda c: (c.pop("quantization"), c.pop("quantization_config"))), "quantized with 0 bits"),
    "scales of another dtype": ("mlx", lambda f: edit_tensors(f, lambda t: t.update({SCALES: t[SCALES].float()})), "has dtype BF16, but its scales have F32"),
    "gate and up differ": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"][0]["matrices"]["up"].update(bits=8)), "layer 0"),
    "tokenizer": ("hf", lambda f: (f / "tokenizer.json").unlink(), "missing tokenizer: no tokenizer.json"),
    "tokenizer broken": ("hf", lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
    "no manifest entry": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"].pop()), "expertstream.json: layer 3: missing"),
    "other version": ("pack", lambda f: edit_manifest(f, lambda m: m.update(version=99)), "pack version 99"),
    "other format": ("pack", lambda f: edit_manifest(f, lambda m: m.update(format="x")), "not a pack manifest"),
    "manifest not JSON": ("pack", lambda f: (f / "expertstream.json").write_text("nope"), "cannot be read as JSON"),
    "record length": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"][1].update(record_bytes=4096)), "layer 1: record_bytes 4096"),
    "path in manifest": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"][1].update(file="../x")), "file must be a file name; got '../x'"),
    "checksums": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"][1]["checksums"].pop()), "layer 1: checksums must be a list of 24 checksums"),
    "matrix": ("pack", lambda f: edit_manifest(f, lambda m: m["layers"][0]["matrices"]["up"].update(bits=5)), "layer 0: unknown quantization"),
    "no expert file": ("pack", lambda f: (f / "experts-00002.safetensors").unlink(), "missing file experts-00002.safetensors"),
    "short expert file": ("pack", lambda f: truncate(f / "experts-00002.safetensors"), "experts-00002.safetensors: truncated"),
    "damaged trunk": ("pack", lambda f: flip(f / "trunk.safetensors", -5000), "trunk.safetensors: tensor .*: checksum mismatch"),
}  # fmt: skip


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "expertstream.json").read_text())
    change(manifest)
    (folder / "expertstream.json").write_text(json.dumps(manifest))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", list(BROKEN))
def test_what_is_broken_is_named(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    kind, break_it, message = BROKEN[name]
    folder = Path(shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / "broken"))
    break_it(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        LLM(folder, memory="64MiB", context_length=256)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_shards_in_folders_below(pack_folder: Path, tmp_path: Path) -> None:
    """As some converters write them; also behind a link, as in a hub's cache, and in folders that cannot be written."""
    flat = oracle.save_mlx(tmp_path / "flat", pack_folder, SMALL, (4, 64), shards=3)
    shutil.copytree(flat, deep := tmp_path / "deep")
    index = deep / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (deep / "weights" / "more").mkdir(parents=True)
    (tmp_path / "blob").write_bytes((deep / names[0]).read_bytes())
    (deep / names[0]).unlink()
    (deep / "weights" / names[0]).symlink_to("../../blob")
    (deep / names[1]).rename(deep / "weights" / "more" / names[1])
    text = index.read_text().replace(names[0], f"weights/{names[0]}").replace(names[1], f"weights/more/{names[1]}")
    index.write_text(text)
    for folder in (deep, deep / "weights", deep / "weights" / "more"):
        folder.chmod(0o555)
    expected = logits(flat)
    assert np.array_equal(logits(deep), expected)
    before = open_checkpoint(deep).fingerprint()
    os.utime(tmp_path / "blob", (1, 1))
    assert open_checkpoint(deep).fingerprint() != before
    assert load_model(str(deep), 0, BitPolicy()).model_bytes == load_model(str(flat), 0, BitPolicy()).model_bytes
    assert disk_rates(deep, 4096, depths=(1,), splits=(), seconds=0.01)
    drop_page_cache(deep)
    convert(deep, tmp_path / "pack", BitPolicy(), threads=2)
    assert np.array_equal(logits(tmp_path / "pack"), expected)
    for folder in (deep, deep / "weights", deep / "weights" / "more"):
        folder.chmod(0o755)


def test_missing_shards_and_index(hf_folder: Path, pack_folder: Path, tmp_path: Path) -> None:
    sharded = oracle.save_mlx(tmp_path / "s", pack_folder, SMALL, (4, 64), shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing shard model-00002-of-00003.safetensors \(1 of 3 are missing\)"):
        open_checkpoint(sharded)
    for name in (
        '"../../etc/passwd"',
        '"/etc/passwd"',
        '"a//b"',
        '"a/../../b"',
        '""',
        '"."',
        "1",
        "null",
        '"a\\u0000b"',
    ):
        (sharded / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": {name}}}}}')
        with pytest.raises(CheckpointError, match="weight_map must give a file of this folder"):
            open_checkpoint(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 \*.safetensors files but no model.safetensors.index.json"):
        open_checkpoint(sharded)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        open_checkpoint(hf_folder / "config.json")


def test_a_missing_template_is_a_request_error(hf_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "x"))
    (folder / "chat_template.jinja").unlink()
    with (
        LLM(folder, memory="64MiB", context_length=256) as llm,
        pytest.raises(RequestError, match="no chat template"),
    ):
        llm.chat([{"role": "user", "content": "hi"}])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 65) | st.floats(-4096, 4096) | st.text(max_size=20) | st.sampled_from(["expertstream-pack", "hf", "0123456789abcdef"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["gate", "up", "down", "rows", "cols", "bits", "group_size", "dtype"]), inner, max_size=6),
    max_leaves=20,
)  # fmt: skip
PATHS = [
    ("format",), ("version",), ("convention",), ("trunk_checksums",), ("layers",), ("layers", 0), ("layers", 0, "file"),
    ("layers", 0, "data_offset"), ("layers", 0, "record_bytes"), ("layers", 0, "matrices"), ("layers", 0, "matrices", "gate"),
    ("layers", 0, "matrices", "gate", "rows"), ("layers", 0, "matrices", "gate", "bits"), ("layers", 0, "matrices", "gate", "dtype"),
    ("layers", 0, "checksums"), ("layers", 0, "checksums", 0),
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=json_values)
@example(path=("version",), value=True)
@example(path=("version",), value=1.0)
def test_any_manifest_is_read_or_refused(pack_folder: Path, tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    from expertstream.models import config_of, expert_layouts

    folder = tmp_path / "fuzzed"
    if not folder.exists():
        shutil.copytree(pack_folder, folder)
    manifest = json.loads((pack_folder / "expertstream.json").read_text())
    at = manifest
    for key in path[:-1]:
        at = at[key]
    original, at[path[-1]] = at[path[-1]], value
    (folder / "expertstream.json").write_text(json.dumps(manifest))
    try:
        checkpoint = open_checkpoint(folder)
        expert_layouts(config_of(checkpoint), checkpoint)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        # What is accepted is what was written, or another well-formed value of the same kind.
        assert type(value) is type(original)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "model.safetensors"]
)  # fmt: skip
def test_what_is_no_file_neither_hangs_nor_fills_memory(hf_folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "m"))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with (
        pytest.raises(CheckpointError, match=rf"{name}.*not a regular file"),
        LLM(folder, memory="64MiB", context_length=256) as llm,
    ):
        llm.tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_headers_have_bounds(tmp_path: Path) -> None:
    for shape in ([1] * 9, [1 << 60, 1 << 60]):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="invalid shape"):
            open_checkpoint(tmp_path)
