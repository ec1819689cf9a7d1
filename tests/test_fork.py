"""A forked process has no threads and no reads of its own: it is told so, and its parent does not notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from expertstream import LLM, RequestError
from expertstream.batch import Batch


def in_a_fork(work: Callable[[], None], seconds: int = 30) -> int:
    """Runs it in a child that leaves as programs do, by the interpreter's end; returns the exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which is the point
        child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_every_call_in_a_fork_is_one_clear_error(reader: str) -> None:
    with LLM(memory="24MiB", context_length=256, reader=reader) as llm:
        tokens = llm.tokenizer.encode("Once upon a time there was")
        session = llm.session()
        before = llm.model(tokens, session.cache)
        params = llm.sampling_params(max_tokens=2)
        calls: list[Callable[[], object]] = [
            lambda: list(llm.generate("x", max_tokens=1)), lambda: list(llm.chat([{"role": "user", "content": "x"}])), llm.session,
            lambda: list(session.generate(tokens, params)), lambda: llm.model(tokens, session.cache),
            lambda: llm.model.forward(Batch(tokens[:1], [session.cache])),
        ]  # fmt: skip

        def child() -> None:
            for call in calls:
                with pytest.raises(
                    RequestError, match=r"was opened by process \d+ and cannot be used in its fork \d+; open it here"
                ):
                    call()
            llm.close()

        assert in_a_fork(child) == 0
        again = llm.session()
        assert np.array_equal(llm.model(tokens, again.cache), before)
        long = llm.tokenizer.encode("a b c d e f g h " * 10)
        assert np.isfinite(llm.model(long, again.cache)).all()


@pytest.mark.parametrize("reader", ["uring", "pread"])
def test_a_forked_interpreter_ends(reader: str) -> None:
    """Its destructors wait for nobody; and a fork in the middle of reads does not change what the parent reads."""
    code = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from expertstream import LLM
llm = LLM(memory="24MiB", context_length=512, reader={reader!r})
expected = [p.token for p in llm.generate("Once upon a time", max_tokens=60, temperature=0.0)]
found = []
for i, piece in enumerate(llm.generate("Once upon a time", max_tokens=60, temperature=0.0)):
    found.append(piece.token)
    if i % 10 == 0:
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
assert found == expected
llm.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
