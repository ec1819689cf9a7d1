"""Locates the routed experts of a layer in a checkpoint that is not a pack: one function for each storage scheme."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..errors import CheckpointError
from ..formats import MXFP4, MXFP4_GROUP, Dense, ExpertFormat, MatrixFormat
from ..formats.numbers import DTYPE_BYTES
from .format import ExpertLayout, ExpertSpec, TensorInfo

__all__ = ["Tensors", "find_experts"]


class Tensors(Protocol):
    """A checkpoint's tensors; each method raises CheckpointError for one that is missing or not as expected."""

    @property
    def tensors(self) -> dict[str, TensorInfo]: ...

    def tensor(self, name: str) -> TensorInfo: ...
    def check_shape(self, info: TensorInfo, expected: tuple[int, ...]) -> None: ...
    def float_dtype(self, info: TensorInfo) -> str: ...
    def matrix_format(self, module: str, rows: int, cols: int, stack: int = 0) -> MatrixFormat: ...


def find_experts(c: Tensors, layer: int, spec: ExpertSpec) -> ExpertLayout:
    """Raises CheckpointError."""
    module = spec.module
    for stacked in ("switch_mlp", "experts"):
        if f"{module}.{stacked}.gate_proj.weight" in c.tensors:
            return _stacked(c, layer, f"{module}.{stacked}", spec)
    if f"{module}.experts.0.gate_proj.weight" in c.tensors:
        return _separate(c, layer, f"{module}.experts", spec)
    if f"{module}.experts.gate_up_proj_blocks" in c.tensors:
        return _interleaved_mxfp4(c, layer, f"{module}.experts", spec)
    return _fused(c, layer, f"{module}.experts", spec)


class _Builder:
    """Collects the byte ranges of an expert, and the parts inside them."""

    def __init__(self, layer: int, spec: ExpertSpec) -> None:
        self.layer, self.spec = layer, spec
        self.sources: list[Sequence[TensorInfo]] = []
        self.lengths: list[int] = []
        self.pieces: list[tuple[int, int]] = []
        self.interleaved: list[int] = []

    def range(self, tensors: Sequence[TensorInfo], length: int) -> int:
        """Adds `length` bytes per expert: of one tensor that holds all experts, or of one tensor for each. Returns the range's number."""
        self.sources.append(tensors)
        self.lengths.append(length)
        return len(self.lengths) - 1

    def part(self, range_: int, offset: int = 0, interleaved: int = 1) -> None:
        self.pieces.append((range_, offset))
        self.interleaved.append(interleaved)

    def layout(self, format: ExpertFormat) -> ExpertLayout:
        files = sorted({t.file for tensors in self.sources for t in tensors})
        index = {file: i for i, file in enumerate(files)}
        shape = (self.spec.count, len(self.sources))
        file_index, offsets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for r, (tensors, length) in enumerate(zip(self.sources, self.lengths, strict=True)):
            for e in range(self.spec.count):
                stacked = len(tensors) == 1 and self.spec.count > 1
                tensor = tensors[0] if stacked else tensors[e]
                file_index[e, r] = index[tensor.file]
                offsets[e, r] = tensor.offset + (e * length if stacked else 0)
        interleaved = tuple(self.interleaved) if max(self.interleaved) > 1 else ()
        return ExpertLayout(
            self.layer,
            format,
            tuple(files),
            file_index,
            offsets,
            tuple(self.lengths),
            tuple(self.pieces),
            interleaved=interleaved,
        )


def _expert_format(spec: ExpertSpec, matrices: Sequence[MatrixFormat], bias_dtype: str = "") -> ExpertFormat:
    gate, up, down = matrices
    return ExpertFormat(gate, up, down, spec.activation, bias_dtype)


def _stacked(c: Tensors, layer: int, prefix: str, spec: ExpertSpec) -> ExpertLayout:
    """MLX: a tensor (experts, rows, …) for each part of each matrix."""
    b, formats, dtypes = _Builder(layer, spec), [], set()
    for name, shape in spec.shapes.items():
        m = c.matrix_format(f"{prefix}.{name}", *shape, stack=spec.count)
        formats.append(m)
        for part, size in zip(m.parts, m.part_bytes, strict=True):
            b.part(b.range([c.tensor(f"{prefix}.{name}.{part.name}")], size))
        if spec.biased:
            info = c.tensor(f"{prefix}.{name}.bias")
            c.check_shape(info, (spec.count, shape[0]))
            dtypes.add(c.float_dtype(info))
            b.part(b.range([info], shape[0] * DTYPE_BYTES[c.float_dtype(info)]))
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{prefix}: the biases of the experts must have one dtype; got {', '.join(sorted(dtypes))}"
        )
    return b.layout(_expert_format(spec, formats, *dtypes))


