"""Packs: exact where they must be, resumable at any moment, never half a folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expertstream import LLM, CheckpointError, ConvertError
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.checkpoint.reader import open_checkpoint
from expertstream.convert import convert
from expertstream.formats import Affine
from expertstream.formats.numbers import to_bf16
from expertstream.models import config_of, expert_layouts

from . import oracle
from .conftest import SMALL


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_mlx_sources_are_repacked_bit_exactly(pack_folder: Path, mlx_folder: Path, tmp_path: Path) -> None:
    convert(mlx_folder, tmp_path / "pack", BitPolicy(), threads=1)
    for layer in range(4):
        name = f"experts-{layer:05}.safetensors"
        assert (tmp_path / "pack" / name).read_bytes() == (pack_folder / name).read_bytes()
    tokens = oracle.random_tokens(SMALL, 30)
    results = []
    for folder in (pack_folder, mlx_folder, tmp_path / "pack"):
        with LLM(folder, memory="64MiB", context_length=256) as llm:
            results.append(oracle.our_logits(llm, tokens))
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_dense_matrices_of_an_mlx_source_stay_dense(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "p", BitPolicy(4, 64, 16), threads=1)
    mlx = oracle.save_mlx(tmp_path / "mlx", tmp_path / "p", SMALL, (4, 64))
    convert(mlx, tmp_path / "q", BitPolicy(), threads=1)
    assert (tmp_path / "q" / "experts-00001.safetensors").read_bytes() == (
        tmp_path / "p" / "experts-00001.safetensors"
    ).read_bytes()
    checkpoint = open_checkpoint(tmp_path / "q")
    assert all(
        checkpoint.matrix_format(n, *s.shape).kernel.bits == 16
        for n, s in _specs(checkpoint).items()
        if s.kind == "matrix"
    )


def test_symmetric_weights_have_no_bias(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "pack", BitPolicy(4, 32, 8, symmetric=True), threads=2)
    checkpoint = open_checkpoint(tmp_path / "pack")
    assert not any(name.endswith(".biases") for name in checkpoint.tensors)
    matrix = expert_layouts(config_of(checkpoint), checkpoint)[0].format.gate
    assert isinstance(matrix, Affine) and matrix.symmetric and matrix.nbytes * 8 == matrix.rows * matrix.cols * 4.5
    model = oracle.dequantized_oracle(tmp_path / "pack", SMALL)
    tokens = oracle.random_tokens(SMALL, 40)
    with LLM(tmp_path / "pack", exact=True, kv_dtype="f32", memory="64MiB", context_length=256) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(model, tokens)) < 1e-3
    with LLM(tmp_path / "pack", ops="reference", kv_dtype="f32", memory="64MiB", context_length=256) as llm:
        assert oracle.relative_error(oracle.our_logits(llm, tokens), oracle.oracle_logits(model, tokens)) < 1e-4


def test_16_bits_keep_every_value(hf_folder: Path, tmp_path: Path) -> None:
    convert(hf_folder, tmp_path / "pack", BitPolicy(16, 64, 16), threads=1)
    tokens = oracle.random_tokens(SMALL, 30)
    with (
        LLM(hf_folder, memory="64MiB", context_length=256) as a,
        LLM(tmp_path / "pack", memory="64MiB", context_length=256) as b,
    ):
        assert np.array_equal(oracle.our_logits(a, tokens), oracle.our_logits(b, tokens))


def test_records_are_aligned_padded_and_where_the_manifest_says(pack_folder: Path) -> None:
    manifest = json.loads((pack_folder / "expertstream.json").read_text())
    for entry in manifest["layers"]:
        assert entry["data_offset"] % 4096 == entry["record_bytes"] % 4096 == 0
        # Others can open it: a plain safetensors file with one tensor of records.
        records = load_file(pack_folder / entry["file"])["experts"]
        assert records.dtype == torch.uint8 and records.shape == (SMALL["num_experts"], entry["record_bytes"])


def test_trunk_policy(pack_folder: Path) -> None:
    checkpoint = open_checkpoint(pack_folder)
    formats = {
        n: checkpoint.matrix_format(n, *s.shape).kernel.bits
        for n, s in _specs(checkpoint).items()
        if s.kind == "matrix"
    }
    for name, bits in formats.items():
        sensitive = name.endswith((".mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b"))
        assert bits == (16 if sensitive else 8), name


def _specs(checkpoint: Any) -> Any:
    from expertstream.models import weight_map

    return weight_map(config_of(checkpoint))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantizing_is_as_good_as_the_grid_allows(bits: int) -> None:
    w = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    from expertstream.ops.cpu import CpuOps

    q, scales, biases = CpuOps(2).quantize(w, bits, 64)
    parts = [part.view(np.uint8).ravel() for part in (q, scales, biases)]
    back = Affine(64, 256, bits, 64, "bf16").dequantize(parts)
    groups, got = w.reshape(-1, 64), back.reshape(-1, 64)
    # Never worse than the plain grid from least to largest value.
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    step, zero = ((high - low) / (2**bits - 1)), low
    bf16 = lambda x: (to_bf16(x).astype(np.uint32) << 16).view(np.float32)  # noqa: E731
    step, zero = bf16(step.astype(np.float32)), bf16(zero)
    plain = np.clip(np.round((groups - zero) / step), 0, 2**bits - 1) * step + zero
    assert (((groups - got) ** 2).sum(1) <= ((groups - plain) ** 2).sum(1) * 1.0001 + 1e-9).all()


def start_convert(source: Path, destination: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "expertstream", "convert", str(source), str(destination), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """kill -9 at many moments: the folder never has its name before it is whole, and in the end it is byte for byte the same."""
    config = oracle.config_of(
        num_experts=64,
        hidden_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        layer_types=["linear_attention"] * 6,
    )
    source = oracle.save_hf(tmp_path / "src", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    convert(source, tmp_path / "straight", BitPolicy(), threads=2)
    destination = tmp_path / "killed"
    kills = 0
    for attempt in range(40):
        process = start_convert(source, destination)
        # Later each time, so that every stage is hit and the end is reached; a fresh interpreter takes a while to begin.
        deadline = time.monotonic() + 0.25 + 0.05 * attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        if destination.exists():  # done, though perhaps killed on its way out
            break
        assert process.returncode == -signal.SIGKILL, errors
        with pytest.raises(CheckpointError):
            open_checkpoint(destination.with_name("killed.partial"))
    assert kills >= 3
    # Killed between the renaming of the folder and the removal of the journal, the journal stays; readers ignore it.
    (destination / "journal.json").unlink(missing_ok=True)
    assert contents(destination) == contents(tmp_path / "straight")
    assert not destination.with_name("killed.partial").exists()


def test_ctrl_c_says_how_to_go_on(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from expertstream import cli
    from expertstream import convert as module

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module._Conversion, "_write_layer", interrupted)
    assert cli.main(["convert", str(hf_folder), str(tmp_path / "p")]) == 130
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["convert", str(hf_folder), str(tmp_path / "p")]) == 0


def test_no_space_is_said_before_anything_is_written(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 4096))
    with pytest.raises(ConvertError, match=r"needed, but only 4\.0 KiB free"):
        convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    assert not (tmp_path / "p").exists() and not (tmp_path / "p.partial").exists()


def test_a_disk_that_fills_up_loses_nothing(hf_folder: Path, pack_folder: Path, tmp_path: Path) -> None:
    """The kernel refuses bytes beyond a file size limit, as it would on a full disk."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (200000, {resource.RLIM_INFINITY}))\n"
        "from expertstream.cli import main\n"
        f"sys.exit(main(['convert', {str(hf_folder)!r}, {str(tmp_path / 'p')!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 7
    assert (
        os.strerror(errno.EFBIG) in result.stderr
        and "it resumes where it stopped" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "p").exists()
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    assert (tmp_path / "p" / "experts-00003.safetensors").read_bytes() == (
        pack_folder / "experts-00003.safetensors"
    ).read_bytes()


