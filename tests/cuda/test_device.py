"""A GPU's memory, its faults, and states that move between devices."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import LLM, BudgetError, DeviceError, RequestError, UsageError
from expertstream.batch import Batch
from expertstream.bench.profile import Profiler
from expertstream.config import EngineConfig
from expertstream.cuda import driver as drivers
from expertstream.cuda.device import Device, StateArray
from expertstream.cuda.driver import Driver, NvidiaDriver, device_count

from .. import oracle
from ..server.conftest import Server
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
    for device in ("auto", "cpu"):
        with pytest.raises(UsageError, match="vram needs a GPU"):
            LLM(pack_folder, device=device, vram="1GiB", **OPTIONS)
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
    monkeypatch.setattr("expertstream.cuda.driver.device_count", lambda: 1)
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


def test_a_profile_covers_the_gpus_ops(card: Driver, pack_folder: Path, tmp_path: Path) -> None:
    for vram in (None, "35MiB"):
        profiler = Profiler()
        with LLM(pack_folder, device="cuda", vram=vram, instrument=profiler.instrument, **OPTIONS) as llm:
            profiler.watch(llm)
            tokens = oracle.random_tokens(llm.checkpoint.config, 40)
            profiled = answer(llm, llm.session(), tokens)
        with LLM(pack_folder, device="cpu", **OPTIONS) as llm:
            assert answer(llm, llm.session(), tokens) == profiled
        phases = profiler.phases(decode=True)
        assert {"mix", "norm", "router", "experts", "shared", "head", "python"} <= phases.keys()
        assert profiler.selected is not None
        assert (profiler.selected.sum(1) >= 5 * llm.top_k).all()
        profiler.save(tmp_path / "trace.json")


def test_a_server_on_the_gpu(card: Driver, pack_folder: Path) -> None:
    """Two texts at once, with the text of the CPU; metrics and status know the card."""
    prompts = [[5, 9, 30, 4], [7, 8]]
    texts: dict[str, list[str]] = {}
    for device in ("cpu", "cuda"):
        vram = "35MiB" if device == "cuda" else None
        with LLM(pack_folder, device=device, vram=vram, sequences=2, **OPTIONS) as llm:
            server = Server(llm)
            try:
                ask = server.openai().completions.create
                with ThreadPoolExecutor(2) as pool:
                    answers = [pool.submit(ask, model="", prompt=p, max_tokens=6, temperature=0) for p in prompts]
                    texts[device] = [a.result().choices[0].text for a in answers]
                if device == "cuda":
                    metrics = httpx.get(f"{server.url}/metrics").text
                    for name in ("vram_budget_bytes 3.670016e+07", "vram_experts ", "vram_bytes_copied_total "):
                        assert f"expertstream_{name}" in metrics
                    waited = next(
                        x for x in metrics.splitlines() if x.startswith("expertstream_gpu_wait_seconds_total")
                    )
                    assert 0 < float(waited.split()[1]) < 600
                    status = httpx.get(f"{server.url}/status").json()
                    assert status["memory"]["vram"]["trunk"] > 0 and status["experts"]["resident"] > 0
                    assert card.name in status["engine"]
            finally:
                server.stop()
    assert texts["cpu"] == texts["cuda"]


def test_recordings_give_their_memory_back(pack_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least used ones when there are many, all when the card is full; where one does not fit, kernels are launched one by one."""
    driver = EmulatedDriver(256 << 20)
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    monkeypatch.setattr("expertstream.ops.cuda._MOST_RECORDINGS", 2)
    with LLM(pack_folder, device="cpu", sequences=4, **OPTIONS) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, 40)
        expected = batches(llm, tokens)
    with LLM(pack_folder, device="cuda", vram="64MiB", sequences=4, **OPTIONS) as llm:
        ops: Any = llm.ops
        assert np.array_equal(batches(llm, tokens), expected)
        assert len(ops._recordings) == 2
        assert np.array_equal(batches(llm, tokens), expected)
        full = [ops.device.empty((1 << 20,), np.uint8) for _ in range((driver.free_bytes() >> 20) + 1)]
        assert not ops._recordings, "the card was full: the recordings made room"

        def refuse(size: int) -> int:
            raise BudgetError("the GPU is out of memory")

        del full
        with monkeypatch.context() as less:
            less.setattr(driver, "begin_capture", lambda: refuse(0))
            less.setattr(driver, "end_capture", lambda: None)
            assert np.array_equal(batches(llm, tokens), expected)
        assert not ops._recordings
    assert not driver._registered


def test_a_sequence_that_ended_gives_its_memory_back(card: Driver, pack_folder: Path) -> None:
    with LLM(pack_folder, device="cuda", **OPTIONS) as llm:
        ops: Any = llm.ops
        tokens = oracle.random_tokens(llm.checkpoint.config, 40)
        answer(llm, llm.session(), tokens)
        before = ops.device.used_bytes
        for _ in range(5):
            answer(llm, llm.session(), tokens)
        assert ops._recordings and ops.device.used_bytes == before


def batches(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    """Steps of one to four sequences, three of each."""
    caches = [llm.session().cache for _ in range(4)]
    rows = [llm.model.forward(Batch(tokens[i : i + n], caches[:n])) for n in range(1, 5) for i in range(3)]
    return np.concatenate(rows)


def test_closing_gives_everything_back(pack_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EmulatedDriver()
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    llm = LLM(pack_folder, device="cuda", **OPTIONS)
    answer(llm, llm.session(), oracle.random_tokens(llm.checkpoint.config, 40))
    assert driver.free_bytes() < driver.total_bytes
    session = llm.session()
    llm.close()
    assert not driver._registered and driver.free_bytes() == driver.total_bytes
    with pytest.raises(RequestError, match="this model is closed"):
        session.cache.layers[0].arrays[0][:]
    unclosed = LLM(pack_folder, device="cuda", **OPTIONS)
    answer(unclosed, unclosed.session(), oracle.random_tokens(unclosed.checkpoint.config, 40))
    del unclosed, llm, session
    gc.collect()
    assert not driver._registered and driver.free_bytes() == driver.total_bytes
    with pytest.raises(BudgetError):
        LLM(pack_folder, device="cuda", vram="1MiB", **OPTIONS)
    assert driver.free_bytes() == driver.total_bytes


def test_a_card_that_is_gone_can_be_closed(pack_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EmulatedDriver()
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)

    def gone(*_: Any) -> Any:
        raise DeviceError("the GPU failed: no CUDA-capable device is detected; load the model again")

    with pytest.raises(DeviceError, match="no CUDA-capable device"), LLM(pack_folder, device="cuda", **OPTIONS) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, 40)
        answer(llm, llm.session(), tokens)
        for name in ("launch", "replay", "synchronize", "free", "unregister", "download", "upload", "drop"):
            monkeypatch.setattr(driver, name, gone)
        answer(llm, llm.session(), tokens)
