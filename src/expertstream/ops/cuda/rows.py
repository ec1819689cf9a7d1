"""Arrays on a GPU and the ops that work on rows: norms, embeddings, selections. What every part of the GPU's ops shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ...cuda.device import Device, DeviceArray
from ...cuda.driver import Driver
from ...cuda.recording import Recording
from ...formats import MatrixFormat
from ...formats.numbers import F32, I64
from .. import Weight
from ..cpu import CpuOps

__all__ = ["CODES", "DTYPES", "MOST_RECORDED", "BoundMatrix", "Rows", "bound", "cdiv", "three"]

DTYPES = {"f32": 0, "bf16": 1, "f16": 2, "e8m0": 4}  # as in cuda/kernels/common.cuh
CODES = {"dense": 0, "affine": 1, "symmetric": 2, "e2m1": 3}
MOST_RECORDED = 64  # sequences


def cdiv(count: int, unit: int) -> int:
    """count / unit, rounded up."""
    return -(-count // unit)


@dataclass
class BoundMatrix:
    """A matrix on the card. parts: the addresses of its parts, and of its bias if it has one, also as an array on the card."""

    format: MatrixFormat
    addresses: list[int]
    bias: int
    table: DeviceArray
    kept: list[DeviceArray]


def bound(weight: Weight) -> BoundMatrix:
    """What bind() made of a weight."""
    return cast(BoundMatrix, weight.handle)


def three(m: BoundMatrix) -> tuple[int, int, int]:
    """The addresses of values, scales and biases, 0 for what the format does not have."""
    count = len(m.format.parts)
    return m.addresses[0], m.addresses[1] if count > 1 else 0, m.addresses[2] if count > 2 else 0


class Rows:
    """Arrays are on the card; Python sees NumPy's only where it says so."""

    def __init__(
        self, driver: Driver, threads: int, isa: str = "", activation_bits: int = 8, cpu_experts: str = "auto"
    ) -> None:
        self.cpu = CpuOps(threads, isa, activation_bits)
        self.device, self.cpu_experts = Device(driver), cpu_experts
        self.planes = 1 if activation_bits == 8 else 2
        self._rows = self.device.kernels("rows.cu")
        self._tasks: dict[int, DeviceArray] = {}  # by number of tokens
        self.recording: Recording | None = None
        # By sequences, segments of attention, and whether some experts are neither on the card nor where it can read them.
        self._recordings: dict[tuple[int, int, bool], Recording] = {}
        self._bases: dict[int, int] = {}  # the card's address of an arena, by identity
        self._seen: dict[tuple[int, int, bool], str] = {}
        self._pair_starts: dict[int, DeviceArray] = {}  # by top_k
        self._old_starts: list[DeviceArray] = []
        self._constants: dict[tuple[Any, ...], DeviceArray] = {}
        self._lists: dict[tuple[int, ...], tuple[tuple[int, ...], list[Any]]] = {}  # of matrices, by their handles
        # Parameter vectors by identity; each is kept, so that its identity stays its own.
        self._vectors: dict[int, tuple[F32, DeviceArray]] = {}

    @property
    def fingerprint(self) -> str:
        return self.cpu.fingerprint

    @property
    def description(self) -> str:
        return f"{self.device.driver.name}, {self.cpu.activation_bits}-bit activations"

    def wait(self) -> None:
        self.device.wait()

    @property
    def wait_seconds(self) -> float:
        return self.device.wait_seconds

    def host(self, x: Any) -> Any:
        return self.device.host(x) if isinstance(x, DeviceArray) and self.recording is None else x

    def rows(self, x: DeviceArray, which: Sequence[int]) -> DeviceArray:
        if len(which) == x.shape[0]:
            return x
        if len(which) == 1:
            return x[which[0] : which[0] + 1]
        y = self.device.empty((len(which), x.shape[1]))
        places = self.device.send(np.array(which, np.int64))
        self._rows["gather_rows"]((len(which), 1, 1), 256, 0, x.address, places.address, x.shape[1], y.address)
        return y

    def empty_rows(self, count: int, like: DeviceArray) -> DeviceArray:
        return self.device.empty((count, like.shape[1]))

    def put_rows(self, to: DeviceArray, which: I64, rows: DeviceArray) -> None:
        places = self.device.send(which)
        to.changes += 1
        self._rows["scatter_rows"](
            (rows.shape[0], 1, 1), 256, 0, rows.address, places.address, rows.shape[1], to.address
        )

    def zeros_like(self, x: DeviceArray) -> DeviceArray:
        return self.device.zeros(x.shape)

    def rotary(self, positions: I64, frequencies: Sequence[float], scale: float) -> tuple[DeviceArray, DeviceArray]:
        if self.recording is not None:
            return self.recording.rotary(frequencies, scale)
        cos, sin = self.cpu.rotary(positions, frequencies, scale)
        return self.device.send(cos), self.device.send(sin)

    def embed(self, weight: Weight, tokens: I64) -> DeviceArray:
        m, k = bound(weight), weight.format.kernel
        y = self.device.empty((tokens.shape[0], weight.format.cols))
        ids = tokens if isinstance(tokens, DeviceArray) else self.device.send(tokens)
        data, scales, biases = three(m)
        group, dtype, codes = max(k.group_size, 1), DTYPES[k.dtype], CODES[k.codes]
        self._rows["embed"](
            (tokens.shape[0], 1, 1), 256, 0, data, scales, biases, weight.format.cols, k.bits, group, dtype, codes, ids.address, y.address
        )  # fmt: skip
        return y

    def _vector(self, values: F32 | None) -> int:
        """The address of a copy of a parameter vector on the card, made once."""
        if values is None:
            return 0
        known = self._vectors.get(id(values))
        if known is None:
            known = self._vectors[id(values)] = values, self.device.send(np.ascontiguousarray(values, np.float32))
        return known[1].address

    def _starts(self, tokens: int, top_k: int) -> DeviceArray:
        """(tokens + 1,): top_k pairs each. Made once for the largest number of tokens."""
        known = self._pair_starts.get(top_k)
        if known is None or known.shape[0] <= tokens:
            if known is not None:
                self._old_starts.append(known)  # a recording may use it
            room = max(tokens, 2048) + 1
            known = self._pair_starts[top_k] = self.device.send((np.arange(room) * top_k).astype(np.int32))
        return known

    def _constant(self, what: str, tokens: int, top_k: int) -> DeviceArray:
        """Lists of the pairs of some tokens with top_k experts each, made once."""
        key = what, tokens, top_k
        if key not in self._constants:
            made = {
                "pair_token": np.repeat(np.arange(tokens), top_k),
                "blocks": np.stack([np.arange(tokens), np.zeros(tokens, np.int64)], -1),
            }  # fmt: skip
            for name, values in made.items():
                self._constants[name, tokens, top_k] = self.device.send(values.astype(np.int32))
        return self._constants[key]