def test_what_cannot_be_converted(hf_folder: Path, pack_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is already a pack"):
        convert(pack_folder, tmp_path / "p", BitPolicy(), threads=1)
    with pytest.raises(ConvertError, match="already exists"):
        convert(hf_folder, tmp_path, BitPolicy(), threads=1)
    with pytest.raises(ConvertError, match="no such folder"):
        convert(hf_folder, tmp_path / "a" / "b", BitPolicy(), threads=1)


def test_other_settings_do_not_mix(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertstream import convert as module

    monkeypatch.setattr(module._Conversion, "_finish", lambda self, journal: None)
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    monkeypatch.undo()
    with pytest.raises(ConvertError, match="was started from another source or with other settings"):
        convert(hf_folder, tmp_path / "p", BitPolicy(8), threads=1)


def test_odd_sizes_keep_what_cannot_be_quantized(tmp_path: Path) -> None:
    config = oracle.config_of(**oracle.CONFIGS["odd sizes"])
    source = oracle.save_hf(tmp_path / "s", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    with pytest.raises(ConvertError, match="is not a multiple of 32; use bits=16"):
        convert(source, tmp_path / "p", BitPolicy(), threads=1)
    convert(source, tmp_path / "q", BitPolicy(16), threads=1)
    tokens = oracle.random_tokens(config, 20)
    with LLM(tmp_path / "q", memory="64MiB", context_length=64) as llm:
        assert np.isfinite(oracle.our_logits(llm, tokens)).all()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.mlp.experts.down_proj", "layer 1, expert 0"),
        ("model.layers.1.mlp.gate.weight", "tensor model.layers.1.mlp.gate.weight"),
        ("model.layers.1.input_layernorm.weight", "tensor model.layers.1.input_layernorm.weight"),
        ("model.layers.0.linear_attn.A_log", "tensor model.layers.0.linear_attn.A_log"),
        ("lm_head.weight", "tensor lm_head.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e36])
def test_values_that_are_not_numbers_are_refused(
    hf_folder: Path, tmp_path: Path, name: str, where: str, value: float
) -> None:
    tensors = load_file(hf_folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    folder = oracle.save(tmp_path / "nan", SMALL, tensors)
    with pytest.raises(CheckpointError, match=f"{where}: has values that are not finite"):
        convert(folder, tmp_path / "p", BitPolicy(), threads=1)
    assert not (tmp_path / "p").exists()


def test_two_conversions_do_not_mix(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from expertstream import convert as module

    def second(self: Any, journal: Any) -> None:
        with pytest.raises(ConvertError, match="another process is converting to this destination"):
            convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
        finish(self, journal)

    finish = module._Conversion._finish
    monkeypatch.setattr(module._Conversion, "_finish", second)
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    assert open_checkpoint(tmp_path / "p").kind == "pack"


@pytest.mark.parametrize("harm", ["remove", "truncate", "trunk"])
def test_resuming_looks_at_the_files(
    hf_folder: Path, pack_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    from expertstream import convert as module

    monkeypatch.setattr(module._Conversion, "_finish", lambda self, journal: None)
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    monkeypatch.undo()
    work = tmp_path / "p.partial"
    if harm == "remove":
        (work / "experts-00001.safetensors").unlink()
    else:
        os.truncate(work / ("trunk.safetensors" if harm == "trunk" else "experts-00002.safetensors"), 5000)
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    assert contents(tmp_path / "p").keys() == contents(pack_folder).keys()
    for name, content in contents(pack_folder).items():
        assert name == "expertstream.json" or contents(tmp_path / "p")[name] == content, name


def test_a_rename_that_fails_loses_no_work(hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "p.partial":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConvertError, match="Directory not empty"):
        convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    monkeypatch.undo()
    from expertstream import convert as module

    monkeypatch.setattr(module._Conversion, "_write_layer", lambda *args: pytest.fail("work was done again"))
    convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)
    assert not (tmp_path / "p" / "journal.json").exists()


def test_a_damaged_journal_is_named(hf_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.partial").mkdir()
    for text in ("nope", "{}", "[]", '{"layers": {"0": 3}, "files": {}}'):
        (tmp_path / "p.partial" / "journal.json").write_text(text)
        with pytest.raises(ConvertError, match=r"journal.json: damaged; remove .*p.partial to start over"):
            convert(hf_folder, tmp_path / "p", BitPolicy(), threads=1)


def test_a_source_without_a_tokenizer_is_refused_at_once(hf_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(hf_folder, tmp_path / "s"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="missing tokenizer"):
        convert(folder, tmp_path / "p", BitPolicy(), threads=1)
    assert not (tmp_path / "p.partial").exists()


def test_memory_stays_small(tmp_path: Path) -> None:
    """A 400 MB checkpoint through a process that may have 300 MB beyond what it starts with."""
    config = oracle.config_of(vocab_size=200000, hidden_size=512, num_hidden_layers=1, layer_types=["linear_attention"], tie_word_embeddings=True,
                              num_experts=160, moe_intermediate_size=512)  # fmt: skip
    source = oracle.save_hf(tmp_path / "s", config, oracle.make_oracle(config, torch.bfloat16), torch.bfloat16)
    code = (
        "import resource, sys\n"
        "from expertstream.convert import convert\n"
        "from expertstream.checkpoint.quantize import BitPolicy\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"convert({str(source)!r}, {str(tmp_path / 'p')!r}, BitPolicy(), 2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 300 * 1024, f"{grown} KiB"


def test_layouts_of_a_pack_are_one_range(pack_folder: Path) -> None:
    checkpoint = open_checkpoint(pack_folder)
    for layout in expert_layouts(config_of(checkpoint), checkpoint):
        assert len(layout.lengths) == 1 and layout.checksums is not None
