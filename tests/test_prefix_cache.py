"""What is kept of prompts: the same bits with and without it, within its budgets, across restarts, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import LLM, ReadError, RequestError
from expertstream.generate import Forward
from expertstream.kv_cache import AttentionSpec, DeltaState, make_cache
from expertstream.ops import F32, I64
from expertstream.prefix_cache import PrefixCache, _below, snapshot_positions
from expertstream.state_file import StateFile, StateFileError, write_state

SMALL_BUDGET = 64 << 20


@pytest.fixture(scope="module")
def llm(pack_folder: Path) -> Iterator[LLM]:
    with LLM(pack_folder, context_length=2048, prefix_cache_bytes=SMALL_BUDGET, threads=2) as llm:
        yield llm


@pytest.fixture(autouse=True)
def forget(request: pytest.FixtureRequest) -> None:
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").keep_prefixes()


def prompt_of(length: int, seed: int = 1) -> I64:
    return np.random.default_rng(seed).integers(3, 300, length)


def logits_of(llm: LLM, tokens: I64, steps: int = 3) -> tuple[list[F32], int]:
    """The logits of every pass that gives a token, and how many tokens of the prompt were not read again."""
    generation = llm.session().steps(tokens, llm.sampling_params(temperature=0.0, max_tokens=steps))
    found, answer, cached = [], None, 0
    try:
        while True:
            step = generation.send(answer)
            answer = step.run(llm.model) if isinstance(step, Forward) else None
            if isinstance(step, Forward):
                last = answer
            else:
                found.append(last)
                cached = step.stats.cached_tokens
    except StopIteration:
        return found, cached


def without(llm: LLM, tokens: I64) -> list[F32]:
    prefixes, llm.prefixes = llm.prefixes, None
    try:
        return logits_of(llm, tokens)[0]
    finally:
        llm.prefixes = prefixes


def same(a: list[F32], b: list[F32]) -> bool:
    return len(a) == len(b) > 0 and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("length", [65, 128, 129, 700])
def test_the_same_prompt_again_is_read_from_its_last_whole_chunk(llm: LLM, length: int) -> None:
    tokens = prompt_of(length)
    expected = without(llm, tokens)
    first, cached = logits_of(llm, tokens)
    assert cached == 0 and same(first, expected)
    again, cached = logits_of(llm, tokens)
    assert cached == (length - 1) // 64 * 64 and same(again, expected)


def test_a_prompt_that_begins_like_others_goes_on_from_the_longest(llm: LLM) -> None:
    base = prompt_of(640)
    longer = np.concatenate([base, prompt_of(200, seed=2)])
    other = np.concatenate([base[:300], prompt_of(300, seed=3)])
    logits_of(llm, base)
    for tokens, least in ((longer, 576), (longer, 832), (other, 0), (other, 576)):
        expected = without(llm, tokens)
        found, cached = logits_of(llm, tokens)
        assert cached == least and same(found, expected)


def test_a_chat_goes_on_from_its_last_message(pack_folder: Path) -> None:
    with LLM(context_length=2048, prefix_cache_bytes=SMALL_BUDGET) as llm:
        messages: list[dict[str, Any]] = [{"role": "system", "content": "You answer in short sentences. " * 12}]
        shared = []
        for turn in ("What is the capital of France? " * 10, "And of Italy? " * 20, "Thank you."):
            messages.append({"role": "user", "content": turn})
            tokens = llm.tokenizer.encode(llm.tokenizer.apply_chat_template(messages))
            expected = without(llm, tokens)
            found, cached = logits_of(llm, tokens)
            assert same(found, expected)
            shared.append((cached, len(tokens)))
            messages.append({"role": "assistant", "content": "Paris, of course."})
        assert shared[0][0] == 0
        # All that was there in the turn before, but for less than two chunks: its last message's beginning, rounded down.
        assert all(0 <= before[1] - after[0] < 128 for before, after in pairwise(shared))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 320), st.integers(0, 2)), min_size=1, max_size=6))
@settings(max_examples=12, deadline=None)
def test_whatever_comes_before_the_answer_is_the_same(pack_folder: Path, prompts: list[tuple[int, int, int]]) -> None:
    with LLM(pack_folder, context_length=1024, prefix_cache_bytes=1 << 20, threads=2) as llm:
        for shared, length, seed in prompts:
            tokens = np.concatenate([prompt_of(64 * shared), prompt_of(length, seed=seed + 5)])
            assert same(logits_of(llm, tokens)[0], without(llm, tokens))
            assert llm.prefixes is not None and llm.prefixes.memory_bytes <= 1 << 20


def test_the_budget_holds_and_what_was_used_last_stays(pack_folder: Path) -> None:
    with LLM(pack_folder, context_length=1024, prefix_cache_bytes=300_000) as llm:
        prompts = [prompt_of(200, seed=i) for i in range(10)]
        for tokens in prompts:
            logits_of(llm, tokens)
            assert llm.prefixes is not None and 0 < llm.prefixes.memory_bytes <= 300_000
        assert logits_of(llm, prompts[-1])[1] == 192 and logits_of(llm, prompts[0])[1] == 0


def test_of_a_long_prompt_the_end_stays_when_memory_is_short(
    pack_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states in between go first, which are what a next turn needs least; they come back when somebody passes by again."""
    monkeypatch.setattr("expertstream.session.KEEP_EVERY", 128)
    tokens = prompt_of(900)
    with LLM(pack_folder, context_length=1024, prefix_cache_bytes=64 << 20) as llm:
        logits_of(llm, tokens)
        assert llm.prefixes is not None
        nodes = list(_below(llm.prefixes._root))
        rows = sum(sum(a.nbytes for a in n.arrays[: llm.prefixes._rows]) for n in nodes)
        states = (llm.prefixes.memory_bytes - rows) // len(nodes)
    with LLM(pack_folder, context_length=1024, prefix_cache_bytes=rows + 3 * states) as llm:
        expected = without(llm, tokens)
        logits_of(llm, tokens)
        assert llm.prefixes is not None and llm.prefixes.memory_bytes <= rows + 3 * states
        assert sum(n.whole for n in _below(llm.prefixes._root)) in (2, 3) and len(
            list(_below(llm.prefixes._root))
        ) == len(nodes)
        found, cached = logits_of(llm, tokens)
        assert cached == 896 and same(found, expected)
        branch = np.concatenate([tokens[:520], prompt_of(100, seed=8)])  # where it leaves, states were dropped
        expected = without(llm, branch)
        for _ in range(2):
            found, cached = logits_of(llm, branch)
            assert cached in (128, 512, 576) and same(found, expected)


