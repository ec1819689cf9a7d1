"""Experts in memory: bit-identity wherever they lie, counters, and errors that lose nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM, ReadError, _native
from expertstream.experts.prefetch import Prefetcher
from expertstream.experts.store import ExpertStore
from expertstream.models import scratch_bytes

from .. import oracle
from ..conftest import SMALL
from ..interrupts import interrupted

# Where an interrupt may fall.
INTERRUPTED = tuple(f"experts/{name}.py" for name in ("cache", "tier", "link", "fetch", "policy"))
TOKENS = oracle.random_tokens(SMALL, 40)


def logits_of(folder: Path, eager: bool = False, **options: Any) -> np.ndarray:
    """Prefill of 30 tokens, then 10 steps: the logits after each of them. eager: read ahead from the first token on, right or wrong."""
    with LLM(folder, context_length=256, prefill_chunk=64, **options) as llm:
        if eager:
            llm.experts.prefetcher.threshold = 0.0
        cache = llm.session().cache
        parts = [llm.model(TOKENS[:30], cache, all_logits=True)]
        parts += [llm.model(TOKENS[t : t + 1], cache) for t in range(30, 40)]
        return np.concatenate(parts)


def budget_for(folder: Path, experts: int) -> int:
    """A memory budget that leaves room for this many slots."""
    with LLM(folder, context_length=256, prefill_chunk=64, memory="1GiB", threads=1) as llm:
        p = llm.plan
        # Scratch grows with threads; four is the most that these tests take.
        scratch = scratch_bytes(llm.model_config, llm.prefill_chunk, 256, 4)
        return p.trunk_bytes + p.state_bytes + scratch + experts * p.slot_bytes


@pytest.fixture(scope="module")
def expected(pack_folder: Path) -> np.ndarray:
    return logits_of(pack_folder, memory="1GiB", threads=1)


PLACEMENTS = [
    *({"residency": "slots", "experts": n, "reader": r, "threads": t, "policy": p} for n in (3, 20, 200) for r in ("uring", "pread") for t in (1, 2, 4) for p in ("lru", "lfu", "s3fifo")),
    *({"residency": "os", "experts": 20, "reader": r, "threads": t} for r in ("uring", "pread") for t in (1, 2, 4)),
    *({"residency": k, "experts": n, "prefetch": p, "eager": True, "reader": r} for k in ("slots", "os") for n in (12, 40) for p in (1, 6) for r in ("uring", "pread")),
]  # fmt: skip


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_placement_never_changes_the_logits(pack_folder: Path, expected: np.ndarray, placement: dict[str, Any]) -> None:
    options = dict(placement)
    memory = budget_for(pack_folder, options.pop("experts"))
    assert np.array_equal(logits_of(pack_folder, memory=memory, queue_depth=4, **options), expected)


@pytest.mark.parametrize(
    "options",
    [{"queue_depth": 1}, {"split_bytes": 4096}, {"verify": "never"}, {"verify": "always"}, {"queue_depth": 64}],
)
def test_how_reads_are_cut_never_changes_the_logits(
    pack_folder: Path, expected: np.ndarray, options: dict[str, Any]
) -> None:
    assert np.array_equal(logits_of(pack_folder, memory=budget_for(pack_folder, 5), **options), expected)


def test_every_expert_is_read_at_most_once_a_layer_and_chunk(pack_folder: Path) -> None:
    """A prompt touches nearly all experts, the cache holds a few: still one read each in every chunk."""
    with LLM(
        pack_folder,
        memory=budget_for(pack_folder, 8),
        context_length=256,
        prefill_chunk=64,
        reader="pread",
        split_bytes=1 << 20,
    ) as llm:
        reads: Counter[tuple[int, int]] = Counter()
        start = llm.experts.link.start

        def counting_start(layer: int, loads: list[Any]) -> None:
            reads.update((layer, load.expert) for load in loads)
            start(layer, loads)

        llm.experts.link.start = counting_start  # type: ignore[method-assign]
        before = llm.experts.link.reader.reads
        llm.model(oracle.random_tokens(SMALL, 128), llm.session().cache)
        assert max(reads.values()) == 1
        assert len(reads) > SMALL["num_hidden_layers"] * 20
        # One record is one read of the kernel's, and the counters say the same.
        assert llm.experts.link.reader.reads - before == sum(reads.values()) == llm.experts.stats.total().misses
        assert llm.experts.stats.total().bytes_read == sum(reads.values()) * llm.plan.slot_bytes


def test_a_long_prompt_does_not_flush_what_decoding_keeps(pack_folder: Path) -> None:
    with LLM(pack_folder, memory=budget_for(pack_folder, 40), context_length=256, prefill_chunk=64) as llm:
        session = llm.session()
        for token in TOKENS:
            llm.model(np.array([token]), session.cache)
        kept = [dict(layer) for layer in llm.experts.tier.resident]
        evictions = llm.experts.stats.total().evictions
        assert evictions > 0
        llm.model(oracle.random_tokens(SMALL, 128, seed=9), session.cache)
        assert [dict(layer) for layer in llm.experts.tier.resident] == kept
        assert llm.experts.stats.total().evictions == evictions


def test_counters_add_up(pack_folder: Path) -> None:
    with LLM(pack_folder, memory=budget_for(pack_folder, 40), context_length=256, reader="uring") as llm:
        session = llm.session()
        for token in TOKENS:
            llm.model(np.array([token]), session.cache)
        total = llm.experts.stats.total()
        assert total.hits + total.misses == len(TOKENS) * SMALL["num_hidden_layers"] * SMALL["num_experts_per_tok"]
        assert total.hits > 0 and total.misses > 0
        assert total.bytes_read == (total.misses + total.prefetch_wasted) * llm.plan.slot_bytes
        assert total.misses - total.evictions >= llm.experts.resident
        assert 1 <= total.max_in_flight <= 32 and total.stall_seconds > 0
        assert 0 < total.hit_rate < 1


def test_all_misses_of_a_layer_are_in_flight_together(pack_folder: Path) -> None:
    with LLM(
        pack_folder, memory=budget_for(pack_folder, 24), context_length=256, split_bytes=4096, queue_depth=16
    ) as llm:
        llm.model(np.array([5]), llm.session().cache)
        # Three experts of one layer, each cut into pieces of 4 KiB.
        pieces = 3 * llm.plan.slot_bytes // 4096
        assert all(layer.max_in_flight == pieces for layer in llm.experts.stats.layers)
        # A prompt keeps the queue full.
        llm.model(TOKENS[:30], llm.session().cache)
        assert max(layer.max_in_flight for layer in llm.experts.stats.layers) == llm.config.queue_depth == 16


def test_the_page_cache_is_counted_when_it_serves(pack_folder: Path) -> None:
    with LLM(pack_folder, memory=budget_for(pack_folder, 20), context_length=256, residency="os") as llm:
        assert not llm.experts.store.direct
        for _ in range(2):
            llm.model(TOKENS[:1], llm.session().cache)
        total = llm.experts.stats.total()
        assert llm.experts.resident == 0
        assert total.hits + total.misses == 2 * SMALL["num_hidden_layers"] * SMALL["num_experts_per_tok"]
        assert total.hits >= SMALL["num_hidden_layers"] * SMALL["num_experts_per_tok"]  # the second time at least


@pytest.mark.parametrize("reader", ["uring", "pread"])
@pytest.mark.parametrize(("value", "message"), [(errno.EIO, "Input/output error"), (0, "the file ends too early")])
def test_a_failed_read_stops_with_file_layer_and_expert(
    pack_folder: Path, expected: np.ndarray, faults: None, reader: str, value: int, message: str
) -> None:
    """In the middle of decoding, below the reader; afterwards everything works again."""
    with LLM(pack_folder, memory=budget_for(pack_folder, 6), context_length=256, reader=reader) as llm:
        cache = llm.session().cache
        llm.model(TOKENS[:30], cache)
        _native.set_fault(2, 1, value)
        with pytest.raises(
            ReadError, match=rf"experts-0000\d\.safetensors: layer \d, expert \d+: read failed: {message}"
        ):
            for t in range(30, 40):
                llm.model(TOKENS[t : t + 1], cache)
        assert not cache.valid
        _native.clear_faults()
        assert llm.experts.link.reader.pending == 0
        cache.reset()
        parts = [llm.model(TOKENS[:30], cache, all_logits=True)]
        parts += [llm.model(TOKENS[t : t + 1], cache) for t in range(30, 40)]
        assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_partial_and_interrupted_reads_go_on(
    pack_folder: Path, expected: np.ndarray, faults: None, reader: str
) -> None:
    _native.set_fault(0, 50, -1)
    assert np.array_equal(
        logits_of(pack_folder, memory=budget_for(pack_folder, 6), reader=reader, split_bytes=1 << 20), expected
    )
    _native.set_fault(3, 5, errno.EINTR)
    assert np.array_equal(logits_of(pack_folder, memory=budget_for(pack_folder, 6), reader=reader), expected)


def copy_pack(pack: Path, to: Path) -> Path:
    return Path(shutil.copytree(pack, to / "copy"))


def flip_byte(file: Path, at: int) -> None:
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))


def test_a_damaged_record_is_found_at_its_first_read(pack_folder: Path, tmp_path: Path) -> None:
    folder = copy_pack(pack_folder, tmp_path)
    for layer in range(4):
        file = folder / f"experts-{layer:05}.safetensors"
        for at in range(4096 + 100, file.stat().st_size, 4096):
            flip_byte(file, at)
    with (
        LLM(folder, memory="64MiB", context_length=256) as llm,
        pytest.raises(ReadError, match=r"layer 0, expert \d+: checksum mismatch"),
    ):
        llm.model(TOKENS[:1], llm.session().cache)
    with LLM(folder, memory="64MiB", context_length=256, verify="never") as llm:
        llm.model(TOKENS[:1], llm.session().cache)


@pytest.mark.parametrize("how", ["replace", "overwrite", "truncate", "remove"])
def test_a_file_that_changes_while_open_stops_the_request(pack_folder: Path, tmp_path: Path, how: str) -> None:
    folder = copy_pack(pack_folder, tmp_path)
    file = folder / "experts-00002.safetensors"
    with LLM(folder, memory=budget_for(pack_folder, 6), context_length=256) as llm:
        llm.model(TOKENS[:4], llm.session().cache)
        if how == "replace":
            shutil.copy(file, tmp_path / "new")
            os.replace(tmp_path / "new", file)
        elif how == "overwrite":
            os.utime(file, ns=(1, 1))
        elif how == "truncate":
            os.truncate(file, 8192)
        else:
            file.unlink()
        with pytest.raises(
            ReadError, match=r"experts-00002\.safetensors: layer 2: (replaced or changed|removed) while open"
        ):
            llm.model(TOKENS[4:12], llm.session().cache)


def test_without_o_direct_reads_are_buffered_and_said_to_be(
    pack_folder: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    memory = budget_for(pack_folder, 20)
    with LLM(pack_folder, memory=memory, context_length=256, prefill_chunk=64) as llm:
        assert llm.plan.residency == "os" and "buffered" in llm.describe()
    assert np.array_equal(logits_of(pack_folder, memory=memory, residency="slots"), expected)


def test_missing_expert_file_at_open(pack_folder: Path, tmp_path: Path) -> None:
    with LLM(pack_folder, memory="64MiB", context_length=256) as llm:
        layouts = llm.experts.store.layouts
    moved = copy_pack(pack_folder, tmp_path)
    assert ExpertStore(layouts, direct=True).slot_bytes == layouts[0].bytes_per_expert
    (moved / "experts-00001.safetensors").unlink()
    with pytest.raises(Exception, match=r"missing file experts-00001\.safetensors \(experts of layer 1\)"):
        LLM(moved, memory="64MiB", context_length=256)


def test_reading_ahead_is_counted_and_never_fails_a_request_that_does_not_need_it(
    pack_folder: Path, faults: None
) -> None:
    with LLM(pack_folder, memory=budget_for(pack_folder, 40), context_length=256, prefetch=4) as llm:
        llm.experts.prefetcher.threshold = 0.0
        cache = llm.session().cache
        for t in range(20):
            llm.model(TOKENS[t : t + 1], cache)
        total = llm.experts.stats.total()
        assert total.prefetched > 0 and total.prefetch_wasted > 0
        assert llm.experts.stats.layers[0].prefetched == 0  # nobody knows the next token
        # A guess for an expert that nobody asks for fails unheard; one that is asked for fails by name.
        layer = llm.experts.store.layouts[1].layer
        missing = [e for e in range(SMALL["num_experts"]) if e not in llm.experts.tier.resident[layer]]
        for asked in (False, True):
            _native.set_fault(0, 1, errno.EIO)
            with llm.experts.fetch(0, list(llm.experts.tier.resident[0])[:1]) as fetch:
                llm.experts.hint(layer, missing[:1])
                assert len(list(fetch)) == 1
                while llm.experts.link.reader.pending:
                    llm.experts.wait(0, 1)
            _native.clear_faults()
            if asked:
                with pytest.raises(ReadError, match=f"layer 1, expert {missing[0]}: read failed: Input/output error"):
                    list(llm.experts.fetch(layer, missing[:1]))
            else:
                with llm.experts.fetch(layer, missing[1:2]) as fetch:
                    assert len(list(fetch)) == 1


def test_a_rank_is_followed_while_it_is_right() -> None:
    prefetcher = Prefetcher(4, memory=0.1)
    for step in range(60):
        followed = prefetcher.guess(1, [7, 3])
        prefetcher.learn(1, [7, 9] if step < 30 else [9, 3])
        # Right or wrong is learned whether or not it was followed.
        if step == 29:
            assert followed == [7]
    assert prefetcher.guess(1, [7, 3]) == [3]


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_slots_come_and_go_with_memory(pack_folder: Path, expected: np.ndarray, reader: str) -> None:
    """Under pressure the cache gives slots back, and takes them again; the logits do not know."""
    with LLM(
        pack_folder, memory=budget_for(pack_folder, 60), context_length=256, prefill_chunk=64, reader=reader
    ) as llm:
        experts, slot = llm.experts, llm.plan.slot_bytes
        planned, wanted = experts.tier.planned, [0]
        experts._pressure = lambda: wanted[0]
        cache, parts = llm.session().cache, []
        for step, wanted[0] in enumerate([0, 0, 20 * slot, 0, 10**9, 0, -8 * slot, 0, -(10**9), 0]):
            experts._next_look = 0.0
            parts.append(
                llm.model(TOKENS[:30], cache, all_logits=True)
                if step == 0
                else llm.model(TOKENS[29 + step : 30 + step], cache)
            )
            slots = (
                experts.tier.free_ring
                + experts.tier.free
                + experts.tier.parked
                + [s for layer in experts.tier.resident for s in layer.values()]
            )
            slots += [load.slot for load in [*experts._prefetched.values(), *experts._wasted]]
            assert sorted(slots) == list(range(llm.plan.slots)) and experts.resident <= experts.tier.cached
            assert (
                experts.tier.cached
                == [planned, planned, planned - 20, planned - 20, 0, 0, 8, 8, planned, planned][step]
            )
        parts.append(llm.model(TOKENS[39:40], cache))
        assert np.array_equal(np.concatenate(parts), expected)
        assert experts.link.reader.registered_buffers == (reader == "uring")  # all memory is back


@pytest.mark.parametrize("eager", [False, True])
def test_an_interrupt_anywhere_leaves_the_cache_right(pack_folder: Path, expected: np.ndarray, eager: bool) -> None:
    """KeyboardInterrupt at every line of the cache in turn, as Ctrl-C would; whoever catches it may go on with the same model."""
    with LLM(pack_folder, memory=budget_for(pack_folder, 12 + 8 * eager), context_length=256, prefill_chunk=64) as llm:
        count = 0
        if eager:
            llm.experts.prefetcher.threshold = 0.0
        for line in [*range(1, 400, 3 + 4 * eager), *range(400, 4000, 37)]:
            cache = llm.session().cache

            def passes(cache: Any = cache) -> None:
                llm.model(TOKENS[:30], cache)
                for t in range(30, 36):
                    llm.model(TOKENS[t : t + 1], cache)

            count += interrupted(passes, line, INTERRUPTED)
            again = llm.session().cache
            parts = [llm.model(TOKENS[:30], again, all_logits=True)]
            parts += [llm.model(TOKENS[t : t + 1], again) for t in range(30, 40)]
            assert np.array_equal(np.concatenate(parts), expected), line
            experts = llm.experts
            slots = (
                experts.tier.free_ring
                + experts.tier.free
                + experts.tier.parked
                + [s for layer in experts.tier.resident for s in layer.values()]
            )
            slots += [load.slot for load in [*experts._prefetched.values(), *experts._wasted]]
            assert sorted(slots) == list(range(llm.plan.slots)), line
        assert count > 120
