"""What a checkpoint says about its bytes: tensors, and where each expert's parts lie. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..ops import ExpertFormat

__all__ = [
    "ALIGNMENT",
    "MANIFEST",
    "PACK_FORMAT",
    "PACK_VERSION",
    "ExpertLayout",
    "TensorInfo",
    "WeightSpec",
    "align",
    "record_pieces",
]

ALIGNMENT = 4096  # O_DIRECT's unit: offsets, lengths and destinations of reads
PIECE_ALIGNMENT = 64  # of the parts of a record: a cache line
MANIFEST = "expertstream.json"
PACK_FORMAT = "expertstream-pack"
PACK_VERSION = 3  # 2: experts in tiles; 3: with room for the padding of the last one


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
    "conv", (channels, 1, kernel), in MLX files (channels, kernel, 1).
    """

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Where the experts of one layer lie: each expert is R byte ranges, and its nine parts lie inside them.

    A pack has R = 1; fused BF16 tensors have 2, MLX tensors 9.
    """

    layer: int
    format: ExpertFormat
    files: tuple[Path, ...]
    file_index: NDArray[np.int64]  # (experts, R), into files
    offsets: NDArray[np.int64]  # (experts, R), bytes from the start of the file
    lengths: tuple[int, ...]  # (R,)
    pieces: tuple[tuple[int, int], ...]  # nine of (range, offset in it): data, scales, biases of gate, up, down
    checksums: tuple[int, ...] | None = None  # xxh3-64 of each expert's one range, a pack's only
    tiled: bool = False  # quantized matrices lie as the kernels want them, a pack's only

    @property
    def num_experts(self) -> int:
        return int(self.offsets.shape[0])

    @property
    def needs_tiling(self) -> bool:
        return not self.tiled and any(m.quantized for m in self.format.matrices)

    @property
    def room(self) -> tuple[int, ...]:
        """(R,) bytes that each range takes in memory: tiles may be larger than what was read."""
        sizes = [size for matrix in self.format.matrices for size in matrix.tiled_bytes]
        ends = [(r, at + size) for (r, at), size in zip(self.pieces, sizes, strict=True)]
        return tuple(max(length, *(end for r, end in ends if r == i)) for i, length in enumerate(self.lengths))

    @property
    def bytes_per_expert(self) -> int:
        return sum(self.lengths)


def record_pieces(format: ExpertFormat) -> tuple[list[int], int]:
    """Offsets of the nine parts in a pack's record, and the record's length, a multiple of 4,096."""
    offsets, at = [], 0
    for matrix in format.matrices:
        for size in matrix.tiled_bytes:
            offsets.append(at)
            at = align(at + size, PIECE_ALIGNMENT)
    return offsets, align(at)
