"""Routing traces: which experts a model selected for each token. Recorded from a run, read from a file, replayed through policies.

A trace is an .npz: `experts` (tokens, layers, top_k), unsigned, distinct in each row; `starts`, the positions at which sequences
begin; `num_experts`. It answers how often a cache of a given size would have held the requested expert.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine import LLM
from ..errors import UsageError
from ..experts.policy import Policy, make_policy
from ..files import open_regular, read_text
from ..ops import F32, I64, Ops, Weight

__all__ = ["BELADY", "SHARES", "Trace", "hit_rate", "load_trace", "record", "save_trace"]

BELADY = "belady"
MAX_BYTES = 1 << 30  # per array
SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)  # of a layer's experts


@dataclass(frozen=True)
class Trace:
    """experts (tokens, layers, top_k), distinct in each row; starts: where sequences begin."""

    experts: I64
    starts: I64
    num_experts: int


def load_trace(path: Path) -> Trace:
    """Reads an .npz as above, or JSON lines {"tok": …, "layers": [[expert, …], …]}, one per token. Raises UsageError."""
    try:
        if path.suffix == ".jsonl":
            rows = [json.loads(line)["layers"] for line in read_text(path).splitlines()]
            experts, starts, count = np.array(rows, np.int64), np.zeros(1, np.int64), None
        else:
            with open_regular(path) as file, np.lib.npyio.NpzFile(file) as data:
                assert data.zip is not None
                for name in data.files:
                    _check_member(data.zip, name)
                experts = data["experts"].astype(np.int64)
                starts = data["starts"].astype(np.int64) if "starts" in data else np.zeros(1, np.int64)
                count = int(data["num_experts"]) if "num_experts" in data else None
    except (
        OSError, ValueError, KeyError, TypeError, EOFError, OverflowError, RecursionError, NotImplementedError, RuntimeError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise UsageError(f"{path}: not a routing trace (an .npz with the array experts): {error}") from None
    if experts.ndim != 3 or not experts.size:
        raise UsageError(f"{path}: experts must have shape (tokens, layers, top-k); got {experts.shape}")
    # Experts that were never selected do not appear; models have a multiple of 8 experts, so round up.
    count = count or -(-(int(experts.max()) + 1) // 8) * 8
    ordered = np.sort(experts, -1)
    if experts.min() < 0 or experts.max() >= count or (ordered[..., 1:] == ordered[..., :-1]).any():
        raise UsageError(f"{path}: each row of experts must hold distinct numbers from 0 to {count - 1}")
    if (
        starts.ndim != 1
        or not starts.size
        or starts[0] != 0
        or (np.diff(starts) <= 0).any()
        or starts[-1] >= len(experts)
    ):
        raise UsageError(f"{path}: starts must begin with 0 and increase to less than {len(experts)}")
    return Trace(experts, starts, count)


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Raises ValueError for an array whose header or size in the archive requires more memory than a trace can."""
    info = archive.getinfo(name if name in archive.namelist() else f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name}: unsupported array version {version}")
        shape, _, dtype = read(file)
    if dtype.kind not in "iuf" or math.prod(shape) * dtype.itemsize > min(info.file_size, MAX_BYTES):
        raise ValueError(f"{name}: {math.prod(shape)} values of {dtype} exceed the file or the limit of a trace")


def save_trace(path: Path, trace: Trace) -> None:
    """Raises UsageError."""
    kind = np.uint8 if trace.num_experts <= 256 else np.uint16
    try:
        with path.open("wb") as file:
            np.savez_compressed(
                file, experts=trace.experts.astype(kind), starts=trace.starts, num_experts=np.int64(trace.num_experts)
            )
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