def test_a_conversation_of_thousands_of_turns(tmp_path: Path) -> None:
    """A chain of nodes as long as that is walked without running out of stack."""
    cache = make_cache([AttentionSpec(1, 2)], 64 * 2200, "bf16")
    tokens = prompt_of(64 * 2100)
    prefixes = PrefixCache("x" * 40, 4 << 20, tmp_path, 400 << 10)
    for turn in range(1, 2000):
        cache.position, cache.keep = 64 * turn, frozenset({64 * turn})
        prefixes.insert(tokens[: 64 * turn + 1], cache)
    prefixes.flush()
    assert prefixes.restore(tokens, cache) > 64 * 1000 and 0 < prefixes.disk_bytes <= 400 << 10
    prefixes.close()
    PrefixCache("x" * 40, 4 << 20, tmp_path, 200 << 10).close()


def test_what_other_models_left_makes_room(tmp_path: Path) -> None:
    cache = make_cache([AttentionSpec(1, 64)], 256, "f32")
    for fingerprint, limit in (("a" * 40, 1 << 20), ("b" * 40, 150_000)):
        prefixes = PrefixCache(fingerprint, 1 << 20, tmp_path, limit)
        for seed in range(3):
            cache.position, cache.keep = 128, frozenset({128})
            prefixes.insert(prompt_of(200, seed), cache)
        prefixes.close()
    stale = tmp_path / ("b" * 32) / f".{'c' * 40}.state.99"
    stale.write_text("x")
    os.utime(stale, (0, 0))
    PrefixCache("b" * 40, 1 << 20, tmp_path, 150_000).close()
    left = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in left) <= 150_000 and not stale.exists()
    assert (tmp_path.stat().st_mode | (tmp_path / ("b" * 32)).stat().st_mode) & 0o007 == tmp_path.stat().st_mode & 0o007


