"""The C++ core. Arrays are C-contiguous; see native/ops.h and native/io/reader.h for shapes and meanings."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORT_READ: int

class Format:
    """A matrix format, without memory. codes: dense, affine, symmetric or e2m1. Raises ValueError for sizes or bits that no kernel
    supports."""

    def __init__(self, rows: int, cols: int, bits: int, group_size: int, dtype: str, codes: str) -> None: ...

class Matrix:
    """A matrix in memory that NumPy owns; keeps the arrays alive."""

    def __init__(
        self, format: Format, parts: list[NDArray[np.uint8]], bias: NDArray[np.float32] | None = None
    ) -> None: ...

class ExpertFormat:
    """The format that all experts of a layer share."""

    def __init__(
        self, gate: Format, up: Format, down: Format, biased: bool = False, alpha: float = 1.0, limit: float = 0.0
    ) -> None: ...

class Attention:
    """Attention without its projections; keeps the arrays alive."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        q_norm: NDArray[np.float32] | None = None,
        k_norm: NDArray[np.float32] | None = None,
        gated: bool = False,
        sinks: NDArray[np.float32] | None = None,
        window: int = 0,
    ) -> None: ...

class DeltaNet:
    """A gated-delta layer without its projections; keeps the arrays alive."""

    def __init__(
        self,
        conv_weight: NDArray[np.float32],
        a_log: NDArray[np.float32],
        dt_bias: NDArray[np.float32],
        norm_weight: NDArray[np.float32],
        key_heads: int,
        value_heads: int,
        dk: int,
        eps: float,
    ) -> None: ...

class Arena:
    """Page-aligned memory, in huge pages where the kernel provides them."""

    def __init__(self, size: int) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def huge_pages(self) -> bool: ...
    def view(self) -> NDArray[np.uint8]: ...
    def release(self, offset: int, bytes: int) -> None: ...

class Reader:
    """Reads byte ranges of files into an arena. submit() takes requests (n, 6): tag, fd, direct, offset, length, needed, and destinations
    (n,) in the arena; wait() returns (tag, error, bytes, cached_bytes) of finished requests."""

    def submit(self, arena: Arena, requests: NDArray[np.int64], dests: NDArray[np.int64]) -> None: ...
    def wait(self, at_least: int = 1) -> list[tuple[int, int, int, int]]: ...
    def register_memory(self, arena: Arena) -> None: ...
    def unregister_memory(self) -> None: ...
    def take_peak(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def reads(self) -> int: ...
    @property
    def registered_buffers(self) -> bool: ...

def uring_reader(queue_depth: int, split_bytes: int) -> Reader: ...
def pread_reader(queue_depth: int, split_bytes: int) -> Reader: ...
def set_fault(after: int, count: int, value: int) -> None: ...
def clear_faults() -> None: ...
def known_isas() -> list[str]: ...
def available_isas() -> list[str]: ...

class Engine:
    """The loops of the forward pass over a pool of threads. Its methods are those of native/ops.h."""

    def __init__(self, threads: int, isa: str, activation_bits: int) -> None: ...
    def __getattr__(self, name: str) -> Any: ...
