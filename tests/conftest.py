from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from expertstream import _native
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.convert import convert

from . import oracle

# The same examples in every run, so that a change is judged by what it changed; `--hypothesis-profile explore` looks for new ones.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("fixed")

SMALL = oracle.config_of(num_experts=24, num_experts_per_tok=3, hidden_size=128, moe_intermediate_size=64)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint as `transformers` writes it: 4 layers of 24 experts."""
    model = oracle.make_oracle(SMALL, torch.bfloat16)
    return oracle.save_hf(tmp_path_factory.mktemp("hf"), SMALL, model, torch.bfloat16)


@pytest.fixture(scope="session")
def pack_folder(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, 4-bit experts and 8-bit trunk, as a pack. Tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("pack") / "pack"
    convert(hf_folder, folder, BitPolicy(), threads=2)
    return folder


@pytest.fixture(scope="session")
def mlx_folder(pack_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack's values as mlx-lm would have written them."""
    return oracle.save_mlx(tmp_path_factory.mktemp("mlx"), pack_folder, SMALL, (4, 64))


@pytest.fixture
def faults() -> Iterator[None]:
    """Takes back whatever faults a test sets."""
    yield
    _native.clear_faults()
