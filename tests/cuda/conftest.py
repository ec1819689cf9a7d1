from __future__ import annotations

import os

import pytest

from expertstream.cuda.driver import Driver, NvidiaDriver

from .emulated import EmulatedDriver


@pytest.fixture(scope="session")
def driver() -> Driver:
    """The GPU, if this is `make gpu-test`; otherwise the emulated one."""
    return NvidiaDriver() if os.environ.get("EXPERTSTREAM_GPU_TESTS") else EmulatedDriver()
