"""A GPU's memory, its faults, and states that move between devices."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import LLM, BudgetError, DeviceError, UsageError
from expertstream.config import EngineConfig
from expertstream.cuda import driver as drivers
from expertstream.cuda.device import Device, StateArray
from expertstream.cuda.driver import Driver, NvidiaDriver, device_count

from .. import oracle
from .emulated import EmulatedDriver

NO_GPU = pytest.mark.skipif(device_count() > 0, reason="this machine has a GPU")
OPTIONS: dict[str, Any] = {"memory": "1GiB", "context_length": 512, "prefill_chunk": 128, "threads": 1}


@pytest.fixture
def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Device 0 is the GPU of these tests, emulated or not."""
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    yield driver


def answer(llm: LLM, session: Any, prompt: np.ndarray, count: int = 6) -> list[Any]:
    params = llm.sampling_params(temperature=0, max_tokens=count, logprobs=0)
    return [(r.token, r.logprob and r.logprob.logprob) for r in session.generate(prompt, params)]


def test_freed_memory_is_used_again() -> None:
    driver = EmulatedDriver()
    device = Device(driver)
    first = device.empty((1000,))
    address = first.address
    del first
    assert device.empty((990,)).address == address  # of the same size class
    with device.private_memory() as pool:
        inside = device.empty((1000,))
    assert inside.address != address
    place = inside.address
    del inside
    assert pool[4096] == [place] and device.empty((1000,)).address != place  # a graph's memory stays its own


def test_a_full_card_gives_back_what_is_free_and_then_says_so() -> None:
    device = Device(EmulatedDriver(4 << 20))
    kept = [device.empty((1 << 20,), np.uint8) for _ in range(3)]
    del kept
    assert device.empty((3 << 20,), np.uint8).nbytes == 3 << 20  # from the free list's memory
    with pytest.raises(BudgetError, match="out of memory"):
        device.empty((5 << 20,), np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_state_arrays_behave_like_numpys(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=3)))
    ours, expected = StateArray(_DEVICE, shape, "float32"), np.zeros(shape, np.float32)
    for step in range(4):
        begin = data.draw(st.integers(0, shape[1]))
        end = data.draw(st.integers(begin, shape[1]))
        key: Any = slice(None) if data.draw(st.booleans()) else (slice(None), slice(begin, end))
        values: Any = 0 if data.draw(st.booleans()) else np.random.default_rng(step).random(expected[key].shape)
        ours[key], expected[key] = values, values
        assert np.array_equal(ours[key], expected[key]) and np.array_equal(ours.copy(), expected)
        assert ours[:, begin:end].flags.c_contiguous and ours.dtype.name == "float32"


_DEVICE = Device(EmulatedDriver())


@NO_GPU
def test_without_a_gpu_the_cpu_is_used_and_cuda_refused(pack_folder: Path) -> None:
    with LLM(pack_folder, **OPTIONS) as llm:
        assert llm.vram_plan is None
    with pytest.raises(DeviceError, match="device=cpu"):
        LLM(pack_folder, device="cuda", **OPTIONS)
    command = [sys.executable, "-m", "expertstream", "run", str(pack_folder), "--device", "cuda", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 8 and "--device cpu" in done.stderr and "Traceback" not in done.stderr


def test_devices_are_checked() -> None:
    for bad in ("gpu", "cuda:", "cuda:x", "cuda:-1", ""):
        with pytest.raises(UsageError, match="device must be auto, cpu, cuda or cuda:N"):
            EngineConfig.from_options({"device": bad})
    with pytest.raises(UsageError, match="vram must be greater than 0"):
        EngineConfig.from_options({"vram": 0})
    with pytest.raises(UsageError, match="ops must be cpu"):
        EngineConfig.from_options({"device": "cuda", "ops": "reference"})
    assert EngineConfig.from_options({}, {"EXPERTSTREAM_DEVICE": "cuda:1"}).device == "cuda:1"
    assert EngineConfig.from_options({"device": "cpu", "vram": "2GiB"}, {"EXPERTSTREAM_DEVICE": "cuda"}).device == "cpu"


@pytest.mark.skipif(device_count() == 0, reason="no GPU")
def test_a_card_that_does_not_exist_is_named() -> None:
    with pytest.raises(DeviceError, match="cuda:99 does not exist"):
        NvidiaDriver(99)


def test_too_little_vram_names_what_would_do(
    card: Driver, pack_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BudgetError, match=r"vram is 1\.0 MiB, but this model needs at least vram=(\d+)MiB") as error:
        LLM(pack_folder, device="cuda", vram="1MiB", **OPTIONS)
    least = str(error.value).partition("at least vram=")[2].partition(":")[0]
    with LLM(pack_folder, device="cuda", vram=least, **OPTIONS) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, 70)
        on_gpu = answer(llm, llm.session(), tokens)
    monkeypatch.setattr("expertstream.engine.device_count", lambda: 1)
    with caplog.at_level(logging.WARNING), LLM(pack_folder, vram="1MiB", **OPTIONS) as llm:
        assert llm.vram_plan is None and "the GPU is not used: vram is 1.0 MiB" in caplog.text
        assert answer(llm, llm.session(), tokens) == on_gpu
    with LLM(pack_folder, **OPTIONS) as llm:
        assert llm.vram_plan is not None, "a GPU that is found is the default"