def test_a_prefill_that_is_stopped_leaves_what_it_had(llm: LLM) -> None:
    tokens = prompt_of(1500)
    llm.prefill_chunk, before = 256, llm.prefill_chunk
    try:
        generation = llm.session().steps(tokens, llm.sampling_params(max_tokens=1))
        answer = None
        for _ in range(3):
            step = generation.send(answer)
            assert isinstance(step, Forward)
            answer = step.run(llm.model)
        generation.close()
    finally:
        llm.prefill_chunk = before
    resumed, cached = logits_of(llm, tokens)
    assert cached == 768  # three passes of 256
    again, cached = logits_of(llm, tokens)
    assert cached == 1472 and np.array_equal(again, resumed)
    llm.prefixes, kept = None, llm.prefixes
    try:
        assert np.array_equal(logits_of(llm, tokens)[0], resumed)
    finally:
        llm.prefixes = kept


def test_a_snapshot_at_the_end_of_a_pass_is_copied_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    original = DeltaState.copies

    def counted(self: DeltaState, position: int) -> list[F32]:
        copied.append(1)
        return original(self, position)

    monkeypatch.setattr(DeltaState, "copies", counted)
    monkeypatch.setattr("expertstream.session.KEEP_EVERY", 256)
    monkeypatch.setattr(llm, "prefill_chunk", 256)
    session = llm.session()
    list(session.generate(prompt_of(700), llm.sampling_params(max_tokens=1)))
    layers = sum(isinstance(layer, DeltaState) for layer in session.cache.layers)
    assert len(copied) == 3 * layers  # after 256, 512 and 640 tokens


def test_a_restarted_engine_reads_its_prefixes_from_disk(pack_folder: Path, tmp_path: Path) -> None:
    tokens = prompt_of(1000)
    longer = np.concatenate([tokens, prompt_of(300, seed=9)])
    options: dict[str, Any] = {"context_length": 2048, "prefix_cache_bytes": SMALL_BUDGET}
    with LLM(pack_folder, **options) as llm:
        llm.keep_prefixes(tmp_path / "kept", 1 << 30)
        expected = [without(llm, tokens), without(llm, longer)]
        logits_of(llm, tokens)
        logits_of(llm, longer)
    assert len(list((tmp_path / "kept").rglob("*.state"))) == 2
    with LLM(pack_folder, **options) as llm:
        llm.keep_prefixes(tmp_path / "kept", 1 << 30)
        found, cached = logits_of(llm, longer)
        assert cached == 1280 and same(found, expected[1])
        found, cached = logits_of(llm, tokens)
        assert cached == 960 and same(found, expected[0])
    with LLM(pack_folder, exact=True, **options) as llm:  # computes otherwise: these states are not its own
        llm.keep_prefixes(tmp_path / "kept", 1 << 30)
        assert logits_of(llm, tokens)[1] == 0


