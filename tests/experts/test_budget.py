from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream import BudgetError
from expertstream.experts.budget import MemoryPlan, MemoryWatch, default_budget, plan_memory, plan_with_chunk

MIB = 1 << 20


def plan(**changes: Any) -> MemoryPlan:
    values: dict[str, Any] = {
        "memory_bytes": 1000 * MIB, "available_bytes": 4000 * MIB, "trunk_bytes": 100 * MIB, "state_bytes": 50 * MIB, "scratch_bytes": 10 * MIB,
        "slot_bytes": 2 * MIB, "layers": 10, "num_experts": 100, "top_k": 8, "residency": "auto", "direct": True,
    }  # fmt: skip
    return plan_memory(**{**values, **changes})


def test_what_is_left_becomes_slots() -> None:
    p = plan()
    assert p.slots == 420 and p.residency == "slots" and p.used_bytes == 1000 * MIB
    assert p.ring_slots == 16


def test_a_budget_below_the_floor_names_the_number_that_would_do() -> None:
    with pytest.raises(BudgetError, match="at least memory=176MiB"):
        plan(memory_bytes=176 * MIB - 1)
    p = plan(memory_bytes=176 * MIB)
    assert p.slots == p.ring_slots == 8


def test_more_than_is_available_is_refused() -> None:
    with pytest.raises(BudgetError, match="only 500 MiB is available; set memory=499MiB or less"):
        plan(available_bytes=500 * MIB)


def test_no_more_slots_than_experts() -> None:
    p = plan(memory_bytes=3500 * MIB)
    assert p.slots - p.ring_slots >= 1000 and p.used_bytes < 2300 * MIB


def test_os_residency_leaves_memory_to_the_page_cache() -> None:
    p = plan(residency="os")
    assert p.residency == "os" and p.slots == p.ring_slots == 16
    assert plan(direct=False).residency == "os"
    assert plan(direct=False, memory_bytes=3500 * MIB).residency == "slots"  # everything fits


@given(budget=st.integers(176 * MIB, 4000 * MIB), top_k=st.integers(1, 8), residency=st.sampled_from(["slots", "os"]))
def test_a_plan_never_takes_more_than_its_budget(budget: int, top_k: int, residency: str) -> None:
    p = plan(memory_bytes=budget, top_k=top_k, residency=residency)
    assert p.used_bytes <= budget
    assert top_k <= p.ring_slots <= p.slots


def test_memory_is_given_back_when_others_need_it_and_taken_again() -> None:
    free = [1000 * MIB]
    watch = MemoryWatch(lambda: free[0], 2400 * MIB)
    assert watch.reserve_bytes == 100 * MIB
    assert [watch() for free[0] in (150 * MIB, 400 * MIB)] == [0, 0]
    assert [watch() for free[0] in (60 * MIB, 0)] == [140 * MIB, 200 * MIB]
    assert [watch() for free[0] in (500 * MIB,)] == [-300 * MIB]
    assert MemoryWatch(lambda: 0, 0).reserve_bytes == 32 * MIB


def test_the_default_leaves_a_margin() -> None:
    assert default_budget(24 << 30) == 22 << 30
    assert default_budget(100 * MIB) == 52 * MIB
    assert default_budget(MIB) == 0


def chunk_of(memory: int, num_experts: int) -> int:
    """Scratch of 100 KiB a token; trunk and state take 150 MiB; experts of 2 MiB in 10 layers."""
    sizes = {
        "memory_bytes": memory * MIB, "available_bytes": 100_000 * MIB, "trunk_bytes": 100 * MIB, "state_bytes": 50 * MIB, "slot_bytes": 2 * MIB,
        "layers": 10, "num_experts": num_experts, "top_k": 8, "residency": "slots", "direct": True,
    }  # fmt: skip
    return plan_with_chunk(lambda tokens: tokens * 100 << 10, 2048, 64, **sizes)[1]


def test_a_chunk_leaves_half_to_the_slots() -> None:
    assert chunk_of(1000, 100) == 2048  # 200 MiB of 850
    assert chunk_of(350, 50) == 1024  # 100 MiB of 200, which could hold a tenth of the experts


def test_a_chunk_is_larger_where_slots_could_hold_hardly_anything() -> None:
    assert chunk_of(350, 500) == 1344  # 131 MiB of 200
