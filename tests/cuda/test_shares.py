"""Which experts are on the GPU and which in the host's memory, and who computes those."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM, DeviceError, ReadError, RequestError, _native
from expertstream.batch import Batch
from expertstream.cuda import driver as drivers
from expertstream.cuda.driver import Driver
from expertstream.experts.budget import chunk_beside_link
from expertstream.ops.cuda.hybrid import Split

from .. import oracle
from ..interrupts import interrupted

OPTIONS: dict[str, Any] = {"context_length": 256, "prefill_chunk": 128, "threads": 1}
STEPS = 12


@pytest.fixture(autouse=True)
def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Device 0 is the GPU of these tests, emulated or not."""
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    yield driver


@pytest.fixture(scope="module")
def expected(pack_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the CPU's logits of them."""
    with LLM(pack_folder, memory="1GiB", device="cpu", **OPTIONS) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, 80)
        return tokens, generate(llm, tokens)


def generate(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    """A prompt, and single tokens after it."""
    cache = llm.session().cache
    rows = [llm.model(tokens[:64], cache, prompt=True)]
    rows += [llm.model(tokens[t : t + 1], cache) for t in range(64, 64 + STEPS)]
    return np.concatenate(rows)


def open_with(folder: Path, near: int, far: int | None, cpu_experts: str = "none") -> LLM:
    """A model with so many slots on the card, and so many in the host's memory; all if None."""
    with LLM(folder, memory="1GiB", device="cuda", **OPTIONS) as llm:
        plan, own = llm.vram_plan, llm.experts.store.slot_bytes
        assert plan is not None
    vram = plan.trunk_bytes + plan.state_bytes + plan.scratch_bytes + near * plan.slot_bytes
    memory = "1GiB" if far is None else (16 << 20) + far * own
    return LLM(folder, memory=memory, vram=vram, device="cuda", cpu_experts=cpu_experts, **OPTIONS)


def check_places(llm: LLM) -> None:
    """Every expert is where the table says, every slot is used once, and what leaves the card is in the arena."""
    cache, vram = llm.experts, llm.experts.vram
    assert vram is not None and cache.shares is not None
    cache.shares.abandon()
    cache.drain()
    on_card = [slot for layer in vram.tier.resident for slot in layer.values()]
    slots = on_card + vram.tier.free + vram.spares + sorted(vram.tier.withdrawn)
    assert sorted(slots) == [*range(vram.tier.slots), *vram._spare_slots]
    below = [slot for layer in cache.tier.resident for slot in layer.values()]
    assert sorted(below + cache.tier.free + cache.tier.free_ring + cache.tier.parked) == list(range(cache.tier.slots))
    base = llm.ops.readable(cache.link.arena)  # type: ignore[attr-defined]
    for layer, layout in enumerate(cache.store.layouts):
        table = llm.ops.device.host(vram.table[layer])  # type: ignore[attr-defined]
        for expert in range(layout.num_experts):
            near = vram.tier.resident[layer].get(expert)
            assert bool(vram.near[layer, expert]) == (near is not None)
            if near is not None:
                place = vram.addresses[near]
            elif vram.partial:
                place = np.zeros(table.shape[1], np.int64)
            else:
                place = np.array(cache.link.offsets(layer, cache.tier.resident[layer][expert])) + base
            assert table[expert].tolist() == place[: table.shape[1]].tolist()


@pytest.mark.parametrize("twice, cpu_experts", [(False, "none"), (True, "none"), (True, "all")])
def test_experts_that_are_used_come_to_the_card(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], twice: bool, cpu_experts: str
) -> None:
    tokens, logits = expected
    with LLM(pack_folder, memory="1GiB", device="cpu", **OPTIONS) as llm:
        total = llm.plan.total_experts
    near = 40
    with open_with(pack_folder, near, None if twice else total - near // 2, cpu_experts) as llm:
        vram, cache = llm.experts.vram, llm.experts
        assert vram is not None and cache.shares is not None and vram.complete and not vram.holds_all
        assert (sum(map(len, cache.tier.resident)) == total) == twice
        copied = vram.bytes_copied
        assert np.array_equal(generate(llm, tokens), logits)
        assert vram.bytes_copied > copied  # the prompt brought what was far
        assert (vram.far_reads > 0, vram.host_computed > 0) == (cpu_experts == "none", cpu_experts == "all")
        for _ in range(3):
            assert np.array_equal(generate(llm, tokens), logits)
            check_places(llm)
        assert cache.shares.moved > 0 and vram.complete
        assert vram.bytes_read == vram.far_reads * sum(vram._sizes[0])
        heat = cache.shares._heat
        coldest = np.where(vram.near, heat, np.inf).min(1)
        assert (np.where(vram.near, -1, heat).max(1) <= coldest + 8 * cache.shares._unit).all()


@pytest.mark.parametrize("far", [None, 150, 30])
def test_an_interrupt_anywhere_leaves_every_expert_in_place(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], far: int | None
) -> None:
    """KeyboardInterrupt at some lines, as Ctrl-C would: the next pass has every expert again, and the same logits."""
    tokens, logits = expected
    files = ("shares.py", "vram.py", "tier.py", "cache.py", "fetch.py", "exchange.py")
    twice = far is None

    with open_with(pack_folder, 40, far, "all") as llm:
        assert llm.experts.vram is not None
        count = 0
        generate(llm, tokens)
        for line in range(1 + 11 * twice, 180, 37):
            cache = llm.session().cache
            llm.model(tokens[:64], cache, prompt=True)

            def steps(cache: Any = cache) -> None:
                for t in range(64, 68):
                    llm.model(tokens[t : t + 1], cache)

            count += interrupted(steps, line, files)
            rows = [llm.model(tokens[:64], cache := llm.session().cache, prompt=True)]
            rows += [llm.model(tokens[t : t + 1], cache) for t in range(64, 68)]
            assert np.array_equal(np.concatenate(rows), logits[:5]), line
            assert llm.experts.vram.partial if far == 30 else llm.experts.vram.complete
            check_places(llm)
        assert count > 2


