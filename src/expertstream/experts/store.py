"""Experts on disk: the byte ranges of each expert and their places in a slot. Plans reads; native/io executes them."""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.format import ALIGNMENT, ExpertLayout, align, record_pieces
from ..errors import ReadError, RequestError

__all__ = ["ExpertStore", "OpenFile", "ReadPlan", "SlotRead", "plan_read", "slot_bytes"]


@dataclass(frozen=True, slots=True)
class SlotRead:
    """One read: `length` bytes at `offset` of a file to `dest` in the slot, all multiples of 4,096; `needed` of them are required."""

    file: int  # index into the layout's files
    offset: int
    length: int
    needed: int
    dest: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The reads that load one expert into a slot, and the offsets of its parts there."""

    reads: tuple[SlotRead, ...]
    pieces: tuple[int, ...]  # where each of the format's parts begins in the slot


def plan_read(layout: ExpertLayout, expert: int) -> ReadPlan:
    """The reads that load one expert into a slot. Ranges that do not begin at a multiple of 4,096 are read from the previous multiple, so
    that any file can be read with O_DIRECT; their parts are then unaligned in the slot."""
    reads, starts, dest = [], [], 0
    for r, (length, room) in enumerate(zip(layout.lengths, layout.room, strict=True)):
        offset = int(layout.offsets[expert, r])
        begin = offset // ALIGNMENT * ALIGNMENT
        needed = offset - begin + length
        reads.append(SlotRead(int(layout.file_index[expert, r]), begin, align(needed), needed, dest))
        starts.append(dest + offset - begin)
        dest += align(offset - begin + room)
    return ReadPlan(tuple(reads), tuple(starts[r] + at for r, at in layout.pieces))


def slot_bytes(layout: ExpertLayout) -> int:
    """The slot size that fits any expert of a layer."""
    total = 0
    for r, room in enumerate(layout.room):
        total += align(room) + (0 if not (layout.offsets[:, r] % ALIGNMENT).any() else ALIGNMENT)
    return total if layout.in_place else max(total, record_pieces(layout.format)[1])


@dataclass
class OpenFile:
    """An open file, and its identity when it was opened."""

    path: Path
    fd: int
    direct: bool
    signature: tuple[int, int, int, int]  # device, inode, size, modification time


def _signature(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class ExpertStore:
    """The expert files of a model, open for reading. `direct`: with O_DIRECT where the file system supports it."""

    def __init__(self, layouts: list[ExpertLayout], direct: bool) -> None:
        self.layouts = layouts
        self._process = os.getpid()
        self.slot_bytes = max(slot_bytes(layout) for layout in layouts)
        self._files: dict[Path, OpenFile] = {}
        self._end = weakref.finalize(self, _close_all, self._files, self._process)
        self._end.atexit = False
        self._plans: list[dict[int, ReadPlan]] = [{} for _ in layouts]
        try:
            for layout in layouts:
                for path in layout.files:
                    if path not in self._files:
                        self._files[path] = _open(path, direct)
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether every file is read with O_DIRECT."""
        return all(file.direct for file in self._files.values())

    def file(self, layer: int, index: int) -> OpenFile:
        return self._files[self.layouts[layer].files[index]]

    def plan(self, layer: int, expert: int) -> ReadPlan:
        """plan_read(), cached for each expert."""
        plan = self._plans[layer].get(expert)
        if plan is None:
            plan = self._plans[layer][expert] = plan_read(self.layouts[layer], expert)
        return plan

    def check_unchanged(self, layer: int) -> None:
        """Raises ReadError if a file of this layer was replaced, overwritten or removed since it was opened, or cannot be examined."""
        for path in self.layouts[layer].files:
            try:
                now = _signature(os.stat(path))
            except FileNotFoundError:
                raise ReadError(f"{path}: layer {layer}: removed while open; load the model again") from None
            except OSError as error:
                raise ReadError(f"{path}: layer {layer}: can no longer be read: {error.strerror}") from None
            if now != self._files[path].signature:
                raise ReadError(f"{path}: layer {layer}: replaced or changed while open; load the model again")

    @property
    def mine(self) -> bool:
        """Whether this is the process that opened the files, not a fork of it: a fork does not share reads, threads and slots."""
        return os.getpid() == self._process

    def check_process(self) -> None:
        """Raises RequestError in a forked process."""
        if not self.mine:
            raise RequestError(
                f"this model was opened by process {self._process} and cannot be used in its fork {os.getpid()}; open it here, or start "
                "processes with multiprocessing.get_context('spawn')"
            )

    @property
    def closed(self) -> bool:
        return not self._files

    def close(self) -> None:
        self._end()


def _close_all(files: dict[Path, OpenFile], process: int) -> None:
    """Closes the files, also of a store that is garbage-collected without close(). In a fork they belong to the parent."""
    if os.getpid() == process:
        for file in files.values():
            os.close(file.fd)
        files.clear()


def _open_direct(path: Path) -> int:
    """Opens a file with O_DIRECT and reads a block to test it. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        with mmap.mmap(-1, ALIGNMENT) as block:  # page-aligned
            os.preadv(fd, [block], 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(path: Path, direct: bool) -> OpenFile:
    try:
        if direct:
            try:
                fd = _open_direct(path)
            except OSError:
                # Some file systems refuse O_DIRECT, when a file is opened or when it is first read; `direct` records
                # it, and the start-up line prints it.
                direct = False
        if not direct:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ReadError(f"{path}: cannot be opened: {error.strerror}") from None
    return OpenFile(path, fd, direct, _signature(os.fstat(fd)))