def _separate(c: Tensors, layer: int, prefix: str, spec: ExpertSpec) -> ExpertLayout:
    """Older Hugging Face: a tensor for each matrix of each expert."""
    _refuse_biases(spec, prefix)
    b, formats = _Builder(layer, spec), []
    for name, shape in spec.shapes.items():
        each = [c.matrix_format(f"{prefix}.{e}.{name}", *shape) for e in range(spec.count)]
        if len(set(each)) > 1 or each[0].quantized:
            raise CheckpointError(f"{prefix}: {name} of the experts must be dense and have one dtype")
        formats.append(each[0])
        tensors = [c.tensor(f"{prefix}.{e}.{name}.weight") for e in range(spec.count)]
        b.part(b.range(tensors, each[0].nbytes))
    return b.layout(_expert_format(spec, formats))


def _fused(c: Tensors, layer: int, prefix: str, spec: ExpertSpec) -> ExpertLayout:
    """Hugging Face: gate and up in one tensor (experts, 2·inner, hidden), gate first."""
    gate_up, down = c.tensor(f"{prefix}.gate_up_proj"), c.tensor(f"{prefix}.down_proj")
    if spec.biased and gate_up.shape == (spec.count, spec.hidden, 2 * spec.inner):
        raise CheckpointError(
            f"{gate_up.file}: tensor {gate_up.name} is dense and transposed, which is not supported; use the MXFP4 release"
        )
    _refuse_biases(spec, prefix)
    c.check_shape(gate_up, (spec.count, 2 * spec.inner, spec.hidden))
    c.check_shape(down, (spec.count, spec.hidden, spec.inner))
    gate, last = (
        Dense(spec.inner, spec.hidden, c.float_dtype(gate_up)),
        Dense(spec.hidden, spec.inner, c.float_dtype(down)),
    )
    b = _Builder(layer, spec)
    both = b.range([gate_up], 2 * gate.nbytes)
    b.part(both)
    b.part(both, gate.nbytes)
    b.part(b.range([down], last.nbytes))
    return b.layout(_expert_format(spec, (gate, gate, last)))


def _interleaved_mxfp4(c: Tensors, layer: int, prefix: str, spec: ExpertSpec) -> ExpertLayout:
    """gpt-oss: MXFP4 blocks, their scales and a bias; rows of gate and up alternate, gate first."""
    b, formats, dtypes, ranges = _Builder(layer, spec), [], set(), {}
    if spec.hidden % MXFP4_GROUP or spec.inner % MXFP4_GROUP:
        raise CheckpointError(
            f"{prefix}: the sizes of MXFP4 matrices must be multiples of {MXFP4_GROUP}; got {spec.inner}×{spec.hidden}"
        )
    for name, rows, cols in (("gate_up_proj", 2 * spec.inner, spec.hidden), ("down_proj", spec.hidden, spec.inner)):
        blocks, scales = c.tensor(f"{prefix}.{name}_blocks"), c.tensor(f"{prefix}.{name}_scales")
        groups = cols // MXFP4_GROUP
        c.check_shape(blocks, (spec.count, rows, groups, MXFP4_GROUP // 2))
        c.check_shape(scales, (spec.count, rows, groups))
        for info in (blocks, scales):
            if info.dtype != "U8":
                raise CheckpointError(f"{info.file}: tensor {info.name} has dtype {info.dtype}, expected U8")
        ranges[name] = [b.range([blocks], rows * cols // 2), b.range([scales], rows * groups)]
        if spec.biased:
            bias = c.tensor(f"{prefix}.{name}_bias")
            c.check_shape(bias, (spec.count, rows))
            dtypes.add(c.float_dtype(bias))
            ranges[name].append(b.range([bias], rows * DTYPE_BYTES[c.float_dtype(bias)]))
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{prefix}: the biases of the experts must have one dtype; got {', '.join(sorted(dtypes))}"
        )
    dtype = "".join(dtypes)
    for row, (rows, cols) in enumerate(spec.shapes.values()):
        m = MXFP4(rows, cols)
        formats.append(m)
        row_bytes = [part.row_bytes for part in m.parts] + ([DTYPE_BYTES[dtype]] if dtype else [])
        if row == 2:
            for r in ranges["down_proj"]:
                b.part(r)
        else:
            for r, size in zip(ranges["gate_up_proj"], row_bytes, strict=True):
                b.part(r, row * size, interleaved=2)
    return b.layout(_expert_format(spec, formats, dtype))


def _refuse_biases(spec: ExpertSpec, prefix: str) -> None:
    if spec.biased:
        raise CheckpointError(
            f"{prefix}: the experts of this model have biases, which are not supported in this storage scheme"
        )
