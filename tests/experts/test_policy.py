from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream.config import POLICIES
from expertstream.experts.policy import LFU, LRU, S3FIFO, Policy, make_policy


@pytest.mark.parametrize("name", POLICIES)
@given(uses=st.lists(st.sets(st.integers(0, 29), min_size=1, max_size=12), max_size=60), capacity=st.integers(12, 24))
def test_a_policy_forgets_what_it_evicts_and_never_what_is_in_use(
    name: str, uses: list[set[int]], capacity: int
) -> None:
    policy: Policy = make_policy(name)
    resident: set[int] = set()
    for wanted in uses:
        for expert in sorted(wanted):
            if expert in resident:
                policy.touch([expert])
                continue
            if len(resident) == capacity:
                victim = policy.evict(wanted)
                assert victim in resident - wanted
                resident.remove(victim)
            policy.insert(expert)
            resident.add(expert)
    assert policy.evict(resident) is None
    while resident:
        victim = policy.evict(set())
        assert victim in resident
        resident.remove(victim)
    assert policy.evict(set()) is None


def test_lru_evicts_the_oldest_use() -> None:
    policy = LRU()
    for expert in (1, 2, 3):
        policy.insert(expert)
    policy.touch([1])
    assert policy.evict(set()) == 2
    assert policy.evict({3}) == 1


def test_lfu_evicts_the_rarest_and_ages() -> None:
    policy = LFU(period=8)
    for expert in (1, 2):
        policy.insert(expert)
    for _ in range(5):
        policy.touch([1])
    policy.touch([2])
    # 1 has been used 6 times, 2 twice; the eighth use halved both.
    assert policy.evict(set()) == 2
    policy.insert(3)
    for _ in range(4):
        policy.touch([3])
    assert policy.evict(set()) == 1


def test_s3fifo_lets_into_the_main_queue_what_comes_back() -> None:
    policy = S3FIFO()
    for expert in range(4):
        policy.insert(expert)
    policy.touch([0])
    assert policy.evict(set()) == 1  # 0 was used while it waited: it is in the main queue now
    policy.insert(1)  # and is remembered: it goes to the main queue at once
    assert [policy.evict(set()) for _ in range(4)] == [2, 3, 0, 1]


def test_s3fifo_spares_what_was_used() -> None:
    policy = S3FIFO()
    for expert in (1, 2):
        policy.insert(expert)
        policy.touch([expert])
    assert policy.evict({1}) == 2  # both passed into the main queue; what is in use stays
    policy.touch([1, 1])
    policy.insert(3)
    assert policy.evict(set()) == 3
    assert policy.evict(set()) == 1


def test_s3fifo_finds_what_may_go_though_the_main_queue_may_not() -> None:
    policy = S3FIFO()
    for expert in range(20):
        policy.insert(expert)
    policy.touch(range(20))
    assert policy.evict(set()) == 0  # all were used: they are in the main queue now, spared once
    for expert in (50, 51):
        policy.insert(expert)
        policy.touch([expert])
    assert policy.evict(set(range(20))) == 50
