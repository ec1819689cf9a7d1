"""Decoding several sequences at once, with a cache that does not hold all that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from expertstream import LLM
from expertstream.experts.stats import LayerStats

from .. import oracle
from ..conftest import SMALL
from ..interrupts import interrupted
from .test_cache import INTERRUPTED, budget_for, logits_of

TRACE = Path(__file__).resolve().parent.parent / "data" / "embedded-trace.npz"
TOKENS = oracle.random_tokens(SMALL, 40)


@contextmanager
def embedded(cached: int) -> Iterator[LLM]:
    """The embedded model with about this many of its 576 experts cached."""
    with LLM(memory="1GiB", context_length=256, prefill_chunk=64) as llm:
        p = llm.plan
        budget = p.trunk_bytes + p.state_bytes + p.scratch_bytes + (p.ring_slots + cached) * p.slot_bytes
    with LLM(memory=f"{budget}", context_length=256, prefill_chunk=64) as llm:
        yield llm


def decode(llm: LLM, sequences: int, prompt: bool, steps: int = 80) -> LayerStats:
    """What recorded sequences ask for, side by side: the experts of all of them, layer by layer."""
    trace = np.load(TRACE)
    starts = trace["starts"][:sequences]
    for step in range(steps):
        for layer in range(trace["experts"].shape[1]):
            wanted = np.unique(trace["experts"][starts + step, layer]).tolist()
            with llm.experts.fetch(layer, wanted, prompt) as fetch:
                found = [expert for part in fetch for expert in part.positions]
            assert sorted(found) == list(range(len(wanted)))
    return llm.experts.stats.total()


@pytest.mark.parametrize("sequences", [1, 4, 8])
def test_a_batch_evicts_what_it_does_not_need(sequences: int) -> None:
    """It asks for more experts than the ring holds, as a prompt does; but what it asks for, it will ask for again."""
    with embedded(240) as llm:
        kept = decode(llm, sequences, prompt=False)
        resident = llm.experts.resident
        assert llm.experts.tier.ring < 4 * sequences or sequences < 8
    with embedded(240) as llm:
        frozen = decode(llm, sequences, prompt=True)
    assert frozen.evictions == 0 < kept.evictions and resident <= 240
    assert kept.hit_rate > 0.5 and kept.hit_rate > frozen.hit_rate + 0.05, (kept.hit_rate, frozen.hit_rate)


def test_a_prompt_does_not_flush_what_decoding_keeps() -> None:
    with embedded(144) as llm:
        decode(llm, 4, prompt=False, steps=40)
        before = llm.experts.resident_map()
        llm.model(llm.tokenizer.encode("word " * 200), llm.session().cache, prompt=True)
        assert llm.experts.resident_map() == before


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_an_interrupt_inside_a_change_of_size_leaves_the_cache_right(pack_folder: Path, reader: str) -> None:
    """KeyboardInterrupt at every line of resize() in turn, smaller and larger; no layer owns more than its share afterwards."""

    expected = logits_of(pack_folder, memory="1GiB", threads=1)
    with LLM(
        pack_folder, memory=budget_for(pack_folder, 60), context_length=256, prefill_chunk=64, reader=reader
    ) as llm:
        experts, count = llm.experts, 0
        registered = experts.link.reader.registered_buffers
        for line in [*range(1, 40), *range(40, 400, 9)]:
            for size in (experts.tier.planned, 7, 20, 0):
                count += interrupted(partial(experts.resize, size), line, INTERRUPTED)
                cache = llm.session().cache
                parts = [llm.model(TOKENS[:30], cache, all_logits=True)]
                parts += [llm.model(TOKENS[t : t + 1], cache) for t in range(30, 32)]
                assert np.array_equal(np.concatenate(parts), expected[:32]), (line, size)
                assert all(
                    len(resident) <= quota
                    for resident, quota in zip(experts.tier.resident, experts.tier.quotas, strict=True)
                )
                slots = [*experts.tier.free_ring, *experts.tier.free, *experts.tier.parked]
                slots += [s for layer in experts.tier.resident for s in layer.values()]
                slots += [load.slot for load in [*experts._prefetched.values(), *experts._wasted]]
                assert sorted(slots) == list(range(llm.plan.slots)), (line, size)
                assert experts.link.reader.registered_buffers == (registered and not experts.tier.parked), (line, size)
        assert count > 100


@pytest.mark.parametrize("wrong", [False, True])
def test_a_change_of_size_keeps_the_slots_of_what_is_being_read_ahead(
    pack_folder: Path, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(pack_folder, memory=budget_for(pack_folder, 40), context_length=256, prefill_chunk=64) as llm:
        experts = llm.experts
        llm.model(TOKENS[:1], llm.session().cache)
        experts.drain()
        ring = sorted(experts.tier.free_ring)
        missing = [e for e in range(24) if e not in experts.tier.resident[1]][:3]
        monkeypatch.setattr(experts.prefetcher, "guess", lambda layer, ranked: ranked)
        experts.hint(1, missing)
        assert len(experts.tier.free_ring) == len(ring) - len(missing) > 0
        if wrong:
            experts.drop_predictions(1)  # before the reads are done, as far as anybody has looked
        experts.resize(experts.tier.planned - 4)
        assert sorted(experts.tier.free_ring) == ring and not experts._prefetched and not experts._wasted
