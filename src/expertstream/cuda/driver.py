"""What the engine needs of a GPU's driver, and NVIDIA's, through cuda-bindings. Everything runs in one stream, in order."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

from ..errors import BudgetError, DeviceError
from .compiler import compile_kernels

__all__ = ["Driver", "NvidiaDriver", "device_count", "device_number", "driver_version", "open_driver"]

_POINTS = 64
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_STAGE = 8 << 20  # bytes of registered memory for stage()


class Driver(Protocol):
    """Addresses are integers; sizes are bytes. Work is done in the order of the calls; download() and synchronize() wait for all of it.
    Raises BudgetError if the card's memory is used up, and DeviceError."""

    name: str
    shared_bytes: int  # the most that a block may have
    staged_bytes: int

    def free_bytes(self) -> int:
        """Free memory of the card."""

    def allocate(self, size: int) -> int:
        """Memory of the card."""

    def free(self, address: int) -> None:
        """Returns what allocate() gave."""

    def upload(self, to: int, source: int, size: int) -> None:
        """Host memory to the card. The source may be reused at once."""

    def download(self, to: int, source: int, size: int) -> None:
        """The card's memory to the host's, complete on return."""

    def copy(self, to: int, source: int, size: int) -> None:
        """Within the card."""

    def fill(self, to: int, size: int) -> None:
        """Zeros."""

    def register(self, address: int, size: int) -> int:
        """Lets kernels read host memory; the address that they use."""

    def unregister(self, address: int) -> None:
        """Undoes register()."""

    def load(self, name: str, macros: Mapping[str, int], kernels: list[str]) -> dict[str, Any]:
        """The kernels of a source file, compiled."""

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, parameters: tuple[int, int, int]
    ) -> None:
        """parameters: the address of an array with their addresses, their number, and the bytes that they take one after another."""

    def begin_capture(self) -> None:
        """From here on launches, fill(), copy() and bring() are recorded instead of done."""

    def end_capture(self) -> Any:
        """The graph of what was recorded."""

    def replay(self, graph: Any) -> None:
        """Does what was recorded."""

    def running(self) -> bool:
        """Whether work is under way. Where the system collects launches, they go to the card now. Raises DeviceError if it failed."""

    def drop(self, graph: Any) -> None:
        """Destroys a graph."""

    def bring(self, to: int, source: int, size: int) -> None:
        """The card's memory to registered host memory, complete after synchronize()."""

    def stage(self, source: int, size: int) -> int:
        """The address of a copy of at most `staged_bytes` of host memory, for kernels that are launched next. Unlike upload(), they do not
        wait for copies that run beside."""

    def mark(self) -> Any:
        """A point behind the work so far, for upload_beside()."""

    def upload_beside(self, to: int, source: int, size: int, after: Any) -> None:
        """Registered host memory to the card, beside other work that comes after the point `after`, if given."""

    def bring_beside(self, to: int, source: int, size: int, after: Any) -> None:
        """The card's memory to registered host memory, likewise."""

    def join(self) -> None:
        """What follows comes after everything that runs beside."""

    def synchronize(self) -> None:
        """Waits for everything."""

    def release(self) -> None:
        """Gives back host memory that the driver takes when it needs it. Nothing may be running."""


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise DeviceError("CUDA needs its Python packages: pip install 'expertstream[cuda]'") from None
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:
        raise DeviceError("no NVIDIA driver is installed (libcuda.so.1 was not found); use device=cpu") from None
    if int(status) != 0:
        raise DeviceError(f"the NVIDIA driver cannot be used: {_text(driver, status)}; use device=cpu")
    return driver


