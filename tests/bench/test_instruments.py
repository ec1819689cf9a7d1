"""The instruments give numbers of the right kind, remember what they should, and draw. No test asserts a speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM, UsageError, _native
from expertstream.bench.costs import token_cost
from expertstream.bench.kernels import bench_kernels
from expertstream.bench.machine import (
    DiskRate,
    arithmetic_peak,
    best_setting,
    disk_rates,
    memory_bandwidth,
    remember,
    thread_counts,
)
from expertstream.bench.plan import Machine, advice, hit_rate_of, load_model, predict
from expertstream.bench.profile import PHASES, Profiler
from expertstream.bench.speed import bench_decode, bench_prefill
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.cli import main
from expertstream.engine import embedded_model
from expertstream.user_files import IoSettings


def test_machine_rates() -> None:
    assert thread_counts(1) == [1] and thread_counts(6) == [1, 2, 4, 6]
    assert 1e8 < memory_bandwidth(2, 64 << 20) < 1e13
    for isa in _native.available_isas():
        assert 1e7 < arithmetic_peak(1, isa) < 1e14


def test_disk_rates_of_a_pack_and_of_any_folder(pack_folder: Path, tmp_path: Path) -> None:
    seen: list[DiskRate] = []
    rates = disk_rates(pack_folder, 4096, depths=(1, 4), splits=(256 << 10, 1 << 20), seconds=0.02, report=seen.append)
    assert seen == rates and {r.queue_depth for r in rates} == {1, 4} and all(r.bytes_per_second > 0 for r in rates)
    assert any(r.direct for r in rates) and any(not r.direct for r in rates)
    assert disk_rates(tmp_path, 1 << 20, depths=(2,), splits=(), seconds=0.02)[0].bytes_per_second > 0
    assert list(tmp_path.iterdir()) == []  # what it wrote is gone
    with pytest.raises(UsageError, match="no such file or folder"):
        disk_rates(tmp_path / "none", 4096)


def test_the_best_setting_is_the_least_that_is_nearly_best() -> None:
    def rate(depth: int, value: float) -> DiskRate:
        return DiskRate(True, depth, 256 << 10, 1 << 20, value)

    assert best_setting([rate(1, 10), rate(8, 96), rate(32, 100)]).queue_depth == 8


def test_what_bench_io_finds_is_used_later(
    pack_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert IoSettings.load(pack_folder) == IoSettings()
    assert "12 reads of 512 KiB" in remember(pack_folder, [DiskRate(True, 12, 512 << 10, 4096, 2e9)])
    assert IoSettings.load(pack_folder) == IoSettings(12, 512 << 10, 2e9)
    with LLM(pack_folder, memory="64MiB", context_length=256) as llm:
        llm.model(np.arange(40), llm.session().cache)
        assert max(layer.max_in_flight for layer in llm.experts.stats.layers) <= 12
    # What cannot be read, or makes no sense, is as if nothing had been kept.
    for text in (
        "",
        "[]",
        '{"1": 2}',
        json.dumps({str(pack_folder.stat().st_dev): {"queue_depth": 0, "split_bytes": 1, "bytes_per_second": 1}}),
    ):
        (tmp_path / "expertstream" / "io.json").write_text(text)
        assert IoSettings.load(pack_folder) == IoSettings()


def test_kernels_are_compared_with_plain_c() -> None:
    rows = bench_kernels(1, tokens=(1,))
    assert {row["isa"] for row in rows} == set(_native.available_isas())
    assert all(row["same_bits"] and row["roofline_share"] > 0 for row in rows)


def test_costs_are_what_the_model_touches(pack_folder: Path) -> None:
    with LLM(pack_folder, memory="64MiB", context_length=256) as llm:
        model = load_model(str(pack_folder), 0, BitPolicy())
        c = llm.model_config
        embedding = c.vocab_size * c.hidden_size * (1 + 4 / 64)
        vectors = llm.plan.trunk_bytes - model.trunk_bytes
        assert 0 < vectors < 0.2 * llm.plan.trunk_bytes  # norms and convolutions, which the cost leaves out
        assert model.cost.trunk_bytes == model.trunk_bytes - embedding
        assert model.cost.experts == 4 * 3 and model.cost.expert_bytes == 3 * 128 * 64 * 4.5 / 8
        assert token_cost(c, {"model.embed_tokens": _head(c), "lm_head": _head(c)}, 10, top_k=1).experts == 4


def _head(c: Any) -> Any:
    from expertstream.formats import Affine

    return Affine(c.vocab_size, c.hidden_size, 8, 64, "bf16")


def test_decode_and_prefill_benches(pack_folder: Path) -> None:
    rows = bench_decode(pack_folder, (0.1, 1.0), (16, 128), tokens=8)
    assert [(row["fraction"], row["context"]) for row in rows] == [(0.1, 16), (0.1, 128), (1.0, 16), (1.0, 128)]
    assert (
        rows[0]["hit_rate"] < 1
        and rows[0]["read_bytes_per_token"] > 0
        and rows[-1]["hit_rate"] == 1
        and rows[-1]["read_bytes_per_token"] == 0
    )
    assert all(row["warm_tps"] > 0 and row["cold_tps"] > 0 and row["memory_limit_tps"] > 0 for row in rows)
    rows = bench_prefill(pack_folder, (1.0,), (64,))
    assert rows[0]["read_bytes"] == 0 and rows[0]["warm_tps"] > 0 and 0 < rows[0]["peak_share"] < 1


def test_predictions_follow_the_arithmetic() -> None:
    machine = Machine(30e9, 2e9, 400e9)
    model = load_model("35b-a3b", 0, BitPolicy())
    assert model.model_bytes == pytest.approx(20.7e9, rel=0.02) and model.cost.bytes == pytest.approx(2.6e9, rel=0.05)
    small, half, whole = (predict(model, machine, size << 30) for size in (4, 10, 40))
    assert small is not None and half is not None and whole is not None
    assert whole.hit_rate == 1 and whole.missed_bytes == 0 and whole.bound == "memory"
    assert whole.decode_tps == pytest.approx(0.93 * 30e9 / (model.cost.bytes + 1024 * model.cost.kv_bytes), rel=1e-6)
    assert small.decode_tps < half.decode_tps < whole.decode_tps and small.bound == "disk"
    assert predict(model, machine, 1 << 30) is None
    uniform = predict(model, machine, 10 << 30, routing="uniform")
    assert uniform is not None and uniform.hit_rate < half.hit_rate
    # With most experts missing, a disk twice as fast helps nearly twofold.
    helps = dict(advice(model, machine, 4 << 30, routing="uniform"))
    assert 1.5 < helps["a disk twice as fast"] < 2 and helps["twice the memory"] > 1
    assert (
        hit_rate_of(0.25, "real") == 0.74 and hit_rate_of(0.25, "uniform") == 0.25 and hit_rate_of(1.0, "real") == 1.0
    )


def test_a_profile_covers_the_time_and_can_be_drawn(pack_folder: Path, tmp_path: Path) -> None:
    profiler = Profiler()
    plain = LLM(pack_folder, memory="64MiB", context_length=256)
    with plain, LLM(pack_folder, memory="64MiB", context_length=256, instrument=profiler.instrument) as llm:
        profiler.watch(llm)
        cache, other = llm.session().cache, plain.session().cache
        tokens = np.arange(40)
        assert np.array_equal(llm.model(tokens, cache, prompt=True), plain.model(tokens, other, prompt=True))
        for token in range(5):
            assert np.array_equal(llm.model(np.array([token]), cache), plain.model(np.array([token]), other))
    phases = profiler.phases(decode=True)
    assert {"mix", "router", "shared", "experts", "head", "norm", "python"} <= set(phases) and set(phases) <= {
        *PHASES.values(),
        "head",
        "python",
    }
    total = sum(end - begin for begin, end, count in profiler.spans if count == 1) / 5
    assert sum(phases.values()) == pytest.approx(1000 * total) and all(value >= 0 for value in phases.values())
    assert profiler.selected is not None and profiler.selected.sum(1).min() >= 5 * 3
    profiler.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["layer"] for e in events if e["ph"] == "X" and e["tid"] == 2 and e["name"] == "route"} == {
        0,
        1,
        2,
        3,
    }
    heads = [e for e in events if e["ph"] == "X" and e["args"].get("phase") == "head"]
    assert len(heads) == 6 and {e["name"] for e in heads} == {"project"}  # one a forward pass
    assert "decode:" in profiler.table() and "prompt:" in profiler.table()


def test_reports_are_drawn(pack_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert (
        main(
            [
                "bench",
                "decode",
                str(pack_folder),
                "--budgets",
                "20,100",
                "--tokens",
                "4",
                "--json",
                str(tmp_path / "d.json"),
                "--csv",
                str(tmp_path / "d.csv"),
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "run",
                "--profile",
                str(tmp_path / "p.json"),
                "--max-tokens",
                "3",
                "--memory",
                "64MiB",
                "--context",
                "256",
                "--quiet",
                "Hello",
            ]
        )
        == 0
    )
    assert "decode:" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "d.json"), str(tmp_path / "p.json"), "--out", str(tmp_path / "out")]) == 0
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [
        "d-contexts.png",
        "d-hits.png",
        "d-speed.png",
        "p-experts.png",
        "p-phases.png",
        "p-timeline.png",
    ]
    assert (tmp_path / "out" / "index.html").read_text().count("data:image/png") == 6
    assert len((tmp_path / "d.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "decode"], "needs a checkpoint folder"),
        (["bench", "mem", "somewhere"], "takes no path"),
        (["bench", "decode", "/tmp", "--budgets", "0"], "--budgets must be a list"),
        (["bench", "decode", "/tmp", "--budgets", "a,b"], "--budgets must be a list"),
        (["bench", "decode", "/no/such"], "no such file or folder"),
        (["bench", "mem", "--json", "/tmp"], "is a folder"),
        (["run", "--profile", "/no/such/folder/x.json", "hi"], "an existing folder"),
        (["synth", "small", "/no/such/folder/x"], "no such folder"),
        (["bench", "mem", "--csv", "/no/such/folder/x.csv"], "no such folder"),
        (["synth", "nonsense", "/tmp/x"], "unknown geometry"),
        (["synth", "small", "/tmp/x", "--routing", "trace"], "must be given together"),
        (["synth", "small", "/tmp/x", "--routing", "trace", "--trace", "/no/such"], "not a routing trace"),
        (["plan", "35b", "--prompt", "0"], "--prompt from 1 to --context"),
        (["plan", "nonsense"], "unknown geometry"),
        (["report", "/no/such/file"], "cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("expertstream: ") and message in err and err.count("\n") == 1


def test_plan_speaks_and_gives_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(embedded_model())
    assert main(["plan", model, "--memory", "1MiB", "--memory", "200MiB", "--context", "512", "--prompt", "128"]) == 0
    out = capsys.readouterr().out
    assert "too small" in out and "would speed up" in out
    assert main(["plan", "small", "--memory", "300MiB", "--json", "--disk", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predictions"][0]["decode_tps"] > 0 and found["machine"]["disk_rate"] > 0
