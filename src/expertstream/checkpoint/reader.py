"""Opens a checkpoint folder where it lies and answers three questions: this trunk matrix, this vector, where the experts are.

Names are made canonical (`model.layers.N.…`, `lm_head.weight`) once, here. Kinds of checkpoint:
  hf    BF16, F16 or F32 safetensors as `transformers` writes them
  mlx   affine 2, 4 or 8 bits as `mlx-lm` writes them, bits and group size a tensor from config.json
  pack  ours (docs/format.md): a trunk like one of the above, and one aligned record an expert
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import read_text
from ..ops import F32, ExpertFormat, MatrixFormat, Weight, to_f32
from . import pack
from .format import MANIFEST, ExpertLayout, TensorInfo, WeightSpec
from .safetensors import read_header, read_tensor

__all__ = ["FLOATS", "Checkpoint", "open_checkpoint", "read_json"]

_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_SKIPPED = re.compile(r"(?:model\.|language_model\.)?(visual|vision_tower|mtp)\.")
FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def canonical(name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}; a checkpoint folder has one") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. `tensors` are by canonical name, experts of a pack apart."""

    path: Path
    kind: str  # hf, mlx or pack
    convention: str  # hf or mlx: how norms and convolutions are stored
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    skipped: dict[str, int]  # what is left out: vision, MTP → number of tensors
    quantization: dict[str, tuple[int, int]]  # module or "" (default) → bits, group_size
    manifest: dict[str, Any] | None = None

    def fingerprint(self) -> str:
        """Of what the files say: JSON files as they are (a pack's manifest has checksums of all its weights), the others by name,
        size and, where nothing vouches for their content, time of change. 40 hex digits."""
        digest = hashlib.blake2b(digest_size=20)
        for file in sorted(self.path.iterdir()):
            if file.suffix == ".json":
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
            elif file.suffix == ".safetensors":
                stat = file.stat()
                changed = 0 if self.manifest is not None else stat.st_mtime_ns
                digest.update(f"{file.name}\0{stat.st_size} {changed}".encode())
        return digest.hexdigest()

    def tensor(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: missing tensor {name}") from None

    def _check_shape(self, info: TensorInfo, expected: tuple[int, ...]) -> None:
        if info.shape != expected:
            raise CheckpointError(f"{info.file}: tensor {info.name} has shape {info.shape}, expected {expected}")

    def _float(self, info: TensorInfo) -> str:
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has dtype {info.dtype}, expected one of {', '.join(FLOATS)}"
            )
        return FLOATS[info.dtype]

    def matrix_format(self, module: str, rows: int, cols: int, stack: int = 0) -> MatrixFormat:
        """How `module`.weight (rows, cols) is stored, checked against its tensors; stack: leading axis of stacked experts."""
        lead = (stack,) if stack else ()
        info = self.tensor(f"{module}.weight")
        if f"{module}.scales" not in self.tensors:
            dtype = self._float(info)
            self._check_shape(info, (*lead, rows, cols))
            return MatrixFormat(rows, cols, 32 if dtype == "f32" else 16, 0, dtype)
        bits, group = self.quantization.get(module) or self.quantization.get("") or (0, 0)
        if bits not in (2, 4, 8) or group not in (32, 64, 128):
            raise CheckpointError(
                f"{self.path}: {module} is quantized with {bits} bits in groups of {group}; "
                "2, 4 and 8 bits in groups of 32, 64 and 128 can be read"
            )
        if info.dtype != "U32" or cols % group:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has dtype {info.dtype}, expected U32 for {bits}-bit weights"
            )
        scales = self.tensor(f"{module}.scales")
        self._check_shape(info, (*lead, rows, cols * bits // 32))
        self._check_shape(scales, (*lead, rows, cols // group))
        if self.manifest is not None and f"{module}.biases" not in self.tensors:
            return MatrixFormat(rows, cols, bits, group, self._float(scales), symmetric=True)
        biases = self.tensor(f"{module}.biases")
        self._check_shape(biases, (*lead, rows, cols // group))
        if scales.dtype != biases.dtype:
            raise CheckpointError(
                f"{biases.file}: tensor {biases.name} has dtype {biases.dtype}, its scales {scales.dtype}"
            )
        return MatrixFormat(rows, cols, bits, group, self._float(scales))

    def read(self, info: TensorInfo) -> Any:
        """A tensor's bytes, against the manifest's checksum where there is one."""
        data = read_tensor(info)
        if self.manifest is not None:
            pack.check_trunk(self.manifest, info, data)
        return data

    def weight(self, module: str, spec: WeightSpec) -> Weight:
        """A trunk matrix as stored."""
        format = self.matrix_format(module, *spec.shape)
        empty = np.empty(0, np.uint8)
        scales, biases = empty, empty
        if format.quantized:
            scales = self.read(self.tensor(f"{module}.scales"))
            if not format.symmetric:
                biases = self.read(self.tensor(f"{module}.biases"))
        return Weight(format, self.read(self.tensor(f"{module}.weight")), scales, biases)

    def vector(self, name: str, spec: WeightSpec) -> F32:
        """A trunk tensor that is not a matrix as float32: norms with their +1, convolutions as (kernel, channels)."""
        info = self.tensor(name)
        dtype = self._float(info)
        expected = spec.shape
        if spec.kind == "conv" and self.convention == "mlx":
            expected = (spec.shape[0], spec.shape[2], spec.shape[1])
        self._check_shape(info, expected)
        data = self.read(info)
        values = to_f32(data, dtype)
        if spec.kind == "conv":
            return np.ascontiguousarray(values.reshape(spec.shape[0], spec.shape[2]).T)
        if spec.kind == "norm" and self.convention == "hf":
            values = values + np.float32(1)
        return values.reshape(spec.shape)

    def trunk_bytes(self, specs: dict[str, WeightSpec]) -> int:
        """Bytes of the trunk's tensors as stored."""
        suffixes = {"matrix": (".weight", ".scales", ".biases")}
        names = (name + suffix for name, spec in specs.items() for suffix in suffixes.get(spec.kind, ("",)))
        return sum(self.tensors[name].nbytes for name in names if name in self.tensors)

    def experts(self, layer: int, num_experts: int, inner: int, hidden: int) -> ExpertLayout:
        """Where the routed experts of a layer lie: gate, up (inner, hidden), down (hidden, inner)."""
        layout = self._experts(layer, num_experts, inner, hidden)
        gate, up = layout.format.gate, layout.format.up
        if (gate.bits, gate.group_size, gate.symmetric) != (up.bits, up.group_size, up.symmetric):
            raise CheckpointError(
                f"{self.path}: layer {layer}: gate and up of the experts have different bits or groups"
            )
        return layout

    def _experts(self, layer: int, num_experts: int, inner: int, hidden: int) -> ExpertLayout:
        if self.manifest is not None:
            return pack.expert_layout(self.path, self.manifest, layer, num_experts, inner, hidden)
        prefix = f"model.layers.{layer}.mlp"
        if f"{prefix}.switch_mlp.gate_proj.weight" in self.tensors:
            return self._stacked_experts(layer, f"{prefix}.switch_mlp", num_experts, inner, hidden)
        if f"{prefix}.experts.0.gate_proj.weight" in self.tensors:
            return self._separate_experts(layer, f"{prefix}.experts", num_experts, inner, hidden)
        return self._fused_experts(layer, f"{prefix}.experts", num_experts, inner, hidden)

    def _layout(
        self,
        layer: int,
        num_experts: int,
        format: ExpertFormat,
        parts: list[list[TensorInfo]],
        lengths: list[int],
        pieces: list[tuple[int, int]],
        stacked: bool,
    ) -> ExpertLayout:
        """parts: R lists, each of one tensor that holds all experts (stacked) or of one tensor an expert."""
        files = sorted({t.file for p in parts for t in p})
        index = {file: i for i, file in enumerate(files)}
        shape = (num_experts, len(parts))
        file_index, offsets = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for r, (tensors, length) in enumerate(zip(parts, lengths, strict=True)):
            for e in range(num_experts):
                tensor = tensors[0] if stacked else tensors[e]
                file_index[e, r] = index[tensor.file]
                offsets[e, r] = tensor.offset + (e * length if stacked else 0)
        return ExpertLayout(layer, format, tuple(files), file_index, offsets, tuple(lengths), tuple(pieces))

    def _stacked_experts(self, layer: int, prefix: str, num_experts: int, inner: int, hidden: int) -> ExpertLayout:
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        formats = [self.matrix_format(f"{prefix}.{name}", *shape, stack=num_experts) for name, shape in shapes.items()]
        parts: list[list[TensorInfo]] = []
        lengths, pieces = [], []
        for name, m in zip(shapes, formats, strict=True):
            for suffix, size in zip(("weight", "scales", "biases"), m.part_bytes, strict=True):
                if size:
                    pieces.append((len(parts), 0))
                    parts.append([self.tensor(f"{prefix}.{name}.{suffix}")])
                    lengths.append(size)
                else:
                    pieces.append((len(parts) - 1, 0))
        return self._layout(layer, num_experts, ExpertFormat(*formats), parts, lengths, pieces, stacked=True)

    def _separate_experts(self, layer: int, prefix: str, num_experts: int, inner: int, hidden: int) -> ExpertLayout:
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        parts: list[list[TensorInfo]] = []
        formats, lengths, pieces = [], [], []
        for name, shape in shapes.items():
            per_expert = [self.matrix_format(f"{prefix}.{e}.{name}", *shape) for e in range(num_experts)]
            if len(set(per_expert)) > 1 or per_expert[0].quantized:
                raise CheckpointError(
                    f"{self.path}: layer {layer}: {name} of the experts must be dense and of one dtype"
                )
            formats.append(per_expert[0])
            pieces += [(len(parts), 0)] * 3
            parts.append([self.tensor(f"{prefix}.{e}.{name}.weight") for e in range(num_experts)])
            lengths.append(per_expert[0].data_bytes)
        return self._layout(layer, num_experts, ExpertFormat(*formats), parts, lengths, pieces, stacked=False)

    def _fused_experts(self, layer: int, prefix: str, num_experts: int, inner: int, hidden: int) -> ExpertLayout:
        gate_up, down = self.tensor(f"{prefix}.gate_up_proj"), self.tensor(f"{prefix}.down_proj")
        self._check_shape(gate_up, (num_experts, 2 * inner, hidden))
        self._check_shape(down, (num_experts, hidden, inner))
        formats = []
        for info, rows, cols in ((gate_up, inner, hidden), (gate_up, inner, hidden), (down, hidden, inner)):
            dtype = self._float(info)
            formats.append(MatrixFormat(rows, cols, 32 if dtype == "f32" else 16, 0, dtype))
        half = formats[0].data_bytes
        pieces = [(0, 0)] * 3 + [(0, half)] * 3 + [(1, 0)] * 3
        lengths = [2 * half, formats[2].data_bytes]
        return self._layout(
            layer, num_experts, ExpertFormat(*formats), [[gate_up], [down]], lengths, pieces, stacked=True
        )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder. Reads headers only. Raises CheckpointError."""
    path = Path(path)
    try:
        if not path.is_dir():
            what = "is a file; give the folder that holds config.json" if path.exists() else "no such folder"
            raise CheckpointError(f"{path}: {what}")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    config = read_json(path / "config.json")
    manifest = pack.read_manifest(path) if (path / MANIFEST).exists() else None
    files = [path / pack.TRUNK] if manifest is not None else _files(path)
    tensors: dict[str, TensorInfo] = {}
    skipped: dict[str, int] = {}
    for file in files:
        for name, info in read_header(file).items():
            if match := _SKIPPED.match(name):
                what = "MTP" if match[1] == "mtp" else "vision"
                skipped[what] = skipped.get(what, 0) + 1
            elif canonical(name) in tensors:
                raise CheckpointError(f"{file}: tensor {name} is in {tensors[canonical(name)].file.name} too")
            else:
                tensors[canonical(name)] = info
    if manifest is not None:
        kind, convention = "pack", manifest["convention"]
    else:
        kind = convention = "mlx" if any(".switch_mlp." in name for name in tensors) else "hf"
    return Checkpoint(path, kind, convention, config, tensors, skipped, _quantization(path, config), manifest)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the one there is."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and Path(f).name == f for f in weight_map.values()
        ):
            raise CheckpointError(f"{index}: weight_map must give a file name for each tensor")
        files = sorted({path / name for name in weight_map.values()})
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{path}: missing shard {missing[0]} ({len(missing)} of {len(files)} are missing); download it again"
            )
        return files
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path}: no *.safetensors file")
    if len(files) > 1:
        raise CheckpointError(f"{path}: {len(files)} *.safetensors files but no model.safetensors.index.json")
    return files


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """MLX's table: default bits and group size, and overrides by module."""
    table = config.get("quantization")
    other = config.get("quantization_config")
    if table is None:
        if isinstance(other, dict):
            method = other.get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{path}: quantization {method!r} is not supported; take the BF16 release or an MLX affine conversion of this model"
            )
        return {}
    if not isinstance(table, dict) or table.get("mode", "affine") != "affine":
        mode = table.get("mode") if isinstance(table, dict) else table
        raise CheckpointError(f"{path}: unknown quantization {mode!r} in config.json; affine is supported")
    found: dict[str, tuple[int, int]] = {}
    for module, entry in {"": table, **{k: v for k, v in table.items() if isinstance(v, dict)}}.items():
        bits, group = entry.get("bits", table.get("bits")), entry.get("group_size", table.get("group_size"))
        if entry.get("mode", "affine") != "affine" or type(bits) is not int or type(group) is not int:
            raise CheckpointError(f"{path}: unknown quantization of {module or 'the model'} in config.json: {entry}")
        found[canonical(f"{module}.").removesuffix(".")] = (bits, group)
    return found