def _text(driver: Any, status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    return text.decode() if text else f"error {int(status)}"


def device_count() -> int:
    """How many GPUs can be used; 0 also if CUDA's packages or the driver are missing."""
    try:
        driver = _bindings()
    except DeviceError:
        return 0
    status, count = driver.cuDeviceGetCount()
    return int(count) if int(status) == 0 else 0


def device_number(device: str) -> int | None:
    """The number of the GPU that "auto", "cuda" or "cuda:N" means; None for the CPU."""
    if device.startswith("cuda"):
        return int(device.partition(":")[2] or 0)
    return 0 if device == "auto" and device_count() else None


def open_driver(number: int) -> Driver:
    """The driver of a card. Raises DeviceError."""
    return NvidiaDriver(number)


def driver_version() -> str:
    """The version of NVIDIA's kernel module, "" if it does not say."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


class NvidiaDriver:
    """One card, by its number. Raises DeviceError."""

    staged_bytes = 256 << 10

    def __init__(self, number: int = 0) -> None:
        self._cu = cu = _bindings()
        count = self._do(cu.cuDeviceGetCount())
        if number >= count:
            cards = (
                "there is no GPU" if count == 0 else "the only GPU is cuda:0" if count == 1 else f"there are {count}"
            )
            raise DeviceError(f"cuda:{number} does not exist: {cards}")
        self._device = self._do(cu.cuDeviceGet(number))
        self.name = self._do(cu.cuDeviceGetName(256, self._device)).split(b"\0")[0].decode()
        attribute, names = cu.cuDeviceGetAttribute, cu.CUdevice_attribute
        major, minor, self.shared_bytes = (
            self._do(attribute(getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), self._device))
            for name in (
                "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
            )
        )  # fmt: skip
        self.capability = 10 * major + minor
        self._context = self._do(cu.cuDevicePrimaryCtxRetain(self._device))
        self._threads = threading.local()
        self._enter()
        self._overlapping: Any = None
        self._stream, self._beside = (
            self._do(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING)) for _ in range(2)
        )
        # Used in turn: a point that is overwritten becomes a later one.
        flag = cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
        self._points = cycle([self._do(cu.cuEventCreate(flag)) for _ in range(_POINTS)])
        self._joined = self._do(cu.cuEventCreate(flag))
        self._stage_begin = 0  # allocated when it is needed
        self._half_left = [self._do(cu.cuEventCreate(flag)) for _ in range(2)]
        self._staged = self._half = 0

    def _do(self, result: tuple[Any, ...]) -> Any:
        status = int(result[0])
        if status:
            if status == 2:
                raise BudgetError("the GPU is out of memory; other programs may use it, or set a smaller vram")
            raise DeviceError(f"the GPU failed: {_text(self._cu, result[0])}; load the model again")
        return result[1] if len(result) == 2 else result[1:]

    def _enter(self) -> None:
        """The context is current for a thread, not for a process."""
        if not hasattr(self._threads, "entered"):
            self._do(self._cu.cuCtxSetCurrent(self._context))
            self._threads.entered = True

    def free_bytes(self) -> int:
        self._enter()
        return int(self._do(self._cu.cuMemGetInfo())[0])

    def allocate(self, size: int) -> int:
        self._enter()
        return int(self._do(self._cu.cuMemAlloc(size)))

    def free(self, address: int) -> None:
        self._enter()
        self._do(self._cu.cuMemFree(address))

    def upload(self, to: int, source: int, size: int) -> None:
        self._enter()
        self._do(self._cu.cuMemcpyHtoDAsync(to, source, size, self._stream))

    def stage(self, source: int, size: int) -> int:
        # The halves of registered memory take turns: what one held has been read before it is used again.
        self._enter()
        if not self._stage_begin:
            self._stage_begin = int(self._do(self._cu.cuMemHostAlloc(_STAGE, self._cu.CU_MEMHOSTALLOC_PORTABLE)))
        half = _STAGE // 2
        at = -(-self._staged // 64) * 64
        if at // half != (at + size - 1) // half or at + size > _STAGE:
            at = (at // half + 1) * half
        if at // half != self._half:
            at %= _STAGE
            self._do(self._cu.cuEventRecord(self._half_left[self._half], self._stream))
            self._half = at // half
            self._do(self._cu.cuEventSynchronize(self._half_left[self._half]))
        self._staged = at + size
        ctypes.memmove(self._stage_begin + at, source, size)
        return int(self._stage_begin) + at

    def download(self, to: int, source: int, size: int) -> None:
        self._enter()
        self._do(self._cu.cuMemcpyDtoHAsync(to, source, size, self._stream))
        self._do(self._cu.cuStreamSynchronize(self._stream))

    def copy(self, to: int, source: int, size: int) -> None:
        self._enter()
        self._do(self._cu.cuMemcpyDtoDAsync(to, source, size, self._stream))

    def fill(self, to: int, size: int) -> None:
        self._enter()
        self._do(self._cu.cuMemsetD8Async(to, 0, size, self._stream))

    def register(self, address: int, size: int) -> int:
        self._enter()
        flags = self._cu.CU_MEMHOSTREGISTER_DEVICEMAP | self._cu.CU_MEMHOSTREGISTER_PORTABLE
        self._do(self._cu.cuMemHostRegister(address, size, flags))
        return int(self._do(self._cu.cuMemHostGetDevicePointer(address, 0)))

    def unregister(self, address: int) -> None:
        self._enter()
        self._do(self._cu.cuMemHostUnregister(address))

    def load(self, name: str, macros: Mapping[str, int], kernels: list[str]) -> dict[str, Any]:
        self._enter()
        code = compile_kernels(name, macros, self.capability, driver_version())
        module = self._do(self._cu.cuModuleLoadData(code))
        found = {kernel: self._do(self._cu.cuModuleGetFunction(module, kernel.encode())) for kernel in kernels}
        for function in found.values():
            most = self._cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            static = self._cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
            fixed = int(self._do(self._cu.cuFuncGetAttribute(static, function)))
            self._do(self._cu.cuFuncSetAttribute(function, most, self.shared_bytes - fixed))
        return found

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, parameters: tuple[int, int, int]
    ) -> None:
        self._enter()
        if self._overlapping is not None:  # in a graph: the next kernel starts while this one ends
            config = self._overlapping
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.sharedMemBytes = threads, shared
            (status,) = self._cu.cuLaunchKernelEx(config, kernel, parameters[0], 0)
        else:
            (status,) = self._cu.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, self._stream, parameters[0], 0)
        if int(status):
            self._do((status,))

    def _overlap(self) -> Any:
        """A launch configuration with programmatic dependent launch, for cards that have it."""
        if self.capability < 90:
            return None
        attribute, config = self._cu.CUlaunchAttribute(), self._cu.CUlaunchConfig()
        attribute.id = self._cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.blockDimY = config.blockDimZ = config.numAttrs = 1
        config.hStream, config.attrs = self._stream, [attribute]
        return config

    def begin_capture(self) -> None:
        self._enter()
        mode = self._cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._do(self._cu.cuStreamBeginCapture(self._stream, mode))
        self._overlapping = self._overlap()

    def end_capture(self) -> Any:
        self._overlapping = None
        graph = self._do(self._cu.cuStreamEndCapture(self._stream))
        ready = self._do(self._cu.cuGraphInstantiate(graph, 0))
        self._do(self._cu.cuGraphDestroy(graph))
        return ready

    def replay(self, graph: Any) -> None:
        self._enter()
        self._do(self._cu.cuGraphLaunch(graph, self._stream))

    def running(self) -> bool:
        self._enter()
        (status,) = self._cu.cuStreamQuery(self._stream)
        if int(status) == _NOT_READY:
            return True
        self._do((status, None))
        return False

    def drop(self, graph: Any) -> None:
        self._enter()
        self._do(self._cu.cuGraphExecDestroy(graph))

    def bring(self, to: int, source: int, size: int) -> None:
        self._enter()
        self._do(self._cu.cuMemcpyDtoHAsync(to, source, size, self._stream))

    def mark(self) -> Any:
        self._enter()
        point = next(self._points)
        self._do(self._cu.cuEventRecord(point, self._stream))
        return point

    def upload_beside(self, to: int, source: int, size: int, after: Any) -> None:
        self._enter()
        if after is not None:
            self._do(self._cu.cuStreamWaitEvent(self._beside, after, 0))
        self._do(self._cu.cuMemcpyHtoDAsync(to, source, size, self._beside))

    def bring_beside(self, to: int, source: int, size: int, after: Any) -> None:
        self._enter()
        if after is not None:
            self._do(self._cu.cuStreamWaitEvent(self._beside, after, 0))
        self._do(self._cu.cuMemcpyDtoHAsync(to, source, size, self._beside))

    def join(self) -> None:
        self._enter()
        self._do(self._cu.cuEventRecord(self._joined, self._beside))
        self._do(self._cu.cuStreamWaitEvent(self._stream, self._joined, 0))

    def synchronize(self) -> None:
        self._enter()
        self._do(self._cu.cuStreamSynchronize(self._stream))

    def release(self) -> None:
        self._enter()
        if self._stage_begin:
            self._do(self._cu.cuMemFreeHost(self._stage_begin))
            self._stage_begin = self._staged = self._half = 0
