"""Describes a checkpoint's bytes: its tensors, and the location of each expert's parts. Pure data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats import SWIGLU, Activation, Bytes, ExpertFormat, MatrixFormat
from ..formats.numbers import to_f32

__all__ = [
    "ALIGNMENT",
    "MANIFEST",
    "PACK_FORMAT",
    "PACK_VERSION",
    "ExpertLayout",
    "ExpertSpec",
    "TensorInfo",
    "WeightSpec",
    "align",
    "gather",
    "kernel_parts",
    "make_record",
    "record_pieces",
]

ALIGNMENT = 4096  # O_DIRECT's unit: offsets, lengths and destinations of reads
PIECE_ALIGNMENT = 64  # of the parts of a record: a cache line
MANIFEST = "expertstream.json"
PACK_FORMAT = "expertstream-pack"
PACK_VERSION = 3  # 2: experts in tiles; 3: including the padding of the last one


def align(value: int, to: int = ALIGNMENT) -> int:
    """The next multiple of `to`."""
    return (value + to - 1) // to * to


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file; offset is from the start of the file."""

    name: str
    file: Path
    dtype: str  # safetensors' name: BF16, F16, F32, U32, U8, …
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WeightSpec:
    """What a model expects of one trunk tensor.

    kind: "matrix" (out, in), may be quantized; "vector"; "norm", a norm whose stored weight lacks its +1 except in MLX files;
    "conv", (channels, 1, kernel), in MLX files (channels, kernel, 1). sensitive: a matrix that the converter never quantizes.
    """

    kind: str
    shape: tuple[int, ...]
    sensitive: bool = False


@dataclass(frozen=True)
class ExpertSpec:
    """What a model expects of the routed experts of one layer: `count` of them, gate and up (inner, hidden), down (hidden, inner), each
    with a bias if `biased`. module: their parent, such as model.layers.0.mlp."""

    module: str
    count: int
    inner: int
    hidden: int
    activation: Activation = SWIGLU
    biased: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """The location of one layer's experts: each expert is R byte ranges, which contain its parts (ExpertFormat.parts).

    A pack has R = 1; fused BF16 tensors have 2, MLX tensors 9.
    """

    layer: int
    format: ExpertFormat
    files: tuple[Path, ...]
    file_index: NDArray[np.int64]  # (experts, R), into files
    offsets: NDArray[np.int64]  # (experts, R), bytes from the start of the file
    lengths: tuple[int, ...]  # (R,)
    pieces: tuple[tuple[int, int], ...]  # for each part, (range, offset in it)
    checksums: tuple[int, ...] | None = None  # xxh3-64 of each expert's single range; packs only
    tiled: bool = False  # quantized matrices are stored in tiles; packs only
    interleaved: tuple[int, ...] = ()  # for each part, how many matrices' rows alternate in its range; () for 1

    @property
    def num_experts(self) -> int:
        return int(self.offsets.shape[0])

    @property
    def in_place(self) -> bool:
        """Whether kernels can use the experts in place: as they were read, or with their tiles written over them."""
        biased = self.format.bias_dtype not in ("", "f32")
        return self.tiled or not (biased or any(n > 1 for n in self.interleaved))

    @property
    def room(self) -> tuple[int, ...]:
        """(R,) bytes that each range takes in memory: tiles may be larger than what was read."""
        if not self.in_place:
            return self.lengths
        sizes = [part.nbytes for part in self.format.parts]
        ends = [(r, at + size) for (r, at), size in zip(self.pieces, sizes, strict=True)]
        return tuple(max(length, *(end for r, end in ends if r == i)) for i, length in enumerate(self.lengths))

    def stored_parts(self, memory: Bytes, starts: Sequence[int]) -> list[Bytes]:
        """Each part's own bytes, flat, for an expert whose parts begin at `starts` (P,) in memory; copies if rows are interleaved."""
        each = self.interleaved or (1,) * len(starts)
        return [
            gather(memory, at, part.rows, part.row_bytes, n)
            for part, at, n in zip(self.format.parts, starts, each, strict=True)
        ]

    @property
    def bytes_per_expert(self) -> int:
        return sum(self.lengths)


def gather(memory: Bytes, at: int, rows: int, row_bytes: int, interleaved: int) -> Bytes:
    """`rows` rows, every `interleaved`-th one from `at` on: flat."""
    if interleaved == 1:
        return memory[at : at + rows * row_bytes]
    span = memory[at : at + ((rows - 1) * interleaved + 1) * row_bytes]
    strided = np.lib.stride_tricks.as_strided(span, (rows, row_bytes), (interleaved * row_bytes, 1))
    return np.ascontiguousarray(strided).ravel()


def kernel_parts(
    format: ExpertFormat, stored: Sequence[Bytes], tiled: Callable[[MatrixFormat, Sequence[Bytes]], Sequence[Bytes]]
) -> Iterator[Bytes]:
    """An expert's parts in the kernels' layout, from those stored in a checkpoint. tiled: Ops.tiled."""
    at = 0
    for m in format.matrices:
        yield from tiled(m, stored[at : at + len(m.parts)])
        at += len(m.parts)
        if format.bias_dtype:
            yield to_f32(stored[at], format.bias_dtype).view(np.uint8)
            at += 1


def make_record(
    format: ExpertFormat, stored: Sequence[Bytes], tiled: Callable[[MatrixFormat, Sequence[Bytes]], Sequence[Bytes]]
) -> Bytes:
    """A pack's record of one expert: kernel_parts() at the offsets of record_pieces()."""
    offsets, length = record_pieces(format)
    record = np.zeros(length, np.uint8)
    for at, part in zip(offsets, kernel_parts(format, stored, tiled), strict=True):
        record[at : at + part.shape[0]] = part
    return record


def record_pieces(format: ExpertFormat) -> tuple[list[int], int]:
    """Offsets of an expert's parts in a pack's record, and the record's length, a multiple of 4,096."""
    offsets, at = [], 0
    for part in format.parts:
        offsets.append(at)
        at = align(at + part.nbytes, PIECE_ALIGNMENT)
    return offsets, align(at)
