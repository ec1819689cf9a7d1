"""A driver that runs the CUDA kernels on the CPU (emulator.h), so that machines without a GPU test their arithmetic."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expertstream.cuda.compiler import SOURCES, compile_kernels, kernel_parameters, source_of
from expertstream.errors import BudgetError

__all__ = ["EmulatedDriver"]

HERE = Path(__file__).parent
_BUILD = Path(os.environ.get("EXPERTSTREAM_EMULATOR_BUILD", HERE.parent.parent / "build" / "emulator"))
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def build(name: str, macros: Mapping[str, int]) -> ctypes.CDLL:
    """A kernel file as a shared library, compiled once for each set of macros."""
    lines = ['#include "emulator.h"', source_of(name).replace("#pragma once", "")]
    for kernel in kernel_parameters(name):
        lines.append(
            f'extern "C" __attribute__((visibility("default"))) void launch_{kernel}(const unsigned* grid, unsigned threads, '
            f"unsigned long shared, void** parameters) {{\n"
            f"  emulator::launch(&emulator::Invoke<&{kernel}>::run, grid, threads, shared, parameters);\n}}"
        )
    text = "\n".join(lines)
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-shared", "-march=native", "-w"]
    flags += [f"-D{k}={v}" for k, v in macros.items()]
    emulator = (HERE / "emulator.h").read_text()
    key = hashlib.blake2b(repr((text, flags, emulator)).encode(), digest_size=12).hexdigest()
    library = _BUILD / f"{Path(name).stem}-{key}.so"
    if not library.exists():
        _BUILD.mkdir(parents=True, exist_ok=True)
        source = _BUILD / f"{key}.{os.getpid()}.cpp"
        source.write_text(text)
        partial = source.with_suffix(".so")
        command = [os.environ.get("CXX", "g++"), *flags, f"-I{HERE}", f"-I{SOURCES}", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        partial.rename(library)
        source.unlink()
    return ctypes.CDLL(str(library))


class EmulatedDriver:
    """Implements cuda.driver.Driver. Memory ends at a page that cannot be touched; what is never written is not zero."""

    name, capability, shared_bytes, staged_bytes = "emulated GPU", 90, 96 << 10, 64 << 10

    def __init__(self, total_bytes: int = 4 << 30) -> None:
        self.total_bytes, self.launches = total_bytes, 0
        self._sizes: dict[int, tuple[int, int, int]] = {}
        self._registered: set[int] = set()
        self._captured: list[Callable[[], object]] | None = None
        self._running: threading.Thread | None = None  # a replay

    def free_bytes(self) -> int:
        return self.total_bytes - sum(size for _, _, size in self._sizes.values())

    def allocate(self, size: int) -> int:
        if size > self.free_bytes():
            raise BudgetError("the GPU is out of memory")
        room = -(-size // _PAGE) * _PAGE
        base = _libc.mmap(None, room + _PAGE, 3, 0x22, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        _libc.mprotect(base + room, _PAGE, 0)
        ctypes.memset(base, 0xA5, room)
        address = base + room - -(-size // 16) * 16
        self._sizes[address] = base, room, size
        return int(address)

    def free(self, address: int) -> None:
        base, room, _ = self._sizes.pop(address)
        _libc.munmap(base, room + _PAGE)

    def upload(self, to: int, source: int, size: int) -> None:
        assert self._captured is None, "an upload from memory that may be gone must not be recorded"
        self.join()
        ctypes.memmove(to, source, size)

    def download(self, to: int, source: int, size: int) -> None:
        assert self._captured is None, "values cannot be read while a graph is recorded"
        self.join()
        ctypes.memmove(to, source, size)

    def copy(self, to: int, source: int, size: int) -> None:
        self._do(lambda: ctypes.memmove(to, source, size))

    def fill(self, to: int, size: int) -> None:
        self._do(lambda: ctypes.memset(to, 0, size))

    def register(self, address: int, size: int) -> int:
        self._registered.add(address)
        return address

    def unregister(self, address: int) -> None:
        self._registered.remove(address)

    def load(self, name: str, macros: Mapping[str, int], kernels: list[str]) -> dict[str, Any]:
        if os.environ.get(
            "EXPERTSTREAM_PRECOMPILE"
        ):  # for machines with a GPU and without NVRTC: fills the cache of compiled code
            compile_kernels(name, macros, int(os.environ["EXPERTSTREAM_PRECOMPILE"]))
        library = build(name, macros)
        found = {}
        for kernel in kernels:
            function = getattr(library, f"launch_{kernel}")
            function.restype = None
            found[kernel] = function
        return found

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, parameters: tuple[int, int, int]
    ) -> None:
        assert shared <= self.shared_bytes and threads <= 1024 and max(grid[1:]) <= 65535 and min(grid) > 0
        addresses, count, size = parameters
        if self._captured is not None:
            old = (ctypes.c_void_p * count).from_address(addresses)
            values = ctypes.create_string_buffer(ctypes.string_at(old[0], size), size)
            base = ctypes.addressof(values)
            own = (ctypes.c_void_p * count)(*(base + at - old[0] for at in old))
            self._captured.append(lambda: self._launch(kernel, grid, threads, shared, ctypes.addressof(own), values))
            return
        self.join()
        self._launch(kernel, grid, threads, shared, addresses)

    def _launch(self, kernel: Any, grid: Any, threads: int, shared: int, parameters: int, *_: Any) -> None:
        self.launches += 1
        kernel((ctypes.c_uint * 3)(*grid), ctypes.c_uint(threads), ctypes.c_ulong(shared), ctypes.c_void_p(parameters))

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> Any:
        captured, self._captured = self._captured, None
        return captured

    def replay(self, graph: Any) -> None:
        self.join()

        def run() -> None:
            for step in graph:
                step()

        # As on a card, the host goes on meanwhile, and a kernel may wait for it.
        self._running = threading.Thread(target=run)
        self._running.start()

    def running(self) -> bool:
        return self._running is not None and self._running.is_alive()

    def drop(self, graph: Any) -> None:
        graph.clear()

    def bring(self, to: int, source: int, size: int) -> None:
        self._do(lambda: ctypes.memmove(to, source, size))

    def stage(self, source: int, size: int) -> int:
        assert self._captured is None, "an upload from memory that may be gone must not be recorded"
        assert size <= self.staged_bytes
        self._staged = ctypes.create_string_buffer(ctypes.string_at(source, size), size)
        return ctypes.addressof(self._staged)

    def mark(self) -> Any:
        self.join()

    def upload_beside(self, to: int, source: int, size: int, after: Any) -> None:
        assert self._captured is None
        self.join()
        ctypes.memmove(to, source, size)

    def bring_beside(self, to: int, source: int, size: int, after: Any) -> None:
        assert self._captured is None
        self.join()
        ctypes.memmove(to, source, size)

    def join(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.join()

    def _do(self, step: Callable[[], object]) -> None:
        if self._captured is not None:
            self._captured.append(step)
        else:
            self.join()
            step()

    def synchronize(self) -> None:
        self.join()

    def release(self) -> None:
        self._staged = None
