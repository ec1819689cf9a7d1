"""What plan and bench say of a machine with a GPU. No test asserts a speed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertstream import UsageError
from expertstream.bench import card as cards
from expertstream.bench import machine, speed
from expertstream.bench.card import Card, measure_card
from expertstream.bench.machine import DiskRate
from expertstream.bench.plan import Machine, advice, load_model, predict
from expertstream.bench.speed import bench_decode, bench_prefill, decode_header, describe_decode, describe_prefill
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.cli import main
from expertstream.cuda import driver as drivers
from expertstream.cuda.driver import Driver

H100 = Card("H100", 79 << 30, 2.9e12, 53e9, 73e12, 55e-6)


@pytest.fixture(autouse=True)
def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Device 0 is the GPU of these tests, emulated or not."""
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    monkeypatch.setattr(drivers, "device_count", lambda: 1)
    yield driver


def test_a_card_is_measured(driver: Driver) -> None:
    found = measure_card(0, size=1 << 20, width=128, tokens=32)
    assert found.name == driver.name and found.free_bytes > 1 << 30
    for rate in (found.memory_rate, found.link_rate, found.arithmetic_rate):
        assert 1e5 < rate < 1e15
    assert 1e-7 < found.layer_seconds < 10


def test_predictions_with_a_gpu_follow_the_arithmetic() -> None:
    host, model = Machine(118e9, 2e9, 2e12), load_model("35b-a3b", 0, BitPolicy(trunk_bits=4))

    def predicted(memory: int, vram: int, **changes: float) -> float:
        found = predict(model, host, memory << 30, card=Card(**{**vars(H100), **changes}), vram_bytes=vram << 30)
        assert found is not None
        return found.decode_tps

    # Measured with this card after 1,024 tokens: 269 with everything on it, 140 with 8 GiB of it and 69 % of the uses there (docs/gpu.md).
    assert predicted(60, 40) == pytest.approx(269, rel=0.1)
    assert predicted(60, 8) == pytest.approx(140, rel=0.25)
    assert predicted(60, 8) < predicted(60, 12) < predicted(60, 40)
    assert predicted(60, 40, link_rate=1e9) == predicted(60, 40)  # nothing crosses it
    assert predicted(6, 8) < predicted(60, 8)  # some come from the disk
    found = predict(model, host, 60 << 30, card=H100, vram_bytes=8 << 30)
    assert found is not None and found.bound in ("GPU", "link", "memory") and 0 < found.vram_experts < 40 * 256
    assert predict(model, host, 60 << 30, card=H100, vram_bytes=1 << 30) is None
    helps = dict(advice(model, host, 60 << 30, card=H100, vram_bytes=8 << 30))
    assert helps["twice the GPU's memory"] > 1.2 and helps["a disk twice as fast"] == 1


def test_plan_knows_the_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cards, "measure_card", lambda number: H100)
    monkeypatch.setattr(machine, "disk_rates", lambda *_, **__: [DiskRate(True, 16, 1 << 18, 1 << 20, 2e9)])
    monkeypatch.setattr(machine, "memory_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(machine, "arithmetic_peak", lambda threads: 2e11)
    assert main(["plan", "35b-a3b", "--memory", "20GiB", "--vram", "8GiB"]) == 0
    text = capsys.readouterr().out
    assert "H100: memory 2900 GB/s, link 53.0 GB/s" in text and "on GPU" in text and "8.0 GiB of 79.0 GiB" in text
    assert main(["plan", "35b-a3b", "--memory", "20GiB", "--device", "cuda", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["card"]["link_rate"] == 53e9 and found["predictions"][0]["vram_experts"] == 40 * 256
    assert main(["plan", "35b-a3b", "--memory", "20GiB", "--device", "cpu"]) == 0
    assert "on GPU" not in capsys.readouterr().out
    assert main(["plan", "35b-a3b", "--vram", "8GiB", "--device", "cpu"]) == 2
    assert "--vram needs a GPU" in capsys.readouterr().err


def test_benches_on_a_gpu(
    pack_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "rates_of", lambda ops, **_: H100)
    monkeypatch.setattr(speed, "memory_bandwidth", lambda threads: 20e9)
    monkeypatch.setattr(speed, "disk_rates", lambda *_, **__: [DiskRate(True, 16, 1 << 18, 1 << 20, 2e9)])
    options = {"device": "cuda", "memory": "1GiB", "threads": 1, "cpu_experts": "none"}
    rows = bench_decode(pack_folder, (0.3, 1.0), (16,), tokens=4, options=options)
    assert rows[0]["hit_rate"] < 1 and rows[0]["link_bytes_per_token"] > 0 and rows[0]["link_limit_tps"] < 1e12
    assert rows[1]["hit_rate"] == 1 and rows[1]["link_limit_tps"] == float("inf") and rows[1]["card"] == "H100"
    assert f" {rows[0]['link_limit_tps']:7.1f} " in describe_decode(rows[0]) and "link" in decode_header(True)
    rows = bench_prefill(pack_folder, (0.3,), (64,), options)
    assert rows[0]["link_bytes"] > 0 and rows[0]["read_bytes"] == 0 and " s " in describe_prefill(rows[0])
    (tmp_path / "trace.npz").write_bytes(b"")
    monkeypatch.setattr(speed, "TRACE", "trace.npz")
    with pytest.raises(UsageError, match="use --device cpu"):
        bench_decode(tmp_path, (0.3,), (16,), options=options)
    assert main(["bench", "decode", str(pack_folder), "--device", "cpu", "--memory", "1GiB"]) == 2
    assert "--memory is for a GPU" in capsys.readouterr().err
