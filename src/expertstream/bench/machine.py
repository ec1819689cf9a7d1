"""Measures a machine in seconds: memory bandwidth, arithmetic, and the disk with the engine's access pattern."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import _native
from ..errors import UsageError
from ..units import format_bytes
from ..user_files import IoSettings

__all__ = ["DiskRate", "arithmetic_peak", "best_setting", "disk_rates", "memory_bandwidth", "thread_counts", "timed"]


def timed(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of several runs, after a warm-up run."""
    run()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]


def memory_bandwidth(threads: int, size: int = 1 << 30) -> float:
    """Bytes per second that `threads` threads read from a block of `size` bytes, which should be far larger than the caches."""
    memory = _native.Arena(size).view()
    memory[:: 1 << 12] = 1  # touch every page
    engine = _native.Engine(threads, _native.available_isas()[-1], 8)
    return size / timed(lambda: engine.read_memory(memory))


def arithmetic_peak(threads: int, isa: str = "") -> float:
    """Multiply-adds per second of the integer dot product on registers: the upper bound of any matrix product."""
    engine = _native.Engine(threads, isa or _native.available_isas()[-1], 8)
    rounds = 1000
    while True:
        begin = time.perf_counter()
        engine.multiply(rounds)
        if time.perf_counter() - begin > 0.02:
            break
        rounds *= 4
    products = engine.multiply(rounds)
    return float(products / timed(lambda: engine.multiply(rounds)))


@dataclass(frozen=True)
class DiskRate:
    """Random reads of whole records, `queue_depth` pieces of `split_bytes` in flight."""

    direct: bool
    queue_depth: int
    split_bytes: int
    record_bytes: int
    bytes_per_second: float


@contextmanager
def _files(path: Path, record_bytes: int) -> Iterator[list[Path]]:
    """Files to read: a pack's experts, a checkpoint's safetensors or a single file; otherwise a temporary file."""
    found = (
        [path] if path.is_file() else sorted(path.glob("experts-*.safetensors")) or sorted(path.rglob("*.safetensors"))
    )
    found = [file for file in found if file.stat().st_size >= 64 * record_bytes]
    if found:
        yield found
        return
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder")
    made = path / ".expertstream-bench"
    block = np.random.default_rng(0).bytes(1 << 24)
    try:
        try:
            with made.open("wb") as file:
                for _ in range(64):
                    file.write(block)
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"{path}: cannot write a test file of 1 GiB there: {error.strerror}") from None
        yield [made]
    finally:
        made.unlink(missing_ok=True)


def disk_rates(
    path: Path,
    record_bytes: int,
    depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    splits: Sequence[int] = (128 << 10, 256 << 10, 1 << 20),
    seconds: float = 1.0,
    report: Callable[[DiskRate], None] = lambda rate: None,
) -> list[DiskRate]:
    """Every depth, O_DIRECT and buffered (each cold: the files are dropped from the page cache first), then every split at the best
    direct depth. Raises UsageError."""
    record_bytes = -(-record_bytes // 4096) * 4096
    rates: list[DiskRate] = []

    def measure(direct: bool, depth: int, split: int) -> None:
        value = _one_rate(files, direct, depth, split, record_bytes, seconds)
        if value is not None:
            rates.append(DiskRate(direct, depth, split, record_bytes, value))
            report(rates[-1])

    with _files(path, record_bytes) as files:
        for direct in (True, False):
            for depth in depths:
                measure(direct, depth, 256 << 10)
        if any(rate.direct for rate in rates):
            depth = best_setting([rate for rate in rates if rate.direct]).queue_depth
            for split in splits:
                if split != 256 << 10:
                    measure(True, depth, split)
    return rates


def _one_rate(
    files: list[Path], direct: bool, depth: int, split: int, record_bytes: int, seconds: float
) -> float | None:
    """Bytes per second; None if the file system refuses O_DIRECT."""
    try:
        fds = [os.open(file, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)) for file in files]
    except OSError:
        return None
    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    # Enough records in flight to keep `depth` pieces busy, and as many as one layer of a model requests.
    records = max(8, -(-depth * split // record_bytes) + 1)
    arena = _native.Arena(records * record_bytes)
    try:
        reader = _native.uring_reader(depth, split)
    except RuntimeError:
        reader = _native.pread_reader(depth, split)
    reader.register_memory(arena)
    counts = [max(1, (os.fstat(fd).st_size - 4096) // record_bytes) for fd in fds]
    rng, free, total = np.random.default_rng(), list(range(records)), 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        requests, dests = [], []
        while free:
            slot, file = free.pop(), int(rng.integers(len(fds)))
            offset = 4096 + int(rng.integers(counts[file])) * record_bytes
            length = min(record_bytes, (os.fstat(fds[file]).st_size - offset) // 4096 * 4096)
            if length <= 0:
                offset, length = 0, min(record_bytes, os.fstat(fds[file]).st_size // 4096 * 4096)
            requests.append((slot, fds[file], direct, offset, length, length))
            dests.append(slot * record_bytes)
        reader.submit(arena, np.array(requests, np.int64), np.array(dests, np.int64))
        for slot, error, count, _ in reader.wait(1):
            if error:
                raise UsageError(f"{files[0].parent}: read failed: {os.strerror(error)}")
            total += count
            free.append(slot)
    elapsed = time.perf_counter() - begin
    while reader.pending:
        reader.wait(1)
    for fd in fds:
        os.close(fd)
    return total / elapsed


def best_setting(rates: list[DiskRate]) -> DiskRate:
    """The lowest queue depth that reaches 95 % of the best rate: a deeper queue only adds latency."""
    best = max(rate.bytes_per_second for rate in rates)
    good = [rate for rate in rates if rate.bytes_per_second >= 0.95 * best]
    return min(good, key=lambda rate: (rate.queue_depth, -rate.bytes_per_second))


def remember(path: Path, rates: list[DiskRate]) -> str:
    """Saves the best direct setting for this disk, with at least 8 reads in flight, for all later runs; returns a description."""
    chosen = best_setting([rate for rate in rates if rate.direct] or rates)
    depth = max(chosen.queue_depth, 8)
    IoSettings(depth, chosen.split_bytes, chosen.bytes_per_second).save(path)
    return f"{depth} reads of {format_bytes(chosen.split_bytes)} in flight, {chosen.bytes_per_second / 1e9:.2f} GB/s"
