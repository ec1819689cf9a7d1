"""Whole models on a GPU: the CPU's logits, bit for bit, wherever experts lie; states go from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertstream import LLM
from expertstream.batch import Batch
from expertstream.cuda import driver as drivers
from expertstream.cuda.driver import Driver

from .. import oracle
from ..models.test_architectures import CASES, SIMPLE

TOKENS = 200
DEVICES = ["cpu", "cuda"]


@pytest.fixture(autouse=True)
def card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Device 0 is the GPU of these tests, emulated or not."""
    monkeypatch.setattr(drivers, "open_driver", lambda number: driver)
    yield driver


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, pack_folder: Path) -> Callable[[str], Path]:
    """A checkpoint of each architecture, made once."""
    found = {"qwen3_5_moe": pack_folder}

    def make(name: str) -> Path:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            model = oracle.make_oracle(CASES[name], torch.bfloat16)
            found[name] = oracle.save_hf(folder, CASES[name], model, torch.bfloat16)
        return found[name]

    return make


def passes(llm: LLM, tokens: np.ndarray) -> np.ndarray:
    """A prompt in two parts, a few single tokens, and a batch."""
    caches = [llm.session().cache for _ in range(3)]
    rows = [llm.model(tokens[:128], caches[0], prompt=True), llm.model(tokens[128:150], caches[0], prompt=True)]
    rows.append(llm.model(tokens[:9], caches[1], all_logits=True))
    rows.append(llm.model(tokens[9:80], caches[2], prompt=True))
    rows += [llm.model(tokens[t : t + 1], caches[0]) for t in range(150, 156)]
    rows += [llm.model.forward(Batch(tokens[t : t + 3], caches)) for t in range(156, 160)]
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["qwen3_5_moe", *SIMPLE])
def test_logits_are_the_cpus_wherever_experts_lie(folder_of: Callable[[str], Path], name: str) -> None:
    folder = folder_of(name)
    options: dict[str, Any] = {"context_length": 256, "prefill_chunk": 128, "threads": 1}
    with LLM(folder, memory="1GiB", device="cpu", **options) as llm:
        tokens = oracle.random_tokens(llm.checkpoint.config, TOKENS)
        expected, ram = passes(llm, tokens), llm.plan
    with LLM(folder, memory="1GiB", device="cuda", **options) as llm:
        whole = llm.vram_plan
        assert (whole is not None and "GPU" in llm.describe()) or "NVIDIA" in llm.describe()
    fixed = whole.trunk_bytes + whole.state_bytes + whole.scratch_bytes
    for vram, memory in (
        (whole.budget_bytes, "1GiB"),
        (fixed + 30 * whole.slot_bytes, "1GiB"),
        (fixed + 20 * whole.slot_bytes, (16 << 20) + 12 * ram.slot_bytes),
    ):
        with LLM(folder, memory=memory, vram=vram, device="cuda", **options) as llm:
            assert np.array_equal(passes(llm, tokens), expected)
            assert np.array_equal(passes(llm, tokens), expected)