class _Recorder:
    """Use `LLM(..., instrument=recorder.instrument)`; run one sequence at a time."""

    def __init__(self) -> None:
        self._layers: dict[int, int] = {}  # router weight → layer, in the order of their first calls
        self._chosen: list[list[I64]] = []  # by layer
        self._starts: list[int] = []
        self._inner: Any = None

    def instrument(self, ops: Ops) -> Ops:
        self._inner = ops
        recorder: Any = self
        return recorder  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def begin_text(self) -> None:
        self._starts.append(sum(map(len, self._chosen[0])) if self._chosen else 0)

    def route(self, x: F32, weight: Weight, top_k: int, renormalize: bool = True) -> tuple[F32, I64]:
        weights, selected = self._inner.route(x, weight, top_k, renormalize)
        layer = self._layers.setdefault(id(weight), len(self._layers))
        if layer == len(self._chosen):
            self._chosen.append([])
        self._chosen[layer].append(selected)
        return weights, selected

    def trace(self, num_experts: int) -> Trace:
        experts = np.stack([np.concatenate(chosen) for chosen in self._chosen], 1)
        return Trace(experts, np.array(self._starts, np.int64), num_experts)


def record(
    path: Path, prompts: Sequence[str], chat: bool, max_tokens: int, seed: int, memory: str | None = None
) -> Trace:
    """The routing of prompts and their continuations. Prefetch is off: its predictions would be recorded as selections."""
    recorder = _Recorder()
    with LLM(path, device="cpu", instrument=recorder.instrument, prefetch=0, memory=memory) as llm:
        for i, prompt in enumerate(prompts):
            recorder.begin_text()
            given: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed + i}
            answer = llm.chat([{"role": "user", "content": prompt}], **given) if chat else llm.generate(prompt, **given)
            for _ in answer:
                pass
        return recorder.trace(llm.model_config.num_experts)


def hit_rate(trace: Trace, policy: str, capacity: int) -> float:
    """The share of all experts requested in the trace that a cache with `capacity` slots per layer would have held. Cold misses count. As
    in the engine, tokens come one at a time, and an expert that gets no slot is used but not cached; unlike in the engine, the tokens of
    a prompt are treated like decoded ones."""
    replay: Callable[[I64, int], int] = (
        _belady if policy == BELADY else lambda uses, c: _replay(uses, make_policy(policy), c)
    )
    experts = np.sort(trace.experts, -1)  # the order in which the engine requests them
    hits = sum(replay(experts[:, layer], capacity) for layer in range(experts.shape[1]))
    return hits / trace.experts.size


def _replay(uses: I64, policy: Policy, capacity: int) -> int:
    resident: set[int] = set()
    hits = 0
    for row in uses.tolist():
        wanted, arrived = set(row), list[int]()
        for expert in row:
            if expert in resident:
                policy.touch([expert])
                hits += 1
            elif len(resident) + len(arrived) < capacity:
                arrived.append(expert)
            else:
                victim = policy.evict(wanted)
                if victim is not None:
                    resident.remove(victim)
                    arrived.append(expert)
        for expert in arrived:
            policy.insert(expert)
            resident.add(expert)
    return hits


def _next_uses(uses: I64) -> Iterator[list[int]]:
    """For each row, the row in which each of its experts is used next; the number of rows if never."""
    ahead: list[list[int]] = []
    at: dict[int, int] = {}
    for i in range(len(uses) - 1, -1, -1):
        row = uses[i].tolist()
        ahead.append([at.get(expert, len(uses)) for expert in row])
        at.update((expert, i) for expert in row)
    return reversed(ahead)


def _belady(uses: I64, capacity: int) -> int:
    """The optimum (Belady, 1966), which may also decide not to cache: the expert whose next use is latest goes."""
    following: dict[int, int] = {}  # resident expert → its next use
    hits = 0
    for row, ahead in zip(uses.tolist(), _next_uses(uses), strict=True):
        hits += sum(expert in following for expert in row)
        following.update(zip(row, ahead, strict=True))
        for _ in range(len(following) - capacity):
            del following[max(following, key=following.__getitem__)]
    return hits