def test_a_session_goes_on_on_the_other_device(card: Driver, pack_folder: Path, tmp_path: Path) -> None:
    results, fingerprints = {}, set()
    for first, second in (("cpu", "cpu"), ("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")):
        with LLM(pack_folder, device=first, **OPTIONS) as llm:
            tokens = oracle.random_tokens(llm.checkpoint.config, 200)
            session = llm.session()
            begun = answer(llm, session, tokens[:150])
            session.save(tmp_path / "state")
            fingerprints.add(llm.state_fingerprint())
        with LLM(pack_folder, device=second, **OPTIONS) as llm:
            session = llm.session()
            session.load(tmp_path / "state")
            results[first, second] = begun, answer(llm, session, tokens[150:])
    assert len(fingerprints) == 1
    assert all(result == results["cpu", "cpu"] for result in results.values())


def test_prefixes_are_reused_and_portable(card: Driver, pack_folder: Path, tmp_path: Path) -> None:
    answers = []
    for device in ("cuda", "cpu", "cuda"):
        with LLM(pack_folder, device=device, prefix_cache_bytes=8 << 20, **OPTIONS) as llm:
            llm.keep_prefixes(tmp_path / "prefixes", 32 << 20)
            tokens = oracle.random_tokens(llm.checkpoint.config, 300)
            answers += [answer(llm, llm.session(), tokens) for _ in range(2)]
            assert llm.prefixes is not None
            assert llm.prefixes.tokens_reused >= (256 if len(answers) == 2 else 512)
            llm.prefixes.flush()
    assert all(other == answers[0] for other in answers)


@pytest.mark.parametrize("where", ["launch", "replay"])
def test_a_card_that_fails_ends_the_request_and_nothing_else(
    pack_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, tmp_path: Path
) -> None:
    driver = EmulatedDriver()
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    with LLM(pack_folder, device="cuda", **OPTIONS) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, 40)
        session = llm.session()
        expected = answer(llm, session, tokens)
        session.save(tmp_path / "state")
        following = answer(llm, session, tokens[:9])

        def fails(*_: Any) -> None:
            raise DeviceError("the GPU failed: unspecified launch failure; load the model again")

        with monkeypatch.context() as broken:
            broken.setattr(driver, where, fails)
            with pytest.raises(DeviceError, match="the GPU failed"):
                answer(llm, llm.session(), tokens)
        assert answer(llm, llm.session(), tokens) == expected
    with LLM(pack_folder, device="cpu", **OPTIONS) as llm:  # what was on the host goes on without the card
        session = llm.session()
        session.load(tmp_path / "state")
        assert answer(llm, session, tokens[:9]) == following


def test_closing_gives_everything_back(pack_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EmulatedDriver()
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    llm = LLM(pack_folder, device="cuda", **OPTIONS)
    answer(llm, llm.session(), oracle.random_tokens(llm.checkpoint.config, 40))
    assert driver.free_bytes() < driver.total_bytes
    llm.close()
    del llm
    assert not driver._registered
    import gc

    gc.collect()
