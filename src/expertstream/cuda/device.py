"""One GPU: its memory, its kernels, and arrays that live there."""

from __future__ import annotations

import ctypes
import math
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import BudgetError, DeviceError, RequestError
from .compiler import kernel_parameters
from .driver import Driver

__all__ = ["Addition", "Device", "DeviceArray", "Kernel", "StateArray"]

_ALIGNMENT = 512
_PAGE = 4096
Pool = dict[int, list[int]]  # free memory by size
_Work = TypeVar("_Work")


class Block:
    """Memory of the card, which returns to its device's free list when nothing refers to it. Work that still uses it comes before any work
    of its next user, since there is one stream."""

    __slots__ = ("_pool", "_room", "address")

    def __init__(self, device: Device, size: int) -> None:
        self._room = _room(size)
        self.address, self._pool = device.take(self._room)

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            self._pool.setdefault(self._room, []).append(self.address)


def _room(size: int) -> int:
    """Sizes are rounded up, to an eighth of a power of two, so that freed memory fits what comes next."""
    if size <= _ALIGNMENT:
        return _ALIGNMENT
    step = max(_ALIGNMENT, 1 << (size.bit_length() - 4))
    return -(-size // step) * step


class DeviceArray:
    """A C-contiguous array on the card. Rows can be sliced, and another array added in place; values are read by Device.host().

    What remains to be done to an array may be put off until its address is asked for, so that the kernel that reads it next can do both:
    an addition and the norm that follows it are one kernel."""

    __slots__ = ("_address", "_block", "_later", "changes", "device", "dtype", "shape")

    def __init__(self, device: Device, shape: Sequence[int], dtype: Any, block: Block, address: int) -> None:
        self.device, self.shape, self.dtype = device, tuple(shape), np.dtype(dtype)
        self._block, self._address = block, address
        self._later: Callable[[DeviceArray], None] | None = None
        self.changes = 0  # how often its values were changed in place

    @property
    def address(self) -> int:
        """Where its values are, after whatever was put off."""
        if self._later is not None:
            later, self._later = self._later, None
            later(self)
        return self._address

    @property
    def own_address(self) -> int:
        """The address, for work that is put off."""
        return self._address

    def put_off(self, work: Callable[[DeviceArray], None]) -> None:
        """work(self) is called before anyone reads this array, unless taken()."""
        assert self._later is None
        self._later = work

    def taken(self, kind: type[_Work]) -> _Work | None:
        """The work that was put off, if it is of this kind; the caller does it."""
        later = self._later
        if not isinstance(later, kind):
            return None
        self._later = None
        return later

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    def __getitem__(self, rows: slice | int) -> DeviceArray:
        """Rows, not copied; with an integer, one of them without its axis."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(rows, slice):
            begin, end, _ = rows.indices(self.shape[0])
            return DeviceArray(
                self.device, (end - begin, *self.shape[1:]), self.dtype, self._block, self.address + begin * row
            )
        return DeviceArray(self.device, self.shape[1:], self.dtype, self._block, self.address + rows * row)

    def part(self, first: int, shape: Sequence[int]) -> DeviceArray:
        """Values of a flat array from `first` on, not copied."""
        return DeviceArray(self.device, shape, self.dtype, self._block, self.address + first * self.dtype.itemsize)

    def __iadd__(self, other: DeviceArray) -> DeviceArray:
        """other must not be changed afterwards."""
        if self._later is not None:
            _ = self.address
        self.changes += 1
        self._later = Addition(other)
        return self


class Addition:
    """Adds another array to the one that put it off."""

    def __init__(self, other: DeviceArray) -> None:
        self.other = other

    def __call__(self, array: DeviceArray) -> None:
        array.device.add(array, self.other)


class Kernel:
    """A compiled kernel and the format of its parameters."""

    __slots__ = ("_addresses", "_buffer", "_driver", "_function", "_pack", "parameters")

    def __init__(self, driver: Driver, function: Any, formats: Sequence[str]) -> None:
        self._driver, self._function = driver, function
        packed = struct.Struct("<" + "".join(formats))
        self._buffer = bytearray(packed.size)
        self._pack = packed.pack_into
        base, count = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer)), len(formats)
        starts = (struct.calcsize("<" + "".join(formats[:i])) for i in range(count))
        self._addresses = (ctypes.c_void_p * count)(*(base + start for start in starts))
        self.parameters = ctypes.addressof(self._addresses), count, packed.size

    def __call__(self, grid: tuple[int, int, int], threads: int, shared: int, *parameters: float) -> None:
        """Launches it. parameters: addresses and numbers, as the kernel declares them."""
        self._pack(self._buffer, 0, *parameters)
        self._driver.launch(self._function, grid, threads, shared, self.parameters)


class Device:
    """A card, through its driver. Not thread-safe, as the ops that use it."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._free: Pool = {}
        self._private = False
        self._kernels: dict[tuple[str, tuple[tuple[str, int], ...]], dict[str, Kernel]] = {}
        self._registered: dict[int, tuple[int, NDArray[np.uint8]]] = {}  # by host address: the card's, and the memory
        self.make_room: Callable[[], None] = lambda: (
            None
        )  # called when the card is full, to free what can be made again
        self.wait_seconds = 0.0  # that the host waited for the card
        self._allocated: dict[int, int] = {}  # address → bytes
        self._end = weakref.finalize(self, _give_back, driver, self._allocated, self._registered)
        self._end.atexit = False
        self._add, self._copy = (self.kernels("rows.cu")[name] for name in ("add", "copy_words"))

    # Memory.

    def take(self, room: int) -> tuple[int, Pool]:
        """Memory, from the free list if possible, and the free list that it returns to. Raises BudgetError."""
        free = self._free.get(room)
        if free:
            return free.pop(), self._free
        try:
            address = self.driver.allocate(room)
        except BudgetError:
            if self._private:  # nothing may be waited for while a graph is recorded
                raise
            self.make_room()
            self.trim()
            address = self.driver.allocate(room)
        self._allocated[address] = room
        return address, self._free

    def absorb(self, pool: Pool) -> None:
        """What is free of private_memory() becomes everyone's."""
        for room, addresses in pool.items():
            self._free.setdefault(room, []).extend(addresses)
            addresses.clear()

    @contextmanager
    def private_memory(self) -> Iterator[Pool]:
        """What is allocated inside returns to a free list of its own, and so to no one else: the memory of a graph."""
        before, self._free, self._private = self._free, {}, True
        try:
            yield self._free
        finally:
            self._free, self._private = before, False

    def trim(self) -> None:
        """Returns the memory of the free list to the card."""
        self.driver.synchronize()
        for addresses in self._free.values():
            while addresses:
                address = addresses.pop()
                del self._allocated[address]
                self.driver.free(address)

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Lets kernels read host memory, until unregister()."""
        address = memory.ctypes.data
        if address in self._registered:
            return
        self._registered[address] = (
            self.driver.register(address, memory.nbytes),
            memory,
        )  # kept, as long as it is registered

    @property
    def used_bytes(self) -> int:
        """Bytes of the card that are allocated, in use or free for the next array."""
        return sum(self._allocated.values())

    @property
    def closed(self) -> bool:
        return not self._end.alive

    def close(self) -> None:
        """Waits, and gives all memory back: arrays are invalid afterwards."""
        self._end()

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        if self._registered.pop(memory.ctypes.data, None) is not None:
            self.driver.unregister(memory.ctypes.data)

    def is_registered(self, memory: NDArray[np.uint8]) -> bool:
        """Whether kernels can read host memory."""
        return memory.ctypes.data in self._registered

    def registered(self, memory: NDArray[np.uint8]) -> int:
        """The address that kernels use for registered host memory."""
        return self._registered[memory.ctypes.data][0]

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory that the card copies at full speed, zeros. It is kept until unpin()."""
        room = np.zeros(size + 2 * _PAGE, np.uint8)
        begin = -room.ctypes.data % _PAGE
        memory = room[begin : begin + -(-size // _PAGE) * _PAGE]
        self.register(memory)
        return memory[:size]

    def unpin(self, memories: Sequence[NDArray[np.uint8]]) -> None:
        """Undoes pinned()."""
        for memory in memories:
            self.unregister(memory)

    # Arrays.

    def empty(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray:
        block = Block(self, math.prod(shape) * np.dtype(dtype).itemsize)
        return DeviceArray(self, shape, dtype, block, block.address)

    def zeros(self, shape: Sequence[int], dtype: Any = np.float32) -> DeviceArray:
        array = self.empty(shape, dtype)
        self.driver.fill(array.address, array.nbytes)
        return array

    def send(self, values: NDArray[Any]) -> DeviceArray:
        """A copy of a NumPy array on the card."""
        values = np.ascontiguousarray(values)
        array = self.empty(values.shape, values.dtype)
        self.upload(array.address, values)
        return array

    def upload(self, to: int, values: NDArray[Any]) -> None:
        """Copies a contiguous NumPy array to the card, in order with other work."""
        size, source = values.nbytes, values.ctypes.data
        if size and size <= self.driver.staged_bytes and to % 4 == size % 4 == 0:
            words = size // 4
            self._copy((-(-words // 256), 1, 1), 256, 0, to, self.driver.stage(source, size), words)
        elif size:
            self.driver.upload(to, source, size)

    def host(self, array: DeviceArray) -> NDArray[Any]:
        """The values of an array, copied to the host; waits for the work before."""
        values = np.empty(array.shape, array.dtype)
        if values.nbytes:
            begin = time.perf_counter()
            self.driver.download(values.ctypes.data, array.address, values.nbytes)
            self.wait_seconds += time.perf_counter() - begin
        return values

    def wait(self) -> None:
        """Waits for everything."""
        begin = time.perf_counter()
        self.driver.synchronize()
        self.wait_seconds += time.perf_counter() - begin

    def add(self, y: DeviceArray, x: DeviceArray) -> None:
        """In place: y += x, float32."""
        count = math.prod(y.shape)
        self._add((-(-count // 256), 1, 1), 256, 0, y.address, x.address, count)

    # Kernels.

    def kernels(self, name: str, **macros: int) -> dict[str, Kernel]:
        """The kernels of a file in kernels/, compiled with these macros."""
        key = name, tuple(macros.items())
        found = self._kernels.get(key)
        if found is None:
            formats = kernel_parameters(name)
            functions = self.driver.load(name, macros, list(formats))
            found = {kernel: Kernel(self.driver, functions[kernel], format) for kernel, format in formats.items()}
            self._kernels[key] = found
        return found


def _give_back(driver: Driver, allocated: dict[int, int], registered: dict[int, tuple[int, NDArray[np.uint8]]]) -> None:
    """Also for a device that is garbage-collected without close(). A card that has failed gives nothing back, and need not."""
    with suppress(DeviceError):
        driver.synchronize()
        while registered:
            driver.unregister(registered.popitem()[0])
        while allocated:
            driver.free(allocated.popitem()[0])
        driver.release()


class StateArray:
    """A sequence's state on the card: (rows, columns, …) or flat. Indexing copies to the host, assignment copies from it, as NumPy arrays
    behave for the states that copy themselves."""

    def __init__(self, device: Device, shape: Sequence[int], dtype: Any) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._array = device.zeros(shape, dtype)
        self._device = device

    @property
    def address(self) -> int:
        return self._array.address

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def _check(self) -> None:
        if self._device.closed:
            raise RequestError("this model is closed")

    def _columns(self, key: Any) -> tuple[int, int]:
        """The columns [begin, end) of all rows that [:] or [:, begin:end] selects."""
        if key == slice(None):
            return 0, self.shape[1]
        rows, columns = key
        assert rows == slice(None), "whole rows of states are copied"
        begin, end, _ = columns.indices(self.shape[1])
        return begin, max(begin, end)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        self._check()
        begin, end = self._columns(key)
        values = np.empty((self.shape[0], end - begin, *self.shape[2:]), self.dtype)
        size = math.prod(self.shape[2:]) * self.dtype.itemsize
        for row in range(self.shape[0] if end > begin else 0):
            source = self.address + (row * self.shape[1] + begin) * size
            self._device.driver.download(values[row].ctypes.data, source, (end - begin) * size)
        return values

    def __setitem__(self, key: Any, given: Any) -> None:
        self._check()
        begin, end = self._columns(key)
        values = np.empty((self.shape[0], end - begin, *self.shape[2:]), self.dtype)
        values[:] = given
        size = math.prod(self.shape[2:]) * self.dtype.itemsize
        for row in range(self.shape[0] if end > begin else 0):
            to = self.address + (row * self.shape[1] + begin) * size
            self._device.driver.upload(to, values[row].ctypes.data, (end - begin) * size)

    def copy(self) -> NDArray[Any]:
        """All values, on the host."""
        return self[:]
