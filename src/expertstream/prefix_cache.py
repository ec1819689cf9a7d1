"""Cached prompt states, reused by prompts with the same beginning: in memory under one budget, on disk under another.

They form a tree. A node holds the tokens from its parent's position to its own, their keys and values, and the states at its end that
cannot be rewound. A prompt can be resumed only at the end of a node. Positions are multiples of 64, where a prompt's chunked form
may be split, so the results after a restored prefix are bit for bit those of a full prefill.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import numpy as np

from .formats.numbers import I64
from .kv_cache import KVCache
from .state_file import StateFile, StateFileError, array_bytes, is_state_file, write_state

__all__ = ["GRAIN", "PrefixCache", "snapshot_positions"]

GRAIN = 64  # tokens; chunks of a prompt are multiples of it
MAX_TOKENS = 1 << 22  # in one file
# The names that this cache writes; nothing else in its directory is ever deleted.
_FOLDER, _FILE = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{40}\.state")
_UNFINISHED = re.compile(r"\.[0-9a-f]{40}\.state\.\d+")
_log = logging.getLogger("expertstream")


def snapshot_positions(prompt: int, starts: list[int], every: int) -> frozenset[int]:
    """Where to cache a prompt of so many tokens, in whole chunks: before its second message (system prompt and tools are often shared)
    and its last (the next turn repeats what precedes it), at its end, and every so many tokens. starts: where messages begin."""
    wanted = {*range(every, prompt, every), *starts[1:2], *starts[-1:], prompt - 1}
    return frozenset(p // GRAIN * GRAIN for p in wanted if p >= GRAIN)


@dataclass(eq=False)
class Node:
    key: str  # a hash of the model and of all tokens from the first on
    parent: Node | None
    tokens: I64
    position: int  # of its end
    # In memory: each layer's rows for these tokens and, if `whole`, the states that cannot be rewound.
    arrays: list[Any] | None = None
    whole: bool = True
    file: StateFile | None = None
    used: float = 0.0
    forgotten: bool = False  # must no longer be used or written
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def path(self) -> list[Node]:
        """The nodes from the first one to this, without the root."""
        found: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            found.append(node)
            node = node.parent
        return found[::-1]

    @property
    def usable(self) -> bool:
        """Whether a prompt can be resumed here."""
        return self.parent is None or self.file is not None or (self.arrays is not None and self.whole)

    @property
    def memory_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays) if self.arrays is not None else 0


class PrefixCache:
    """`fingerprint`: a hash of everything that states depend on; files with another one are not read. `directory` need not exist yet.

    Only the model's thread may call restore() and insert(); files are written by the cache's own thread."""

    def __init__(self, fingerprint: str, memory_bytes: int, directory: Path | None = None, disk_bytes: int = 0) -> None:
        self.memory_limit, self.disk_limit = memory_bytes, disk_bytes
        self.memory_bytes = self.disk_bytes = 0
        self.hits = self.lookups = self.tokens_reused = 0
        self._rows = 0  # how many of a node's arrays are keys and values
        self._root = Node(fingerprint, None, np.empty(0, np.int64), 0)
        self._lock = threading.Lock()  # guards the tree: the model's thread, the writer's and readers of counters
        self._directory = directory / fingerprint[:32] if directory is not None and disk_bytes else None
        # Short: the model's thread waits for the disk rather than exceed the planned memory.
        self._jobs: queue.Queue[tuple[Node, list[Any]] | None] = queue.Queue(maxsize=2)
        self._writer: threading.Thread | None = None
        if self._directory is not None:
            for folder in (self._directory.parent, self._directory):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # they contain users' text
            self._open_files(self._directory)
            self._trim_others(self._directory)
            self._trim_disk()
            self._writer = threading.Thread(target=self._write_all, name="prefix-writer", daemon=True)
            self._writer.start()

    def restore(self, tokens: I64, cache: KVCache) -> int:
        """Fills an empty cache with the longest cached prefix of tokens, without the last token; returns its length."""
        with self._lock:
            self.lookups += 1
            node = self._longest(self._root, tokens[:-1], usable=True)
        while node.parent is not None:
            path = node.path
            for n in path:
                try:
                    self._fill(cache, n, self._arrays(n, whole=n is node, cache=cache), whole=n is node)
                except (StateFileError, OSError) as error:
                    _log.warning("a cached prefix is ignored: %s", error)
                    with self._lock:
                        self._forget(n)
                        node = self._longest(self._root, tokens[:-1], usable=True)
                    break
            if node is not path[-1]:
                continue
            cache.position = node.position
            with self._lock:
                self.hits += 1
                self.tokens_reused += node.position
                self._trim_memory(spare=node)
            return node.position
        return 0

    def holds(self, cache: KVCache) -> bool:
        """Whether one snapshot of this sequence fits in the limits."""
        size = sum(array_bytes(shape) for state in cache.snapshots for shape in state.shapes())
        return size <= max(self.memory_limit, self.disk_limit if self._directory is not None else 0)

    def insert(self, tokens: I64, cache: KVCache) -> None:
        """Stores the snapshots that a sequence took of a prompt that begins with tokens, and removes them from its cache."""
        states = cache.snapshots
        # An interrupted pass may have taken snapshots of some states only.
        kept = set.intersection(*(set(s.kept) for s in states)) if states else cache.keep
        positions = sorted(p for p in kept if p <= cache.position)
        now = time.time()
        with self._lock:
            node, fresh = self._root, list[tuple[Node, list[Any]]]()
            for position in positions:
                # Existing nodes may end elsewhere: a new one begins at the end of the last one that matches its tokens.
                node = self._longest(node, tokens[:position])
                if node.position == position:
                    if not node.usable and node.arrays is not None:  # its states had been dropped
                        node.arrays += [array for state in states for array in state.kept[position]]
                        node.whole = True
                        self.memory_bytes += sum(a.nbytes for a in node.arrays[self._rows :])
                    continue
                part = tokens[node.position : position]
                key = _key(node.key, part)
                arrays: list[Any] = []
                for layer in cache.rows:
                    arrays += layer.rows(node.position, position)
                self._rows = len(arrays)
                for state in states:
                    arrays += state.kept[position]
                child = Node(key, node, part.copy(), position, arrays, used=now)
                node.children[key] = child
                self.memory_bytes += child.memory_bytes
                fresh.append((child, arrays))
                node = child
                for n in node.path:
                    n.used = now
                self._trim_memory(spare=node)
        for state in states:
            state.kept.clear()
        if self._directory is not None:
            for child, arrays in fresh:
                self._jobs.put((child, arrays))

    def forget(self, tokens: I64, shared: int = 0) -> None:
        """Drops all nodes of prompts that begin like tokens, and their files, except nodes that end within the first `shared` tokens."""
        with self._lock:
            here: list[Node] = [self._root]
            while here:
                for child in list(here.pop().children.values()):
                    if not np.array_equal(
                        tokens[child.position - child.tokens.shape[0] : child.position], child.tokens
                    ):
                        continue
                    if child.position > shared:
                        self._forget(child)
                    else:
                        here.append(child)

    def flush(self) -> None:
        """Waits until all queued files are written."""
        if self._writer is not None:
            self._jobs.join()

    def stop_writing(self) -> None:
        """For a model that is garbage-collected without close(): tells the writer's thread to end, and does not wait for it."""
        with contextlib.suppress(queue.Full):
            self._jobs.put_nowait(None)

    def close(self) -> None:
        if self._writer is not None:
            self._jobs.put(None)
            self._writer.join()
            self._writer = None

    # The methods below are called with the lock held, except _arrays, _fill and those of the writer's thread.

    def _longest(self, node: Node, tokens: I64, usable: bool = False) -> Node:
        """The deepest (usable) node at or below `node` whose tokens are a prefix of these."""
        best, open_ = node, [node]
        while open_:
            here = open_.pop()
            if here.position > best.position and (here.usable or not usable):
                best = here
            for child in here.children.values():
                part = tokens[here.position : child.position]
                if np.array_equal(part, child.tokens):
                    open_.append(child)
        return best

    def _arrays(self, node: Node, whole: bool, cache: KVCache) -> list[Any]:
        """A node's arrays, from memory or disk; only keys and values unless `whole`."""
        if node.arrays is not None and (node.whole or not whole):
            return node.arrays
        rows = [shape for layer in cache.rows for shape in layer.row_shapes(node.tokens.shape[0])]
        states = [shape for state in cache.snapshots for shape in state.shapes()]
        file = node.file
        if file is None:
            raise StateFileError("one of its parts is gone")
        _touch(file.path)
        if not whole:
            return file.read(0, len(rows), rows)
        arrays = file.read(0, len(rows) + len(states), rows + states)
        with self._lock:
            self._rows = len(rows)
            if node.parent is not None and node.parent.children.get(node.key) is node:  # not dropped meanwhile
                self.memory_bytes -= node.memory_bytes
                node.arrays, node.whole = arrays, True
                self.memory_bytes += node.memory_bytes
        return arrays

    def _fill(self, cache: KVCache, node: Node, arrays: list[Any], whole: bool) -> None:
        """Copies one node's arrays to its part of a cache."""
        at = 0
        for layer in cache.rows:
            count = len(layer.arrays)
            layer.put(node.position - node.tokens.shape[0], arrays[at : at + count])
            at += count
        for state in cache.snapshots if whole else ():
            count = len(state.shapes())
            state.restore(node.position, arrays[at : at + count])
            at += count
        node.used = time.time()

    def _trim_memory(self, spare: Node | None) -> None:
        """Drops the least recently used: first states inside a prompt where nothing branches off, since they are large and the next prompt
        most likely resumes from the end; then the ends of prompts."""
        protected = {id(n) for n in spare.path} if spare is not None else set()
        while self.memory_bytes > self.memory_limit:
            held = [n for n in _below(self._root) if n.arrays is not None]
            between = [n for n in held if n.whole and len(n.children) == 1 and n.parent is not self._root]
            between = [n for n in between if n.arrays is not None and len(n.arrays) > self._rows and n is not spare]
            if between:
                self._drop_states(min(between, key=lambda n: (n.used, n.position)))
                continue
            if not held:
                return
            inner = {id(n.parent) for n in held}
            ends = [n for n in held if id(n) not in inner and id(n) not in protected]
            if not ends:
                # One prompt alone exceeds the budget: start from its end, so that shared beginnings stay.
                ends = [n for n in held if id(n) not in inner]
            victim = min(ends, key=lambda n: n.used)
            self.memory_bytes -= victim.memory_bytes
            victim.arrays = None
            if victim.file is None and not victim.children and victim.parent is not None:
                victim.parent.children.pop(victim.key, None)

    def _drop_states(self, node: Node) -> None:
        assert node.arrays is not None
        self.memory_bytes -= node.memory_bytes
        node.arrays, node.whole = node.arrays[: self._rows], False
        self.memory_bytes += node.memory_bytes

    def _trim_disk(self) -> None:
        while self.disk_bytes > self.disk_limit:
            held = [n for n in _below(self._root) if n.file is not None]
            inner = {id(n.parent) for n in held}
            if not held:
                return
            self._drop_file(min((n for n in held if id(n) not in inner), key=lambda n: n.used))

    def _drop_file(self, node: Node) -> None:
        assert node.file is not None
        self.disk_bytes -= node.file.size
        node.file.path.unlink(missing_ok=True)
        node.file = None
        if node.arrays is None and not node.children and node.parent is not None:
            node.parent.children.pop(node.key, None)

    def _forget(self, node: Node) -> None:
        """Drops a node that cannot be used, and all nodes below it."""
        for n in [*_below(node), node]:
            self.memory_bytes -= n.memory_bytes
            n.arrays, n.forgotten = None, True
            if n.file is not None:
                self.disk_bytes -= n.file.size
                n.file.path.unlink(missing_ok=True)
                n.file = None
        if node.parent is not None:
            node.parent.children.pop(node.key, None)

    def _write_all(self) -> None:
        """Runs in the writer's thread."""
        while (job := self._jobs.get()) is not None:
            try:
                self._write(*job)
            except Exception as error:  # the next one may succeed
                _log.warning("a prefix cannot be written to disk: %s", error)
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _write(self, node: Node, arrays: list[Any]) -> None:
        assert self._directory is not None and node.parent is not None
        parent = node.parent

        def leads_there() -> bool:
            return parent is self._root or parent.file is not None

        with self._lock:
            if node.forgotten or not leads_there() or sum(a.nbytes for a in arrays) > self.disk_limit:
                return
        path = self._directory / f"{node.key}.state"
        write_state(path, {"parent": parent.key, "position": node.position}, [*arrays, node.tokens])
        file = StateFile.open(path)
        with self._lock:
            if node.forgotten or not leads_there():
                path.unlink(missing_ok=True)
                return
            holder = parent.children.setdefault(node.key, node)  # it may have been dropped from memory meanwhile
            if holder.file is None:
                self.disk_bytes += file.size
            holder.file = file
            self._trim_disk()

    def _trim_others(self, mine: Path) -> None:
        """The limit is for all models together: deletes other models' files first, and the remains of interrupted writes."""
        others = []
        for path in mine.parent.glob("*/*"):
            if not _FOLDER.fullmatch(path.parent.name) or path.parent.is_symlink():
                continue
            try:
                stat = path.lstat()
                if _UNFINISHED.fullmatch(path.name) and S_ISREG(stat.st_mode) and time.time() - stat.st_mtime > 3600:
                    path.unlink()
                elif path.parent != mine and _FILE.fullmatch(path.name) and is_state_file(path):
                    others.append((stat.st_mtime, stat.st_size, path))
            except OSError:
                continue  # another process deleted it
        left = sum(size for _, size, _ in others) + self.disk_bytes
        for _, size, path in sorted(others):
            if left <= self.disk_limit:
                break
            path.unlink(missing_ok=True)
            left -= size

    def _open_files(self, directory: Path) -> None:
        """Adds the files of earlier runs to the tree, parents first. Damaged files are reported and left alone."""
        found: dict[str, tuple[StateFile, I64, str]] = {}
        for path in sorted(directory.glob("*.state")):
            if not _FILE.fullmatch(path.name):
                continue
            try:
                file = StateFile.open(path)
                last = len(file.header["arrays"]) - 1
                (count,) = file.header["arrays"][last]["shape"]
                if not 0 < count <= MAX_TOKENS:
                    raise StateFileError(f"{path}: invalid length of {count} tokens")
                (tokens,) = file.read(last, last + 1, [("int64", (count,))])
                parent = str(file.header.get("parent"))
                if _key(parent, tokens) != path.stem or file.integer("position") % GRAIN:
                    raise StateFileError(f"{path}: its name does not match its tokens")
            except (StateFileError, OSError, IndexError, ValueError) as error:
                _log.warning("a cached prefix is ignored: %s", error if str(path) in str(error) else f"{path}: {error}")
                continue
            found[path.stem] = (file, tokens, parent)
        by_parent: dict[str, list[str]] = {}
        for key, (_, _, parent) in found.items():
            by_parent.setdefault(parent, []).append(key)
        ready = [self._root]
        while ready:
            node = ready.pop()
            for key in by_parent.pop(node.key, []):
                file, tokens, _ = found.pop(key)
                if file.integer("position") != node.position + tokens.shape[0]:
                    _log.warning("a cached prefix is ignored: %s: its position is wrong", file.path)
                    continue
                position = node.position + tokens.shape[0]
                child = Node(key, node, tokens, position, file=file, used=file.path.stat().st_mtime)
                node.children[key] = child
                self.disk_bytes += file.size
                ready.append(child)
        for file, _, _ in found.values():  # their parents are gone
            file.path.unlink(missing_ok=True)


def _below(node: Node) -> Iterator[Node]:
    open_ = list(node.children.values())
    while open_:
        child = open_.pop()
        yield child
        open_ += child.children.values()


def _key(parent: str, tokens: I64) -> str:
    return hashlib.blake2b(parent.encode() + tokens.astype("<i8").tobytes(), digest_size=20).hexdigest()


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        _log.debug("%s: its modification time cannot be set", path)