@pytest.mark.parametrize("damage", ["cut", "flip header", "flip data", "flip tokens", "foreign", "empty", "renamed"])
def test_a_damaged_file_is_warned_of_and_never_used(
    pack_folder: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt_of(500)
    options: dict[str, Any] = {"context_length": 1024, "prefix_cache_bytes": SMALL_BUDGET}
    with LLM(pack_folder, **options) as llm:
        llm.keep_prefixes(tmp_path, 1 << 30)
        expected = without(llm, tokens)
        logits_of(llm, tokens)
    (file,) = tmp_path.rglob("*.state")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[:-9]
    elif damage == "flip header":
        data[30] ^= 1
    elif damage == "flip data":
        data[len(data) // 2] ^= 1
    elif damage == "flip tokens":
        data[-3] ^= 1
    elif damage == "foreign":
        data = bytearray(b"hello")
    elif damage == "empty":
        data = bytearray()
    if damage == "renamed":
        file.rename(file.with_name("0" * 40 + ".state"))
    else:
        file.write_bytes(data)
    with LLM(pack_folder, **options) as llm, caplog.at_level(logging.WARNING, "expertstream"):
        llm.keep_prefixes(tmp_path, 1 << 30)
        found, cached = logits_of(llm, tokens)
        assert cached == 0 and same(found, expected)
    assert "is ignored" in caplog.text


def rewritten(file: Path, header: Any, arrays: bytes | None = None) -> None:
    """The file with another header, and checksums that are right: its writer is not to be trusted."""
    data = file.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    text = header(json.loads(data[12 : 12 + length])) if callable(header) else header
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    rest = data[20 + length :] if arrays is None else arrays
    file.write_bytes(data[:8] + len(text).to_bytes(4, "little") + text + xxhash.xxh3_64_digest(text) + rest)


def _array(**changes: Any) -> Any:
    return lambda header: {**header, "arrays": [*header["arrays"][:-1], {**header["arrays"][-1], **changes}]}


HEADERS: dict[str, Any] = {
    "no JSON": b"{" * 100,
    "deep": b"[" * 100_000,
    "not UTF-8": b'"\xff\xfe"',
    "a list": [],
    "null": None,
    "no arrays": {"position": 64, "parent": ""},
    "arrays of numbers": {"position": 64, "parent": "", "arrays": [1, 2]},
    "an empty list": {"position": 64, "parent": "", "arrays": []},
    "arrays are a dict": {"position": 64, "parent": "", "arrays": {"0": {}}},
    "objects": _array(dtype="object"),
    "dtype is a list": _array(dtype=["float32"]),
    "negative": _array(shape=[-1, -448]),
    "huge": _array(shape=[1 << 62]),
    "many dimensions": _array(shape=[1] * 100_000),
    "shape is a text": _array(shape="448"),
    "shape of floats": _array(shape=[448.0]),
    "shape of true": _array(shape=[448, True]),
    "no checksum": _array(xxh3=None),
    "position is a text": lambda header: {**header, "position": "448"},
    "position is huge": lambda header: {**header, "position": 1 << 70},
    "position is nan": lambda header: {**header, "position": float("nan")},
    "parent is a list": lambda header: {**header, "parent": ["x"]},
    "no parent": lambda header: {k: v for k, v in header.items() if k != "parent"},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_with_the_right_checksum_is_warned_of(
    llm: LLM, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt_of(500)
    llm.keep_prefixes(tmp_path, 1 << 30)
    logits_of(llm, tokens)
    assert llm.prefixes is not None
    llm.prefixes.flush()
    (file,) = tmp_path.rglob("*.state")
    rewritten(file, HEADERS[kind])
    with caplog.at_level(logging.WARNING, "expertstream"):
        llm.keep_prefixes(tmp_path, 1 << 30)
        assert logits_of(llm, tokens)[1] == 0
    assert "is ignored" in caplog.text


def test_sparse_arrays_take_no_memory(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a few blocks that says it is a terabyte, and is."""
    llm.keep_prefixes(tmp_path, 1 << 30)
    logits_of(llm, prompt_of(500))
    assert llm.prefixes is not None
    llm.prefixes.flush()
    (file,) = tmp_path.rglob("*.state")
    count = 1 << 37
    entry = {"dtype": "int64", "shape": [count], "xxh3": "0" * 16}
    rewritten(file, lambda header: {**header, "arrays": [entry]}, b"")
    os.truncate(file, file.stat().st_size + 8 * count)
    with caplog.at_level(logging.WARNING, "expertstream"):
        llm.keep_prefixes(tmp_path, 1 << 30)
    assert f"{count} tokens" in caplog.text


@pytest.mark.parametrize("where", ["keys", "states"])
def test_what_gives_no_numbers_is_forgotten_and_the_prompt_read_again(
    llm: LLM, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt_of(500)
    expected = without(llm, tokens)
    llm.keep_prefixes(tmp_path, 1 << 30)
    logits_of(llm, tokens)
    assert llm.prefixes is not None
    llm.prefixes.flush()
    (path,) = tmp_path.rglob("*.state")
    file = StateFile.open(path)
    entries = [(e["dtype"], tuple(e["shape"])) for e in file.header["arrays"]]
    arrays = file.read(0, len(entries), entries)
    at = next(i for i, (dtype, _) in enumerate(entries) if dtype == {"keys": "uint16", "states": "float32"}[where])
    arrays[at].reshape(-1)[:] = 0x7FC0 if where == "keys" else np.nan
    write_state(path, {k: v for k, v in file.header.items() if k != "arrays"}, arrays)
    with caplog.at_level(logging.WARNING, "expertstream"):
        llm.keep_prefixes(tmp_path, 1 << 30)
        found, cached = logits_of(llm, tokens)
    assert cached == 0 and same(found[-3:], expected) and "a cached prefix is" in caplog.text
    found, cached = logits_of(llm, tokens)
    assert cached == 448 and same(found, expected)


def test_no_numbers_from_a_prompt_that_was_read_whole_are_not_kept(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = prompt_of(500)
    generation = llm.session().steps(tokens, llm.sampling_params(max_tokens=1))
    step = next(generation)
    assert isinstance(step, Forward)
    with pytest.raises(ReadError, match="not finite"):
        generation.send(step.run(llm.model) * np.float32(np.nan))
    assert logits_of(llm, tokens)[1] == 0


def test_the_disk_budget_holds(pack_folder: Path, tmp_path: Path) -> None:
    with LLM(pack_folder, context_length=1024, prefix_cache_bytes=SMALL_BUDGET) as llm:
        llm.keep_prefixes(tmp_path, 400_000)
        for i in range(8):
            logits_of(llm, prompt_of(200, seed=i))
        assert llm.prefixes is not None
        llm.prefixes.flush()
        sizes = sum(f.stat().st_size for f in tmp_path.rglob("*.state"))
        assert 0 < sizes <= 400_000 and sizes == llm.prefixes.disk_bytes


def test_a_session_goes_on_where_it_was_saved(pack_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "session"
    with LLM(pack_folder, context_length=512) as llm:
        session = llm.session()
        params = llm.sampling_params(temperature=0.0, max_tokens=5)
        list(session.generate(prompt_of(100), params))
        session.save(file)
        expected = [p.token for p in session.generate(prompt_of(10, seed=4), params)]
        other = llm.session()
        other.load(file)
        assert [p.token for p in other.generate(prompt_of(10, seed=4), params)] == expected
    with LLM(pack_folder, context_length=512, kv_dtype="f32") as llm, pytest.raises(RequestError, match="another"):
        llm.session().load(file)
    with LLM(pack_folder, context_length=64) as llm, pytest.raises(RequestError, match="do not fit"):
        llm.session().load(file)
    with LLM(pack_folder, context_length=512) as llm:
        session, whole = llm.session(), file.read_bytes()
        for change in (
            {"unread": "12"}, {"unread": [True]}, {"unread": [1 << 40]}, {"position": -1}, {"position": "9"}, {"of": None}, {"arrays": []},
        ):  # fmt: skip
            rewritten(file, lambda header, change=change: {**header, **change})
            with pytest.raises(RequestError, match="cannot be used"):
                session.load(file)
            assert session.cache.position == 0
            file.write_bytes(whole)
        file.write_bytes(whole[:-1])
        with pytest.raises(RequestError, match="truncated"):
            session.load(file)
        assert session.cache.position == 0


@given(st.integers(1, 20_000), st.lists(st.integers(0, 20_000), max_size=8), st.integers(64, 5000))
def test_snapshots_lie_on_whole_chunks_inside_the_prompt(length: int, starts: list[int], every: int) -> None:
    starts = sorted(s for s in starts if s < length)
    found = snapshot_positions(length, starts, every)
    assert all(p % 64 == 0 and 0 < p < length for p in found)
    assert length <= 64 or max(found) == (length - 1) // 64 * 64


@given(st.binary(max_size=300))
def test_anything_may_lie_where_a_state_file_should(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("state") / "x"
    file.write_bytes(b"ESSTATE1" + data)
    with pytest.raises(StateFileError):
        StateFile.open(file)


def test_a_state_file_gives_back_what_it_got(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.empty((0, 4), np.uint16), np.array([7], np.int64)]
    size = write_state(tmp_path / "x", {"a": 1}, arrays)
    file = StateFile.open(tmp_path / "x")
    assert file.size == size == (tmp_path / "x").stat().st_size and file.header["a"] == 1
    found = file.read(0, 3, [(a.dtype.name, a.shape) for a in arrays])
    assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))
    with pytest.raises(StateFileError, match="shapes differ"):
        file.read(0, 1, [("float32", (3, 2))])
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_is_compared_is_what_the_model_computes_in_one_piece(llm: LLM) -> None:
    tokens = prompt_of(300)
    whole = llm.model(tokens, llm.session().cache, prompt=True)
    assert np.array_equal(whole[-1], without(llm, tokens)[0])


def test_files_of_other_programs_are_never_deleted(tmp_path: Path) -> None:
    """Whatever they are called, however old they are, and however little room there is."""
    other = tmp_path / ("a" * 32)
    folders = [tmp_path / "notes", other, tmp_path / ("A" * 32), tmp_path / ("b" * 32)]
    foreign = []
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for name in ("game.state", ".game.state.12", "x.state", f"{'d' * 40}.state", ".hidden", "terraform.state"):
            (folder / name).write_bytes(b"somebody's" * 1000)
            os.utime(folder / name, (0, 0))
            foreign.append(folder / name)
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / f"{'e' * 40}.state").write_bytes(b"ESSTATE1" + b"x" * 10000)
    (tmp_path / ("f" * 32)).symlink_to(outside)
    PrefixCache("b" * 40, 1 << 20, tmp_path, 10).close()
    assert all(path.exists() for path in foreign) and (outside / f"{'e' * 40}.state").exists()