def test_what_neither_memory_has_is_read_and_computed_on_the_host(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    tokens, logits = expected
    with open_with(pack_folder, 40, 30, "auto") as llm:
        vram, cache = llm.experts.vram, llm.experts
        assert vram is not None and cache.shares is not None
        for _ in range(3):
            counted, before = vram.host_computed, cache.stats.copy()
            assert np.array_equal(generate(llm, tokens), logits)
            assert vram.partial and not vram.complete
            check_places(llm)
            done = cache.stats.since(before).total()
            assert vram.host_computed > counted and done.hits > 0 and done.misses > 0 and vram.far_reads == 0
        assert cache.shares.moved > 0 and sum(map(len, vram.tier.resident)) == vram.tier.slots
        caches = [llm.session().cache for _ in range(3)]
        for cache_ in caches:
            llm.model(tokens[:64], cache_, prompt=True)
        for t in range(64, 67):  # a batch: experts of several tokens, each computed once
            rows = llm.model.forward(Batch(tokens[[t, t, t]], caches))
            assert np.array_equal(rows, np.repeat(logits[t - 63 : t - 62], 3, 0))


def test_many_sequences_of_which_several_share_each_expert(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    """So many pairs that without a recording they would be grouped by expert: what the card does not have is not left out."""
    tokens, _ = expected
    with LLM(pack_folder, memory="1GiB", device="cpu", **OPTIONS) as llm:
        rows = llm.model.forward(Batch(tokens[:33], [llm.session().cache for _ in range(33)]))
    with open_with(pack_folder, 40, 30, "auto") as llm:
        assert 33 * llm.top_k > 4 * llm.model_config.num_experts
        for _ in range(3):  # the second time it is recorded, and counted when the next one runs
            caches = [llm.session().cache for _ in range(33)]
            assert np.array_equal(llm.model.forward(Batch(tokens[:33], caches)), rows)
        assert llm.experts.vram is not None and llm.experts.vram.host_computed > 0


def test_under_memory_pressure_the_host_computes_what_it_reads_again(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits = expected
    with open_with(pack_folder, 40, 170, "auto") as llm:
        vram, cache = llm.experts.vram, llm.experts
        assert vram is not None and vram.complete
        monkeypatch.setattr(cache, "_pressure", lambda: 0)
        for slots, complete in ((30, False), (cache.tier.planned, True)):
            cache.resize(slots)
            assert np.array_equal(generate(llm, tokens), logits)
            assert (vram.complete, vram.partial) == (complete, not complete)
            check_places(llm)


@pytest.mark.parametrize("far", [None, 150, 30])
def test_slots_are_given_back_to_a_card_that_others_need(
    driver: Driver,
    pack_folder: Path,
    expected: tuple[np.ndarray, np.ndarray],
    far: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under pressure some, then all of them; afterwards they are taken back. Logits stay what they are."""
    tokens, logits = expected
    with open_with(pack_folder, 40, far, "auto") as llm:
        vram, cache = llm.experts.vram, llm.experts
        assert vram is not None
        monkeypatch.setattr(cache, "_pressure", lambda: 0)
        assert np.array_equal(generate(llm, tokens), logits)
        size, planned = vram.segment_bytes, vram.tier.planned
        three = sum(map(len, vram._segments[:-3]))  # what is left without the last three, of which one may be smaller
        for wanted, cached in ((2 * size + 1, three), (1 << 40, 0), (-(1 << 40), planned)):
            free = driver.free_bytes()
            left = [wanted, wanted]  # before what is not used is freed, and after
            monkeypatch.setattr(cache, "_vram_pressure", lambda left=left: left.pop() if left else 0)
            cache._next_look = 0.0
            cache.adapt()
            assert vram.tier.cached == cached == vram.tier.planned - len(vram.tier.withdrawn)
            if wanted > 0:
                assert driver.free_bytes() > free
            assert np.array_equal(generate(llm, tokens), logits)
            check_places(llm)
        assert sum(map(len, vram.tier.resident)) > 0


def test_a_card_is_watched(driver: Driver, pack_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_with(pack_folder, 40, 30, "auto") as llm:
        watch, free = llm._vram_watch(), driver.free_bytes()
        assert watch() <= 0
        monkeypatch.setattr(driver, "free_bytes", lambda: free // 100)
        assert watch() > 0


def test_a_card_that_is_not_answered_goes_on(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait is without a bound: the step ends with an error, and the next one is right."""
    tokens, logits = expected
    with open_with(pack_folder, 40, 30, "all") as llm:
        assert np.array_equal(generate(llm, tokens), logits)
        compute = type(llm.ops).compute

        def slow(*args: Any) -> None:
            time.sleep(0.2)
            compute(*args)

        llm.ops._drop_recordings(0)  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr("expertstream.cuda.exchange._patience", lambda: 0.05)
            patch.setattr(type(llm.ops), "compute", slow)
            with pytest.raises(DeviceError, match=r"waited for the processor .* cpu_experts=none"):
                generate(llm, tokens)
        llm.ops._drop_recordings(0)  # type: ignore[attr-defined]
        assert np.array_equal(generate(llm, tokens), logits)


def test_a_step_that_the_card_does_not_finish_is_an_error(
    driver: Driver, pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kernel's fault: the host asks the card soon, and does not wait for a question for long."""
    tokens, logits = expected
    with open_with(pack_folder, 40, 30, "all") as llm:
        assert np.array_equal(generate(llm, tokens), logits)
        with monkeypatch.context() as patch:
            patch.setattr(driver, "replay", lambda graph: None)
            begin = time.monotonic()
            with pytest.raises(DeviceError, match="did not go on with a step"):
                generate(llm, tokens)
            assert time.monotonic() - begin < 15  # of 20 seconds that a kernel would wait
        assert np.array_equal(generate(llm, tokens), logits)


def test_a_read_that_fails_in_a_recorded_step_is_an_error(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray]
) -> None:
    tokens, logits = expected
    with open_with(pack_folder, 20, 20, "auto") as llm:
        assert np.array_equal(generate(llm, tokens), logits)
        cache = llm.session().cache
        llm.model(tokens[:64], cache, prompt=True)
        _native.set_fault(0, 1, -5)
        try:
            with pytest.raises(ReadError, match="read failed"):
                for t in range(64, 76):
                    llm.model(tokens[t : t + 1], cache)
        finally:
            _native.clear_faults()
        with pytest.raises(RequestError, match="stopped in the middle of a token"):
            llm.model(tokens[:1], cache)
        assert np.array_equal(generate(llm, tokens), logits)


def test_when_the_card_holds_all_the_host_holds_none(pack_folder: Path) -> None:
    with LLM(pack_folder, memory="1GiB", device="cuda", **OPTIONS) as llm:
        assert llm.experts.vram is not None and llm.experts.vram.holds_all
        assert llm.plan.slots == llm.plan.ring_slots < llm.plan.total_experts
        assert llm.experts.resident == llm.plan.total_experts


def test_a_chunk_is_larger_where_experts_cross_the_link_for_each(pack_folder: Path) -> None:
    gib = 1 << 30
    for left, experts, tokens in (
        (20, 19, 2048),
        (20, 20, 8192),
        (8, 20, 8192),
        (7, 20, 4096),
        (4, 20, 4096),
        (3, 20, 2048),
    ):
        # 1 GiB for 8,192 tokens
        assert chunk_beside_link(2048, lambda n: n * gib // 8192, left * gib, experts * gib) == tokens
    with LLM(pack_folder, memory="1GiB", device="cuda", context_length=16384, threads=1) as llm:
        assert llm.prefill_chunk == 2048
    with LLM(pack_folder, memory="1GiB", device="cuda", context_length=16384, threads=1, prefill_chunk=192) as llm:
        assert llm.prefill_chunk == 192


def test_experts_are_divided_so_that_both_sides_end_together() -> None:
    assert Split(card=100e-6, host=50e-6).share(6).tolist() == [0, 1, 1, 2, 3, 3, 4]
    assert not Split(card=10e-6, host=100e-6).share(8).any()
    assert Split(card=1.0, host=0.0).share(8).tolist() == list(range(9))
    # With two of eight experts in host memory, 30 us of 60 are more than asking costs; 18 of 66 are not worth it.
    assert Split(card=60e-6, host=15e-6).worth(8) and not Split(card=33e-6, host=33e-6).worth(8)
