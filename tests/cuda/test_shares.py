"""Which experts are on the GPU and which in the host's memory, where the two hold all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertstream import LLM
from expertstream.cuda import driver as drivers
from expertstream.cuda.driver import Driver
from expertstream.experts.budget import chunk_beside_link

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


def open_with(folder: Path, near: int, far: int | None) -> LLM:
    """A model with so many slots on the card, and so many in the host's memory; all if None."""
    with LLM(folder, memory="1GiB", device="cuda", **OPTIONS) as llm:
        plan, own = llm.vram_plan, llm.experts.store.slot_bytes
        assert plan is not None
    vram = plan.trunk_bytes + plan.state_bytes + plan.scratch_bytes + near * plan.slot_bytes
    memory = "1GiB" if far is None else (16 << 20) + far * own
    return LLM(folder, memory=memory, vram=vram, device="cuda", **OPTIONS)


def check_places(llm: LLM) -> None:
    """Every expert is where the table says, every slot is used once, and what leaves the card is in the arena."""
    cache, vram = llm.experts, llm.experts.vram
    assert vram is not None and cache.shares is not None
    cache.shares.abandon()
    on_card = [slot for layer in vram.tier.resident for slot in layer.values()]
    assert sorted(on_card + vram.tier.free + vram.spares) == [*range(vram.tier.slots), *vram._spare_slots]
    below = [slot for layer in cache.tier.resident for slot in layer.values()]
    assert sorted(below + cache.tier.free + cache.tier.free_ring) == list(range(cache.tier.slots))
    base = llm.ops.readable(cache.link.arena)  # type: ignore[attr-defined]
    for layer, layout in enumerate(cache.store.layouts):
        table = llm.ops.device.host(vram.table[layer])  # type: ignore[attr-defined]
        for expert in range(layout.num_experts):
            near = vram.tier.resident[layer].get(expert)
            assert bool(vram.near[layer, expert]) == (near is not None)
            if near is not None:
                place = vram.addresses[near]
            else:
                place = np.array(cache.link.offsets(layer, cache.tier.resident[layer][expert])) + base
            assert table[expert].tolist() == place[: table.shape[1]].tolist()


@pytest.mark.parametrize("twice", [False, True])
def test_experts_that_are_used_come_to_the_card(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], twice: bool
) -> None:
    tokens, logits = expected
    with LLM(pack_folder, memory="1GiB", device="cpu", **OPTIONS) as llm:
        total = llm.plan.total_experts
    near = 40
    with open_with(pack_folder, near, None if twice else total - near // 2) as llm:
        vram, cache = llm.experts.vram, llm.experts
        assert vram is not None and cache.shares is not None and vram.complete and not vram.holds_all
        assert (sum(map(len, cache.tier.resident)) == total) == twice
        copied = vram.bytes_copied
        assert np.array_equal(generate(llm, tokens), logits)
        assert vram.bytes_copied > copied and vram.far_reads > 0  # the prompt brought what was far
        for _ in range(3):
            assert np.array_equal(generate(llm, tokens), logits)
            check_places(llm)
        assert cache.shares.moved > 0 and vram.complete
        assert vram.bytes_read == vram.far_reads * sum(vram._sizes[0])
        heat = cache.shares._heat
        coldest = np.where(vram.near, heat, np.inf).min(1)
        assert (np.where(vram.near, -1, heat).max(1) <= coldest + 8 * cache.shares._unit).all()


@pytest.mark.parametrize("twice", [False, True])
def test_an_interrupt_anywhere_leaves_every_expert_in_place(
    pack_folder: Path, expected: tuple[np.ndarray, np.ndarray], twice: bool
) -> None:
    """KeyboardInterrupt at some lines, as Ctrl-C would: the next pass has every expert again, and the same logits."""
    tokens, logits = expected
    files = ("shares.py", "vram.py", "tier.py", "cache.py")

    with open_with(pack_folder, 40, None if twice else 150) as llm:
        assert llm.experts.vram is not None
        count = 0
        generate(llm, tokens)
        for line in range(1 + 11 * twice, 180, 23):
            cache = llm.session().cache
            llm.model(tokens[:64], cache, prompt=True)

            def steps(cache: Any = cache) -> None:
                for t in range(64, 68):
                    llm.model(tokens[t : t + 1], cache)

            count += interrupted(steps, line, files)
            rows = [llm.model(tokens[:64], cache := llm.session().cache, prompt=True)]
            rows += [llm.model(tokens[t : t + 1], cache) for t in range(64, 68)]
            assert np.array_equal(np.concatenate(rows), logits[:5]), line
            assert llm.experts.vram.complete
            check_places(llm)
        assert count > 4


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
