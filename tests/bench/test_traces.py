"""Routing traces and what is replayed on them, on the embedded model's own trace and on ones made to show a difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream import UsageError
from expertstream.bench.traces import BELADY, Trace, hit_rate, load_trace, record, save_trace
from expertstream.cli import main
from expertstream.config import POLICIES
from expertstream.engine import LLM, embedded_model
from expertstream.experts.cache import ExpertCache

DATA = Path(__file__).parent.parent / "data"


def trace_of(rows: list[list[int]], num_experts: int = 16) -> Trace:
    return Trace(np.sort(np.array(rows, np.int64))[:, None], np.zeros(1, np.int64), num_experts)


@pytest.fixture(scope="module")
def recorded() -> Trace:
    return load_trace(DATA / "embedded-trace.npz")


def test_the_recorded_trace_is_of_the_embedded_model(recorded: Trace) -> None:
    config = json.loads((embedded_model() / "config.json").read_text())
    _, layers, top_k = recorded.experts.shape
    assert (layers, top_k, recorded.num_experts) == (
        config["num_hidden_layers"], config["num_experts_per_tok"], config["num_experts"]
    )  # fmt: skip
    assert len(recorded.starts) > 5


@pytest.mark.parametrize("slots", [3, 6, 12, 24, 36])
def test_real_routing_no_policy_beats_the_optimum(recorded: Trace, slots: int) -> None:
    best = hit_rate(recorded, BELADY, slots)
    rates = {name: hit_rate(recorded, name, slots) for name in POLICIES}
    assert max(rates.values()) <= best, rates
    # A cache that could hold them at random would have this share; real routing repeats itself.
    assert min(rates["lru"], rates["lfu"]) > slots / recorded.num_experts or slots < 4, rates


def test_more_slots_never_hurt_lru(recorded: Trace) -> None:
    rates = [hit_rate(recorded, "lru", slots) for slots in (4, 8, 16, 32, 48)]
    assert rates == sorted(rates)
    first = sum(len(np.unique(recorded.experts[:, layer])) for layer in range(recorded.experts.shape[1]))
    assert rates[-1] == pytest.approx(1 - first / recorded.experts.size)  # only the first use of each is missed


@given(
    rows=st.lists(st.sets(st.integers(0, 7), min_size=2, max_size=2).map(sorted), min_size=1, max_size=12),
    capacity=st.integers(1, 4),
)
def test_belady_is_the_best_there_is(rows: list[list[int]], capacity: int) -> None:
    """Against every way to keep `capacity` of what is there after each token."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for row in rows:
        following: dict[frozenset[int], int] = {}
        for held, hits in best.items():
            got = hits + sum(expert in held for expert in row)
            everything = sorted(held | set(row))
            for mask in range(1 << len(everything)):
                kept = frozenset(e for i, e in enumerate(everything) if mask >> i & 1)
                if len(kept) <= capacity:
                    following[kept] = max(following.get(kept, -1), got)
        best = following
    assert hit_rate(trace_of(rows, 8), BELADY, capacity) == max(best.values()) / (2 * len(rows))


def test_a_scan_does_not_flush_s3fifo() -> None:
    """Two experts used again and again, and a long row of others used once: LRU forgets the two, S3-FIFO does not."""
    rows = [[0, 1]] * 6 + [[2 + i, 9 + i] for i in range(7)] + [[0, 1]]
    assert hit_rate(trace_of(rows), "s3fifo", 6) > hit_rate(trace_of(rows), "lru", 6)


def test_a_trace_comes_back(tmp_path: Path) -> None:
    trace = Trace(
        np.sort(np.random.default_rng(0).permuted(np.tile(np.arange(300), (9, 2, 1)), axis=-1)[..., :4]),
        np.array([0, 5]),
        300,
    )
    save_trace(tmp_path / "t.npz", trace)
    again = load_trace(tmp_path / "t.npz")
    assert np.array_equal(again.experts, trace.experts) and again.starts.tolist() == [0, 5] and again.num_experts == 300


