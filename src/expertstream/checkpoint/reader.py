"""Opens a checkpoint folder in place; provides its trunk matrices, its vectors and the location of its experts.

Names are made canonical (`model.layers.N.…`, `lm_head.weight`) once, here. Kinds of checkpoint:
  hf    BF16, F16 or F32 safetensors as `transformers` writes them
  mlx   affine 2, 4 or 8 bits as `mlx-lm` writes them, bits and group size per tensor from config.json
  pack  ours (docs/format.md): a trunk like one of the above, and one aligned record per expert
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import CheckpointError
from ..files import read_json
from ..formats import AFFINE_BITS, AFFINE_GROUPS, MXFP4, MXFP4_GROUP, Affine, Dense, MatrixFormat
from ..formats.numbers import F32, to_f32
from ..ops import Weight
from . import pack
from .format import MANIFEST, ExpertLayout, ExpertSpec, TensorInfo, WeightSpec
from .layouts import find_experts
from .safetensors import read_header, read_tensor

__all__ = ["FLOATS", "Checkpoint", "open_checkpoint"]

_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_SKIPPED = re.compile(r"(?:model\.|language_model\.)?(visual|vision_tower|mtp)\.")
_MODES = ("affine", "mxfp4")
_STACKED = re.compile(r"\.switch_mlp\.|\.experts\.gate_proj\.")
FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


def canonical(name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


class Quantization(NamedTuple):
    """A matrix's entry in MLX's quantization table."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def known(self) -> bool:
        if self.mode == "mxfp4":
            return (self.bits, self.group_size) == (4, MXFP4_GROUP)
        return self.mode == "affine" and self.bits in AFFINE_BITS and self.group_size in AFFINE_GROUPS


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. `tensors`: by canonical name, without a pack's experts."""

    path: Path
    kind: str  # hf, mlx or pack
    convention: str  # hf or mlx: how norms and convolutions are stored
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    skipped: dict[str, int]  # ignored parts: vision, MTP → number of tensors
    quantization: dict[str, Quantization]  # module or "" (default)
    manifest: dict[str, Any] | None = None

    def fingerprint(self) -> str:
        """A hash of the files, 40 hex digits: JSON files by content (a pack's manifest has checksums of all its weights), the others by
        name, size and, if there is no manifest, modification time."""
        digest = hashlib.blake2b(digest_size=20)
        for file in sorted({*self.path.iterdir(), *(info.file for info in self.tensors.values())}):
            name = file.relative_to(self.path).as_posix()
            if file.suffix == ".json":
                digest.update(name.encode() + b"\0" + file.read_bytes())
            elif file.suffix == ".safetensors":
                stat = file.stat()
                changed = 0 if self.manifest is not None else stat.st_mtime_ns
                digest.update(f"{name}\0{stat.st_size} {changed}".encode())
        return digest.hexdigest()

    def tensor(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: missing tensor {name}") from None

    def check_shape(self, info: TensorInfo, expected: tuple[int, ...]) -> None:
        if info.shape != expected:
            raise CheckpointError(f"{info.file}: tensor {info.name} has shape {info.shape}, expected {expected}")

    def float_dtype(self, info: TensorInfo) -> str:
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
            self.check_shape(info, (*lead, rows, cols))
            return Dense(rows, cols, self.float_dtype(info))
        q = self.quantization.get(module) or self.quantization.get("") or Quantization(0, 0)
        if not q.known:
            raise CheckpointError(
                f"{self.path}: {module} is quantized with {q.bits} bits in groups of {q.group_size}; "
                "2, 4 and 8 bits in groups of 32, 64 and 128 are supported"
            )
        if info.dtype != "U32" or cols % q.group_size:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has dtype {info.dtype}, expected U32 for {q.bits}-bit weights"
            )
        scales = self.tensor(f"{module}.scales")
        self.check_shape(info, (*lead, rows, cols * q.bits // 32))
        self.check_shape(scales, (*lead, rows, cols // q.group_size))
        if q.mode == "mxfp4":
            if scales.dtype != "U8":
                raise CheckpointError(f"{scales.file}: tensor {scales.name} has dtype {scales.dtype}, expected U8")
            return MXFP4(rows, cols)
        if self.manifest is not None and f"{module}.biases" not in self.tensors:
            return Affine(rows, cols, q.bits, q.group_size, self.float_dtype(scales), symmetric=True)
        biases = self.tensor(f"{module}.biases")
        self.check_shape(biases, (*lead, rows, cols // q.group_size))
        if scales.dtype != biases.dtype:
            raise CheckpointError(
                f"{biases.file}: tensor {biases.name} has dtype {biases.dtype}, but its scales have {scales.dtype}"
            )
        return Affine(rows, cols, q.bits, q.group_size, self.float_dtype(scales))

    def read(self, info: TensorInfo) -> Any:
        """A tensor's bytes, checked against the manifest's checksum if there is one."""
        data = read_tensor(info)
        if self.manifest is not None:
            pack.check_trunk(self.manifest, info, data)
        return data

    def weight(self, module: str, spec: WeightSpec) -> Weight:
        """A trunk matrix as stored."""
        format = self.matrix_format(module, *spec.shape)
        return Weight(format, tuple(self.read(self.tensor(f"{module}.{part.name}")) for part in format.parts))

    def vector(self, name: str, spec: WeightSpec) -> F32:
        """A trunk tensor that is not a matrix as float32: norms with their +1, convolutions as (kernel, channels)."""
        info = self.tensor(name)
        dtype = self.float_dtype(info)
        expected = spec.shape
        if spec.kind == "conv" and self.convention == "mlx":
            expected = (spec.shape[0], spec.shape[2], spec.shape[1])
        self.check_shape(info, expected)
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

    def experts(self, layer: int, spec: ExpertSpec) -> ExpertLayout:
        """The location of a layer's routed experts."""
        m = self.manifest
        layout = find_experts(self, layer, spec) if m is None else pack.expert_layout(self.path, m, layer, spec)
        gate, up = layout.format.gate.kernel, layout.format.up.kernel
        if (gate.bits, gate.group_size, gate.codes) != (up.bits, up.group_size, up.codes):
            raise CheckpointError(
                f"{self.path}: layer {layer}: gate and up of the experts must have the same bits and groups"
            )
        return layout


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder. Reads headers only. Raises CheckpointError."""
    path = Path(path)
    try:
        if not path.is_dir():
            what = "is a file; give the folder that contains config.json" if path.exists() else "no such folder"
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
                raise CheckpointError(f"{file}: tensor {name} is also in {tensors[canonical(name)].file.name}")
            else:
                tensors[canonical(name)] = info
    if manifest is not None:
        kind, convention = "pack", manifest["convention"]
    else:
        kind = convention = "mlx" if any(_STACKED.search(name) for name in tensors) else "hf"
    return Checkpoint(path, kind, convention, config, tensors, skipped, _quantization(path, config), manifest)


def _stays_inside(name: Any) -> bool:
    """Whether a name of an index is that of a file in the folder or in a folder below it."""
    parts = name.split("/") if isinstance(name, str) else [""]
    return all(part not in ("", ".", "..") and "\0" not in part for part in parts)


def _files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those named in its index, or the only one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_stays_inside, weight_map.values())):
            raise CheckpointError(f"{index}: weight_map must give a file of this folder for each tensor")
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


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Quantization]:
    """MLX's table: default bits, group size and mode, and overrides by module."""
    table = config.get("quantization")
    other = config.get("quantization_config")
    if table is None:
        if isinstance(other, dict) and other.get("quant_method") != "mxfp4":
            method = other.get("quant_method", "an unnamed method")
            raise CheckpointError(
                f"{path}: quantization {method!r} is not supported; use the BF16 release or an MLX affine conversion of this model"
            )
        return {}
    if not isinstance(table, dict) or table.get("mode", "affine") not in _MODES:
        said = table.get("mode") if isinstance(table, dict) else table
        raise CheckpointError(f"{path}: unknown quantization {said!r} in config.json; affine and mxfp4 are supported")
    found: dict[str, Quantization] = {}
    for module, entry in {"": table, **{k: v for k, v in table.items() if isinstance(v, dict)}}.items():
        bits: Any = entry.get("bits", table.get("bits"))
        group: Any = entry.get("group_size", table.get("group_size"))
        # An entry with bits of its own is affine unless it says otherwise, whatever the default is.
        default: Any = "affine" if entry is not table and "bits" in entry else table.get("mode", "affine")
        mode: Any = entry.get("mode", default)
        known = mode in _MODES and type(bits) is int and type(group) is int
        if not known or (mode == "mxfp4" and not Quantization(bits, group, mode).known):
            raise CheckpointError(f"{path}: unknown quantization of {module or 'the model'} in config.json: {entry}")
        found[canonical(f"{module}.").removesuffix(".")] = Quantization(bits, group, mode)
    return found
