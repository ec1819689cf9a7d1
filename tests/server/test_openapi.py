"""Whatever is sent that the OpenAPI document allows, or forbids: no answer is the server's own fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from expertstream.engine import LLM

from .conftest import Server


@pytest.fixture(scope="module")
def quick() -> Iterator[Server]:
    """With a context so short that no answer takes long."""
    with LLM(context_length=96, sequences=4) as llm:
        server = Server(llm)
        yield server
        server.stop()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_answer_is_a_server_error(quick: Server, mode: GenerationMode) -> None:
    seen = set()
    for found in schemathesis.openapi.from_url(f"{quick.url}/openapi.json").get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing that could be wrong about it

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            response = case.call(timeout=30)
            seen.add((operation.path, response.status_code))  # noqa: B023
            assert response.status_code < 500, response.text

        check()
    assert len({path for path, _ in seen}) == (10 if mode is GenerationMode.POSITIVE else 5)