def test_json_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"tok": 1, "layers": [[3, 1], [0, 2]]}\n{"tok": 2, "layers": [[1, 9], [0, 4]]}\n'
    )
    trace = load_trace(tmp_path / "t.jsonl")
    assert trace.experts.tolist() == [[[3, 1], [0, 2]], [[1, 9], [0, 4]]] and trace.num_experts == 16


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"experts": np.zeros((2, 2), int)}, "tokens, layers, top-k"),
        ({"experts": np.zeros((2, 2, 2), int)}, "distinct numbers"),
        ({"experts": np.array([[[0, 9]]]), "num_experts": 4}, "0 to 3"),
        ({"experts": np.array([[[0, 1]]]), "starts": np.array([0, 7])}, "starts"),
        ({"other": np.zeros(3)}, "not a routing trace"),
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        load_trace(tmp_path / "t.npz")


def test_damaged_traces_are_refused(tmp_path: Path) -> None:
    whole = (DATA / "embedded-trace.npz").read_bytes()
    for name, content in (
        ("cut.npz", whole[: len(whole) // 2]), ("flipped.npz", whole[:3000] + bytes([whole[3000] ^ 255]) + whole[3001:]), ("empty.npz", b""),
        ("large.jsonl", b'{"layers": [[1, 1180591620717411303424]]}\n'), ("ragged.jsonl", b'{"layers": [[1, 2]]}\n{"layers": [[1]]}\n'),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="not a routing trace"):
            load_trace(tmp_path / name)


def test_what_is_recorded_is_what_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the cache was asked for, layer by layer; the cache holds all, so that every token asks at once."""
    asked: list[list[list[int]]] = [[] for _ in range(12)]
    real = ExpertCache.resident_block

    def noted(cache: ExpertCache, layer: int, experts: list[int]) -> Any:
        asked[layer].append(list(experts))
        return real(cache, layer, experts)

    monkeypatch.setattr(ExpertCache, "resident_block", noted)
    trace = record(embedded_model(), ["Hi"], chat=False, max_tokens=9, seed=1)
    assert trace.experts.shape[0] == 9  # one token of prompt; the last of nine is not read again
    for layer, rows in enumerate(asked):
        assert trace.experts[:, layer].tolist() == rows


def test_recording_sees_every_token_and_what_was_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Hello!", "What is the moon?"]
    trace = record(embedded_model(), prompts, chat=True, max_tokens=5, seed=3)
    with LLM(embedded_model()) as llm:
        first = sum(
            len(llm.tokenizer.encode(llm.tokenizer.apply_chat_template([{"role": "user", "content": p}])))
            for p in prompts[:1]
        )
        written = [
            [r.token for r in llm.chat([{"role": "user", "content": p}], max_tokens=5, seed=3 + i)]
            for i, p in enumerate(prompts)
        ]
    # The last token that is written is not read again.
    assert trace.starts.tolist() == [0, first + len(written[0]) - 1]
    (tmp_path / "p.txt").write_text("Hello!\n\nWhat is the moon?\n")
    out = str(tmp_path / "t.npz")
    assert (
        main(
            [
                "trace",
                str(embedded_model()),
                out,
                "--prompts",
                str(tmp_path / "p.txt"),
                "--max-tokens",
                "5",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    assert np.array_equal(load_trace(Path(out)).experts, trace.experts)
    assert main(["bench", "cache", out, "--csv", str(tmp_path / "c.csv")]) == 0
    assert "belady" in capsys.readouterr().out and (tmp_path / "c.csv").read_text().count("\n") == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trace", "/no/such", "/tmp/x.npz"], "no such"),
        (["trace", "MODEL", "/tmp/x.bin"], "must be an .npz file"),
        (["trace", "MODEL", "/no/such/x.npz"], "in an existing folder"),
        (["trace", "MODEL", "/tmp/x.npz", "--prompts", "/no/such"], "cannot be read"),
        (["trace", "MODEL", "/tmp/x.npz", "--max-tokens", "0"], "--max-tokens must be at least 1; got 0"),
        (["bench", "cache"], "needs a routing trace"),
        (["bench", "cache", "/dev/null"], "not a routing trace"),
        (["bench", "cache", "README.md"], "File is not a zip file"),
        (["trace", "MODEL", "/tmp/expertstream-none.npz", "--memory", "1MiB"], "at least --memory"),
    ],
)
def test_mistakes_are_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(embedded_model()) if a == "MODEL" else a for a in arguments])
    assert code in (2, 3, 5) and message in capsys.readouterr().err
    assert not Path("/tmp/expertstream-none.npz").exists()  # what could not be recorded leaves nothing behind
