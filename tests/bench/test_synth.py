"""Synthetic models: sizes as named, weights that keep a model alive, routing as asked, and a GGUF twin that holds the same values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM, UsageError
from expertstream.bench.geometry import GEOMETRIES, geometry_config
from expertstream.bench.speed import bench_decode, read_trace
from expertstream.bench.synth import write_synthetic
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.checkpoint.reader import open_checkpoint
from expertstream.cli import main
from expertstream.models import config_of, expert_layouts, read_config, weight_map

from ..models.test_architectures import CASES
from ..oracle import dequantize_expert

TINY: dict[str, Any] = {
    **GEOMETRIES["small"], "hidden_size": 128, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 512,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_attention_heads": 4, "head_dim": 32,
    "linear_value_head_dim": 32, "linear_key_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
TWIN = BitPolicy(4, 32, 8, symmetric=True)


def test_geometries_have_the_published_sizes() -> None:
    bytes_at_4_bits = {
        "qwen3.5-397b-a17b": 217e9,
        "qwen3.5-122b-a10b": 65e9,
        "qwen3.5-35b-a3b": 18e9,
        "2.4t": 1.33e12,
        "Qwen3.6-35B-A3B": 18e9,
    }
    for name, expected in bytes_at_4_bits.items():
        c = read_config(geometry_config(name), name)
        experts = c.num_hidden_layers * c.num_experts * 3 * c.hidden_size * c.moe_intermediate_size * 4.5 / 8
        assert experts == pytest.approx(expected, rel=0.02)
    assert geometry_config("397b") == geometry_config("qwen3.5-397b-a17b")
    assert geometry_config("35b", 6)["layer_types"].count("full_attention") == 1
    with pytest.raises(UsageError, match=r"unknown geometry 'qwen'; give one of qwen3\.8-2\.4t-a95b"):
        geometry_config("qwen")
    with pytest.raises(UsageError, match=r"--layers must be from 1 to 40, .*; got 41"):
        geometry_config("35b", 41)


def test_a_config_json_is_a_geometry(pack_folder: Path) -> None:
    config = geometry_config(str(pack_folder))
    assert "quantization" not in config and config["num_experts"] == 24
    assert geometry_config(str(pack_folder / "config.json")) == config


@pytest.mark.parametrize("policy", [BitPolicy(), BitPolicy(2, 32, 16), TWIN], ids=["affine", "2 bits", "symmetric"])
def test_a_synthetic_model_runs_and_stays_alive(tmp_path: Path, policy: BitPolicy) -> None:
    config = {**geometry_config("small", 8), "vocab_size": 2048}
    size = write_synthetic(tmp_path / "m", config, policy)
    assert size == sum(file.stat().st_size for file in (tmp_path / "m").iterdir())
    rng = np.random.default_rng(0)
    with LLM(tmp_path / "m", memory="1GiB", context_length=512) as llm:
        logits = llm.model(rng.integers(0, 2048, 300), llm.session().cache, all_logits=True, prompt=True)
        # Neither dead nor exploding, and other tokens give other logits.
        assert 0.3 < logits.std() < 30 and np.corrcoef(logits[10], logits[200])[0, 1] < 0.9
        assert llm.generate is not None and len(list(llm.generate("a", max_tokens=4))) >= 1


@pytest.mark.parametrize(("routing", "low", "high"), [("uniform", 0.6, 1.0), ("zipf", 0.1, 0.5)])
def test_routing_is_what_was_asked(tmp_path: Path, routing: str, low: float, high: float) -> None:
    """How many experts it would take, if all were chosen alike, to be as spread as the choices are; as a share of all."""
    config = {**geometry_config("small", 4), "vocab_size": 2048}
    write_synthetic(tmp_path / "m", config, routing=routing)
    counts = np.zeros((4, config["num_experts"]))
    with LLM(tmp_path / "m", memory="1GiB", context_length=1100) as llm:
        real = llm.experts.fetch

        def counted(layer: int, experts: list[int], prompt: bool) -> Any:
            counts[layer, experts] += 1
            return real(layer, experts, prompt)

        llm.experts.fetch = counted  # type: ignore[method-assign]
        llm.experts.resident_block = lambda layer, experts: None  # type: ignore[method-assign]
        cache = llm.session().cache
        for token in np.random.default_rng(0).integers(0, 2048, 400):
            llm.model(np.array([token]), cache)
    share = counts / counts.sum(1, keepdims=True)
    effective = 1 / (share**2).sum(1) / config["num_experts"]  # 1: all alike
    assert (effective > low).all() and (effective < high).all(), effective


def test_a_recorded_trace_is_followed(tmp_path: Path) -> None:
    """A trace that walks through two disjoint halves of the experts, each token using what the last one used: all hits but at the turn."""
    rows = np.array([[[0, 1]] * 4] * 30 + [[[8, 9]] * 4] * 30)
    np.savez(tmp_path / "t.npz", experts=rows)
    write_synthetic(tmp_path / "m", TINY, routing="trace", trace=tmp_path / "t.npz")
    row = bench_decode(tmp_path / "m", (0.5,), (16,), tokens=20)[0]
    assert row["hit_rate"] == 1.0
    for bad, message in (
        (np.zeros((3, 4, 2)), "distinct numbers"), (np.zeros((3, 4)), r"shape \(tokens"), (np.tile([98, 99], (3, 4, 1)), "less than 16; got 99"),
    ):  # fmt: skip
        np.savez(tmp_path / "bad.npz", experts=bad)
        with pytest.raises(UsageError, match=message):
            read_trace(tmp_path / "bad.npz", read_config(TINY, ""))
    with pytest.raises(UsageError, match="not a routing trace"):
        read_trace(tmp_path / "none.npz", read_config(TINY, ""))


def test_a_gguf_twin_holds_the_same_values(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_synthetic(tmp_path / "m", TINY, TWIN, gguf=tmp_path / "m.gguf", seed=3)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    checkpoint = open_checkpoint(tmp_path / "m")
    c = config_of(checkpoint)
    specs = weight_map(c)

    def ours(name: str) -> np.ndarray:
        w = checkpoint.weight(name, specs[name])
        return w.format.dequantize(w.parts)

    # Value heads change places: theirs pairs head h with key head h mod 2, ours with h div 2.
    heads = np.array([0, 2, 1, 3])
    rows = (heads[:, None] * 32 + np.arange(32)).ravel()
    layer = "model.layers.0"
    qkv = ours(f"{layer}.linear_attn.in_proj_qkv")
    assert np.array_equal(theirs["blk.0.attn_qkv.weight"], np.concatenate([qkv[:128], qkv[128:][rows]]))
    assert np.array_equal(theirs["blk.0.attn_gate.weight"], ours(f"{layer}.linear_attn.in_proj_z")[rows])
    assert np.array_equal(theirs["blk.0.ssm_out.weight"], ours(f"{layer}.linear_attn.out_proj")[:, rows])
    assert np.array_equal(theirs["blk.0.ssm_beta.weight"], ours(f"{layer}.linear_attn.in_proj_b")[heads])
    a_log = checkpoint.vector(f"{layer}.linear_attn.A_log", specs[f"{layer}.linear_attn.A_log"])
    assert np.allclose(theirs["blk.0.ssm_a"], -np.exp(a_log)[heads], rtol=1e-6)
    assert np.array_equal(theirs["blk.3.attn_q.weight"], ours("model.layers.3.self_attn.q_proj"))
    assert np.array_equal(theirs["token_embd.weight"], ours("model.embed_tokens"))
    assert np.array_equal(
        theirs["output_norm.weight"], checkpoint.vector("model.norm.weight", specs["model.norm.weight"])
    )
    layout = expert_layouts(c, checkpoint)[2]
    for part, values in zip(("gate", "up", "down"), dequantize_expert(layout, 5)[0], strict=True):
        assert np.array_equal(theirs[f"blk.2.ffn_{part}_exps.weight"][5], values)
    # A tensor of theirs that we do not name would be left at nothing.
    assert len(theirs) == 3 + 4 * 10 + 3 * 9 + 6


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="symmetric groups of 32"):
        write_synthetic(tmp_path / "m", TINY, BitPolicy(), gguf=tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="cannot be quantized"):
        write_synthetic(tmp_path / "m", {**TINY, "moe_intermediate_size": 40})
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        write_synthetic(tmp_path / "m", TINY)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_every_architecture_can_be_synthesized_planned_and_measured(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**CASES[name], "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["synth", str(tmp_path / "config.json"), str(tmp_path / "m")]) == 0
    rows = bench_decode(tmp_path / "m", (0.3, 1.0), (16, 1500), tokens=8)
    assert len(rows) == 4 and all(row["median_tps"] > 0 for row in rows) and rows[-1]["hit_rate"] == 1
    with LLM(tmp_path / "m", memory="64MiB", context_length=512) as llm:
        logits = llm.model(np.arange(1, 100), llm.session().cache, all_logits=True)
        assert np.isfinite(logits).all() and len(set(logits.argmax(-1).tolist())) > 5
    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert main(["plan", str(tmp_path / "m"), "--context", "512", "--prompt", "64", "--threads", "1"]) == 0
    assert config["model_type"] in capsys.readouterr().out
