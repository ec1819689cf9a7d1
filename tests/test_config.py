from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstream import EngineConfig, UsageError
from expertstream.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("500M", 500_000_000),
        ("1.5KiB", 1536),
        ("0.5g", 500_000_000),
        ("123", 123),
        ("2TB", 2 * 10**12),
        (7, 7),
    ],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "8XB", "1e9", "8 G i B"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@given(st.integers(0, 1 << 60))
def test_printed_sizes_are_read_back_nearly(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(1, count * 0.051)


def test_options_then_environment_then_defaults() -> None:
    environ = {"EXPERTSTREAM_ISA": "scalar", "EXPERTSTREAM_THREADS": "3"}
    config = EngineConfig.from_options({"memory": "1GiB", "threads": None, "isa": None}, environ)
    assert (config.memory_bytes, config.threads, config.isa) == (1 << 30, 3, "scalar")
    assert EngineConfig.from_options({"threads": 5}, environ).thread_count == 5
    assert EngineConfig.from_options({}, {}).thread_count >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency": "both"}, "residency must be one of auto, slots, os"),
        ({"reader": "mmap"}, "reader must be one of"),
        ({"policy": "fifo"}, "policy must be one of"),
        ({"queue_depth": -1}, "queue_depth must be an integer from 0 to 1024"),
        ({"context_memory_fraction": float("nan")}, "context_memory_fraction must be a number from 0 to 1; got nan"),
        ({"context_memory_fraction": True}, "context_memory_fraction must be a number from 0 to 1; got True"),
        ({"split_bytes": 5000}, "multiple of 4096"),
        ({"threads": -1}, "threads must be an integer"),
        ({"memory": "0"}, "must be greater than 0"),
        ({"threads": "2"}, "threads must be an integer"),
        ({"context_length": 99.5}, "context_length must be an integer"),
        ({"prefill_chunk": 100}, "prefill_chunk must be a multiple of 64"),
        ({"memory": 1e9}, "is not a size"),
        ({"memory": True}, "is not a size"),
        ({"memory": "9" * 400}, "is not a size"),
        ({"memory": "1GiB", "memory_bytes": 5}, "either memory or memory_bytes"),
        ({"momory": "8GiB"}, "unknown option 'momory'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineConfig.from_options(options, {})


def test_a_wrong_environment_is_refused() -> None:
    with pytest.raises(UsageError, match="EXPERTSTREAM_THREADS must be a whole number greater than 0; got 'many'"):
        EngineConfig.from_options({}, {"EXPERTSTREAM_THREADS": "many"})
