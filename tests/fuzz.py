"""Coverage-guided fuzzing of everything that is read from strangers: `make fuzz FUZZ_SECONDS=600`, and a minute in every run of CI.

The first byte of an input chooses a target, the rest is what it reads: the JSON of a file's header or of a request, or a model's output.
Lengths and checksums around it are right, so that what lies behind them is reached. Whatever a target raises but the errors that it
documents is a finding; atheris then writes the input to a file crash-…, and `python tests/fuzz.py crash-…` runs it again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["expertstream"]):
    from expertstream.checkpoint.safetensors import read_header
    from expertstream.engine import embedded_model
    from expertstream.errors import CheckpointError, ExpertStreamError, RequestError, UsageError
    from expertstream.server.anthropic import MessagesRequest
    from expertstream.server.openai import ChatRequest, CompletionRequest
    from expertstream.server.responses import ResponsesRequest
    from expertstream.server.wire import parse_request
    from expertstream.state_file import StateFile, StateFileError
    from expertstream.summary import summarize
    from expertstream.text.output import CallDelta, CallEnd, Content, OutputParser, Reasoning

import xxhash

FOLDER = Path(tempfile.mkdtemp(prefix="expertstream-fuzz-"))
TOOLS: list[dict[str, Any]] = [
    {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": ["array", "null"], "items": {"type": "number"}},
        "d": {"anyOf": [{"type": "object"}, {"enum": ["x", "y"]}]}}, "required": ["a"]}},
    {"name": "g"},
]  # fmt: skip


def safetensors(data: bytes) -> None:
    file = FOLDER / "x.safetensors"
    file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(64))
    try:
        tensors = read_header(file)
    except CheckpointError:
        return
    end = file.stat().st_size
    assert all(t.offset >= 0 and t.nbytes >= 0 and t.offset + t.nbytes <= end for t in tensors.values())


def manifest(data: bytes) -> None:
    """In a pack that is whole otherwise."""
    pack = FOLDER / "pack"
    if not pack.exists():
        shutil.copytree(embedded_model(), pack)
    (pack / "expertstream.json").write_bytes(data)
    try:
        summarize(pack)
    except ExpertStreamError:
        return


def state(data: bytes) -> None:
    file = FOLDER / "x.state"
    file.write_bytes(b"ESSTATE1" + len(data).to_bytes(4, "little") + data + xxhash.xxh3_64_digest(data) + bytes(64))
    try:
        found = StateFile.open(file)
        assert found.size == file.stat().st_size
        entries = [(e["dtype"], tuple(e["shape"])) for e in found.header["arrays"]]
        found.integer("position")
        found.read(0, len(entries), entries)
    except StateFileError:
        return


def splitter(data: bytes) -> None:
    """However the text is cut, the same comes of it."""
    text = data.decode("utf-8", "replace")
    seen = []
    for step in (len(text) or 1, 1, 7):
        parser = OutputParser(TOOLS, reasoning=len(data) % 2 == 0)
        events = [e for i in range(0, len(text), step) for e in parser.feed(text[i : i + step])] + parser.finish()
        seen.append(
            (
                "".join(e.text for e in events if isinstance(e, Content)),
                "".join(e.text for e in events if isinstance(e, Reasoning)),
                "".join(e.json for e in events if isinstance(e, CallDelta)),
                [e for e in events if isinstance(e, CallEnd)],
            )
        )
    assert seen[0] == seen[1] == seen[2], seen


def request(kind: Any) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        try:
            asked, _, _ = parse_request(kind, data)
            if hasattr(asked, "generation_request"):
                asked.generation_request()
        except (RequestError, UsageError):
            return

    return one


TARGETS: list[Callable[[bytes], None]] = [
    safetensors, manifest, state, splitter, request(ChatRequest), request(MessagesRequest), request(ResponsesRequest),
    request(CompletionRequest),
]  # fmt: skip


def seeds() -> list[bytes]:
    """An input of each kind that is as it should be."""
    said: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    values: list[Any] = [
        {"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}, "__metadata__": {"format": "pt"}},
        json.loads((embedded_model() / "expertstream.json").read_text()),
        {"position": 64, "parent": "", "arrays": [{"dtype": "float32", "shape": [2, 8], "xxh3": "0" * 16}]},
        None,
        {"model": "m", "messages": said, "tools": [tool], "tool_choice": "auto", "stop": ["a"], "stream_options": {"include_usage": True}},
        {"model": "m", "max_tokens": 5, "messages": said, "tools": [{"name": "f", "input_schema": {"type": "object"}}], "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"model": "m", "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}], "reasoning": {"effort": "low"}},
        {"model": "m", "prompt": ["a", "b"], "logprobs": 2, "echo": True},
    ]  # fmt: skip
    texts = [
        "think</think>\n\nHello <tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
        'a <tool_call>\n{"name": "f", "arguments": {"a": "x", "b": 3}}\n</tool_call> b',
    ]
    found = [bytes([i]) + json.dumps(value).encode() for i, value in enumerate(values) if value is not None]
    return found + [b"\x03" + text.encode() for text in texts]


def one_input(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def main() -> None:
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
        one_input(seed)
    files = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    process = os.getpid()
    try:
        atheris.Setup([*sys.argv, *([] if files else [str(corpus)])], one_input)
        atheris.Fuzz()
    finally:
        if os.getpid() == process:
            shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
