"""Our own packs: reads and checks manifests, writes expert files. docs/format.md describes the format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..files import read_text
from ..formats import ExpertFormat, matrix_from_json
from .format import ALIGNMENT, MANIFEST, PACK_FORMAT, PACK_VERSION, ExpertLayout, ExpertSpec, TensorInfo, record_pieces
from .safetensors import header_bytes

__all__ = ["TRUNK", "check_trunk", "expert_layout", "experts_file", "read_manifest", "write_records"]

TRUNK = "trunk.safetensors"


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a pack folder and checks its top level. Raises CheckpointError."""
    file = path / MANIFEST
    try:
        manifest = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != PACK_FORMAT:
        raise CheckpointError(f"{file}: not a pack manifest")
    if type(manifest.get("version")) is not int or manifest["version"] not in (2, PACK_VERSION):
        raise CheckpointError(
            f"{file}: pack version {manifest.get('version')!r}; this program reads versions 2 and {PACK_VERSION}"
        )
    if manifest.get("convention") not in ("hf", "mlx"):
        raise CheckpointError(f"{file}: convention must be hf or mlx; got {manifest.get('convention')!r}")
    checksums = manifest.get("trunk_checksums")
    if not isinstance(checksums, dict) or not all(_is_hash(v) for v in checksums.values()):
        raise CheckpointError(f"{file}: trunk_checksums must give a checksum for each tensor")
    if not isinstance(manifest.get("layers"), list):
        raise CheckpointError(f"{file}: layers must be a list")
    return manifest


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 16 and all(c in "0123456789abcdef" for c in value)


def check_trunk(manifest: dict[str, Any], info: TensorInfo, data: NDArray[np.uint8]) -> None:
    """Raises CheckpointError if a trunk tensor's bytes do not match the manifest's checksum."""
    if xxhash.xxh3_64_hexdigest(data.data) != manifest["trunk_checksums"].get(info.name):
        raise CheckpointError(
            f"{info.file}: tensor {info.name}: checksum mismatch; the file is damaged, convert it again"
        )


def expert_layout(path: Path, manifest: dict[str, Any], layer: int, spec: ExpertSpec) -> ExpertLayout:
    """One layer's manifest entry, checked against the sizes of the model and of the file."""
    num_experts, inner, hidden = spec.count, spec.inner, spec.hidden
    where = f"{path / MANIFEST}: layer {layer}"
    layers = manifest["layers"]
    if layer >= len(layers) or not isinstance(layers[layer], dict):
        raise CheckpointError(f"{where}: missing")
    entry = layers[layer]
    try:
        name, data_offset, record_bytes = entry["file"], entry["data_offset"], entry["record_bytes"]
        matrices = [matrix_from_json(entry["matrices"][part]) for part in ("gate", "up", "down")]
        checksums = entry["checksums"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: incomplete entry: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{where}: file must be a file name; got {name!r}")
    for m, (rows, cols) in zip(matrices, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
        if (m.rows, m.cols) != (rows, cols):
            raise CheckpointError(f"{where}: a matrix has shape {(m.rows, m.cols)}, expected {(rows, cols)}")
    gate, up, down = matrices
    format = ExpertFormat(gate, up, down, spec.activation, "f32" if spec.biased else "")
    if manifest["version"] == 2 and any(m.part_bytes != m.tiled_bytes for m in matrices):
        raise CheckpointError(
            f"{where}: version 2 packs of matrices with {inner} or {hidden} rows are damaged; convert the checkpoint again"
        )
    pieces, expected = record_pieces(format)
    if (
        (type(data_offset), type(record_bytes)) != (int, int)
        or data_offset < 0
        or data_offset % ALIGNMENT
        or record_bytes != expected
    ):
        raise CheckpointError(
            f"{where}: record_bytes {record_bytes!r} at {data_offset!r}, expected {expected} at a multiple of {ALIGNMENT}"
        )
    if not isinstance(checksums, list) or len(checksums) != num_experts or not all(_is_hash(c) for c in checksums):
        raise CheckpointError(f"{where}: checksums must be a list of {num_experts} checksums")
    file = path / name
    try:
        size = file.stat().st_size
    except OSError:
        raise CheckpointError(f"{path}: missing file {name} (experts of layer {layer})") from None
    if size < data_offset + num_experts * record_bytes:
        raise CheckpointError(
            f"{file}: truncated: {size} bytes, layer {layer} needs {data_offset + num_experts * record_bytes}"
        )
    offsets = data_offset + np.arange(num_experts, dtype=np.int64)[:, None] * record_bytes
    return ExpertLayout(
        layer,
        format,
        (file,),
        np.zeros((num_experts, 1), np.int64),
        offsets,
        (record_bytes,),
        tuple((0, at) for at in pieces),
        tuple(int(c, 16) for c in checksums),
        tiled=True,
    )


def experts_file(layer: int) -> str:
    """The name of the file that holds a layer's experts."""
    return f"experts-{layer:05}.safetensors"


def write_records(
    file: BinaryIO, layer: int, count: int, format: ExpertFormat, records: Iterable[NDArray[np.uint8]]
) -> dict[str, Any]:
    """Writes a layer's file from its start: `count` records in the layout of record_pieces(). Returns its manifest entry."""
    record_bytes = record_pieces(format)[1]
    tensor: dict[str, tuple[str, tuple[int, ...], int]] = {
        "experts": ("U8", (count, record_bytes), count * record_bytes)
    }
    header = header_bytes(tensor, {"format": PACK_FORMAT, "layer": str(layer)}, aligned=True)
    file.write(header)
    checksums = []
    for record in records:
        file.write(record.data)
        checksums.append(xxhash.xxh3_64_hexdigest(record.data))
    return {
        "file": experts_file(layer),
        "data_offset": len(header),
        "record_bytes": record_bytes,
        "matrices": {part: m.to_json() for part, m in zip(("gate", "up", "down"), format.matrices, strict=True)},
        "checksums": checksums,
    }
