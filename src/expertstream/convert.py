"""Writes a pack: `expertstream convert SRC DST`. docs/format.md describes the format.

Works in DST.partial, one file at a time; each is complete and synced before the journal lists it, and the folder is renamed to DST
at the end. So a conversion can be killed at any moment and resumes where it stopped, and a folder that opens is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from .checkpoint.format import (
    MANIFEST,
    PACK_FORMAT,
    PACK_VERSION,
    ExpertLayout,
    TensorInfo,
    make_record,
    record_pieces,
)
from .checkpoint.pack import TRUNK, experts_file, write_records
from .checkpoint.quantize import BitPolicy, check_finite, quantized_format, row_blocks
from .checkpoint.reader import FLOATS, Checkpoint, open_checkpoint
from .checkpoint.safetensors import header_bytes, read_tensor
from .errors import ConvertError
from .files import MAX_TEXT, open_regular, read_text
from .formats import Affine, Dense, ExpertFormat, MatrixFormat
from .formats.numbers import to_f32
from .models import config_of, expert_layouts, weight_map
from .ops.cpu import CpuOps
from .text.tokenizer import Tokenizer
from .units import format_bytes

__all__ = ["convert"]

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # blocks of each file that the fingerprint covers
_JOURNAL = "journal.json"
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "vocab.json", "merges.txt", "LICENSE", "README.md", "MODEL_CARD.md",
)  # fmt: skip
_DTYPE_NAMES = {"bf16": "BF16", "f16": "F16", "f32": "F32", "e8m0": "U8"}

Progress = Callable[[int, int], None]  # bytes done, bytes in total


def convert(
    source: str | Path,
    destination: str | Path,
    policy: BitPolicy,
    threads: int,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a pack of `source` to `destination`, which must not exist. MLX sources keep their bits exactly; `policy` applies to
    dense ones. Peak memory is a few hundred MiB. Raises ConvertError, CheckpointError."""
    destination = Path(destination)
    try:
        if destination.is_symlink() and not destination.exists():
            raise ConvertError(f"{destination}: is a broken link; choose another name or remove it")
        if destination.exists():
            raise ConvertError(f"{destination}: already exists; choose another name or remove it")
        if not destination.parent.is_dir():
            raise ConvertError(f"{destination.parent}: no such folder")
    except OSError as error:
        raise ConvertError(f"{destination}: {error.strerror}") from None
    checkpoint = open_checkpoint(source)
    if checkpoint.kind == "pack":
        raise ConvertError(f"{source}: is already a pack")
    _copied_files(checkpoint.path)
    Tokenizer(checkpoint.path)  # a pack without one cannot run; fail now, not after hours
    _Conversion(checkpoint, destination, policy, threads, progress).run()


class _Conversion:
    def __init__(
        self, checkpoint: Checkpoint, destination: Path, policy: BitPolicy, threads: int, progress: Progress
    ) -> None:
        self.checkpoint, self.destination, self.policy, self.progress = checkpoint, destination, policy, progress
        self.work = destination.with_name(destination.name + ".partial")
        self.ops = CpuOps(threads)
        self.config = config_of(checkpoint)
        self.specs = weight_map(self.config)
        self.layouts: list[ExpertLayout] = expert_layouts(self.config, checkpoint)
        self.expert_formats = [self._expert_format(layout) for layout in self.layouts]
        self.trunk = self._plan_trunk()
        self.done = 0
        self.total = sum(nbytes for _, _, nbytes in self.trunk.values()) + sum(
            layout.num_experts * record_pieces(format)[1]
            for layout, format in zip(self.layouts, self.expert_formats, strict=True)
        )

    def _expert_format(self, layout: ExpertLayout) -> ExpertFormat:
        source = layout.format
        gate, up, down = source.matrices
        if not self.checkpoint.quantization and self.policy.bits < 16:
            gate, up, down = (quantized_format(m, self.policy.bits, self.policy) for m in source.matrices)
        for m in (gate, up, down):
            if not (self.checkpoint.quantization or self.policy.bits == 16 or m.quantized):
                raise ConvertError(
                    f"experts of {m.rows}×{m.cols} cannot be quantized: {m.cols} is not a multiple of 32; use bits=16"
                )
        # gate and up are multiplied by the same quantized activations; having the same columns, they have the same groups.
        return ExpertFormat(gate, up, down, source.activation, "f32" if source.bias_dtype else "")

    def _plan_trunk(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """name → dtype, shape, bytes of every tensor of the trunk file."""
        tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, spec in self.specs.items():
            if spec.kind != "matrix":
                info = self.checkpoint.tensor(name)
                tensors[name] = (info.dtype, info.shape, info.nbytes)
                continue
            m, k = self._trunk_format(name), self._trunk_format(name).kernel
            for part, size in zip(m.parts, m.part_bytes, strict=True):
                if part.name != "weight":
                    tensor = _DTYPE_NAMES[k.dtype], (m.rows, m.cols // k.group_size), size
                elif m.quantized:
                    tensor = "U32", (m.rows, m.cols * k.bits // 32), size
                else:
                    tensor = _DTYPE_NAMES[k.dtype], (m.rows, m.cols), size
                tensors[f"{name}.{part.name}"] = tensor
        return tensors

    def _source_format(self, module: str) -> MatrixFormat:
        return self.checkpoint.matrix_format(module, *self.specs[module].shape)

    def _trunk_format(self, module: str) -> MatrixFormat:
        m = self._source_format(module)
        if self.checkpoint.quantization:  # its bits are kept, also of dense matrices
            return m
        return quantized_format(m, self.policy.trunk_bits_of(self.specs[module]), self.policy)

    def run(self) -> None:
        with self._errors_with_advice(), self._own_folder():
            self._signatures = self._stats()
            journal = self._open_journal()
            self._check_space(journal)
            self._save(self.work / _JOURNAL, journal)
            if "trunk" not in journal:
                checksums = self._write_trunk()
                self._check_source()
                journal["trunk"] = checksums
                journal["files"][TRUNK] = (self.work / TRUNK).stat().st_size
                self._save(self.work / _JOURNAL, journal)
            else:
                self._advance(sum(nbytes for _, _, nbytes in self.trunk.values()))
            for layout, format in zip(self.layouts, self.expert_formats, strict=True):
                key = str(layout.layer)
                if key in journal["layers"]:
                    self._advance(layout.num_experts * record_pieces(format)[1])
                    continue
                entry = self._write_layer(layout, format)
                self._check_source()
                journal["layers"][key] = entry
                journal["files"][entry["file"]] = (self.work / entry["file"]).stat().st_size
                self._save(self.work / _JOURNAL, journal)
            if self._fingerprint() != journal["settings"]["source"]:
                raise self._changed()
            self._finish(journal)

    def _stats(self) -> list[tuple[Path, int, int, int]]:
        files = sorted({info.file for info in self.checkpoint.tensors.values()})
        return [(file, s.st_ino, s.st_size, s.st_mtime_ns) for file in files for s in (file.stat(),)]

    def _check_source(self) -> None:
        """Called after a file is written, before the journal lists it. Raises ConvertError."""
        if self._stats() != self._signatures:
            raise self._changed()

    def _changed(self) -> ConvertError:
        return ConvertError(
            f"{self.checkpoint.path}: the source changed during the conversion; remove {self.work} and run the command again"
        )

    @contextmanager
    def _errors_with_advice(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = error.filename or self.work
            raise ConvertError(
                f"{where}: {error.strerror}; fix this and run the same command again; it resumes where it stopped"
            ) from None

    @contextmanager
    def _own_folder(self) -> Iterator[None]:
        """The working folder: created if missing, locked for this process, removed afterwards if empty."""
        self.work.mkdir(exist_ok=True)
        strangers = [path.name for path in self.work.iterdir() if path.name.removesuffix(".tmp") not in self._names()]
        if strangers:
            raise ConvertError(
                f"{self.work}: contains {strangers[0]!r}, which no conversion writes; move it away or choose another destination"
            )
        folder = os.open(self.work, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise ConvertError(f"{self.work}: another process is converting to this destination") from None
        try:
            yield
        finally:
            if self.work.exists() and not any(self.work.iterdir()):
                self.work.rmdir()
            os.close(folder)

    def _names(self) -> set[str]:
        """Names of the files that a conversion writes."""
        layers = (experts_file(layout.layer) for layout in self.layouts)
        return {_JOURNAL, TRUNK, MANIFEST, "config.json", *_COPIED, *layers}

    def _fingerprint(self) -> str:
        """A hash of the source: its config and headers, and the size, time and a few blocks of each file."""
        digest = xxhash.xxh3_64(json.dumps(self.checkpoint.config, sort_keys=True).encode())
        folder = self.checkpoint.path
        for name, info in sorted(self.checkpoint.tensors.items()):
            file_name = info.file.relative_to(folder).as_posix()
            digest.update(f"{name} {info.dtype} {info.shape} {info.offset} {file_name}".encode())
        for file in sorted({info.file for info in self.checkpoint.tensors.values()}):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size} {file.stat().st_mtime_ns}".encode())
            with file.open("rb") as opened:
                for i in range(_SAMPLES):
                    opened.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                    digest.update(opened.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def _open_journal(self) -> dict[str, Any]:
        """What an earlier run finished, if it had the same source and settings; its unfinished files are deleted."""
        settings = {"version": PACK_VERSION, "source": self._fingerprint(), "policy": vars(self.policy)}
        file = self.work / _JOURNAL
        journal: dict[str, Any] = {"settings": settings, "layers": {}, "files": {}}
        if file.exists():
            try:
                found = json.loads(read_text(file))
                sizes = found["files"]
                done = {"layers": {k: v for k, v in found["layers"].items() if self._is_whole(v["file"], sizes)}}
                if "trunk" in found and self._is_whole(TRUNK, sizes):
                    done["trunk"] = found["trunk"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ConvertError(f"{file}: damaged; remove {self.work} to start over") from None
            if found.get("settings") != settings:
                raise ConvertError(
                    f"{self.work}: was started from another source or with other settings; remove it to start over"
                )
            journal |= done
            journal["files"] = sizes
        for leftover in self.work.glob("*.tmp"):
            leftover.unlink()
        return journal

    def _is_whole(self, name: str, sizes: dict[str, int]) -> bool:
        """Whether a file that the journal lists exists with the size listed."""
        path = self.work / name
        return path.is_file() and path.stat().st_size == sizes[name]

    def _check_space(self, journal: dict[str, Any]) -> None:
        needed = 0 if "trunk" in journal else sum(nbytes for _, _, nbytes in self.trunk.values())
        for layout, format in zip(self.layouts, self.expert_formats, strict=True):
            if str(layout.layer) not in journal["layers"]:
                needed += layout.num_experts * record_pieces(format)[1]
        needed += 8 << 20  # headers, manifest, tokenizer
        free = shutil.disk_usage(self.work).free
        if free < needed:
            raise ConvertError(
                f"{self.work}: {format_bytes(needed)} needed, but only {format_bytes(free)} free; free some space or choose another disk"
            )

    def _advance(self, count: int) -> None:
        self.done += count
        self.progress(self.done, self.total)

    @contextmanager
    def _new_file(self, name: str) -> Iterator[BinaryIO]:
        """A file that gets its name only when it is complete and synced."""
        temporary = self.work / f"{name}.tmp"
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        temporary.rename(self.work / name)
        _sync_folder(self.work)  # the name must be on the disk before the journal lists it

    def _save(self, path: Path, value: dict[str, Any]) -> None:
        with self._new_file(path.name) as file:
            file.write(json.dumps(value, indent=1).encode())

    def _write_trunk(self) -> dict[str, str]:
        """Writes the trunk file; returns the checksum of each tensor."""
        checksums: dict[str, str] = {}
        with self._new_file(TRUNK) as file:
            file.write(header_bytes(self.trunk, {"format": "pt"}, aligned=True))
            for name, spec in self.specs.items():
                for tensor, pieces in self._trunk_tensors(name, spec.kind):
                    digest = xxhash.xxh3_64()
                    for piece in pieces:
                        file.write(piece)
                        digest.update(piece)
                        self._advance(len(piece))
                    checksums[tensor] = digest.hexdigest()
        return checksums

    def _trunk_tensors(self, name: str, kind: str) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """(tensor name, its bytes in pieces) in the order of the header."""
        if kind != "matrix":
            yield name, self._copy(self.checkpoint.tensor(name))
            return
        source, target = self._source_format(name), self._trunk_format(name)
        if source == target:
            for part in source.parts:
                yield f"{name}.{part.name}", self._copy(self.checkpoint.tensor(f"{name}.{part.name}"))
            return
        assert isinstance(source, Dense) and isinstance(target, Affine)
        # Scales and biases follow the weights in the file but are computed in the same pass over the source; they are small.
        info = self.checkpoint.tensor(f"{name}.weight")
        kept: list[list[Any]] = [[] for _ in target.parts[1:]]

        def packed() -> Iterator[memoryview]:
            for begin, end, first, last in row_blocks(source):
                values = to_f32(read_tensor(info, first, last), source.dtype).reshape(end - begin, source.cols)
                q, *others = self._quantize(check_finite(values, f"{info.file}: tensor {info.name}"), target)
                for known, more in zip(kept, others, strict=True):
                    known.append(more)
                yield memoryview(q).cast("B")

        yield f"{name}.weight", packed()
        for part, blocks in zip(target.parts[1:], kept, strict=True):
            yield f"{name}.{part.name}", iter([memoryview(np.concatenate(blocks)).cast("B")])

    def _copy(self, info: TensorInfo) -> Iterator[memoryview]:
        step = 16 << 20
        for begin in range(0, info.nbytes, step):
            data = read_tensor(info, begin, min(begin + step, info.nbytes))
            if info.dtype in FLOATS:
                check_finite(to_f32(data, FLOATS[info.dtype]), f"{info.file}: tensor {info.name}")
            yield memoryview(data)

    def _write_layer(self, layout: ExpertLayout, format: ExpertFormat) -> dict[str, Any]:
        """Writes one layer's experts; returns its entry of the manifest."""
        files = [path.open("rb") for path in layout.files]
        try:
            with self._new_file(experts_file(layout.layer)) as out:
                records = self._records(layout, format, files)
                return write_records(out, layout.layer, layout.num_experts, format, records)
        finally:
            for file in files:
                file.close()

    def _records(self, layout: ExpertLayout, format: ExpertFormat, files: Sequence[BinaryIO]) -> Iterator[Any]:
        for expert in range(layout.num_experts):
            stored = self._stored_parts(layout, files, expert)
            if layout.format.matrices != format.matrices:
                where = f"{files[0].name}: layer {layout.layer}, expert {expert}"
                stored = self._quantized_parts(layout.format, format, stored, where)
            kept = ExpertFormat(*format.matrices, format.activation, layout.format.bias_dtype)
            record = make_record(kept, stored, self.ops.tiled)
            yield record
            self._advance(record.shape[0])

    def _stored_parts(self, layout: ExpertLayout, files: Sequence[BinaryIO], expert: int) -> list[Any]:
        """The parts of one expert as stored in the source, flat uint8."""
        memory, starts = np.empty(layout.bytes_per_expert, np.uint8), np.cumsum((0, *layout.lengths))
        for r, length in enumerate(layout.lengths):
            file = files[layout.file_index[expert, r]]
            data = memory[starts[r] : starts[r + 1]]
            if os.preadv(file.fileno(), [data.data], int(layout.offsets[expert, r])) != length:
                raise ConvertError(f"{file.name}: layer {layout.layer}, expert {expert}: the file ends too early")
            os.posix_fadvise(file.fileno(), int(layout.offsets[expert, r]), length, os.POSIX_FADV_DONTNEED)
        return layout.stored_parts(memory, [int(starts[r]) + at for r, at in layout.pieces])

    def _quantized_parts(self, source: ExpertFormat, target: ExpertFormat, stored: list[Any], where: str) -> list[Any]:
        found = []
        for m, wanted in zip(source.matrices, target.matrices, strict=True):
            parts, stored = stored[: len(m.parts)], stored[len(m.parts) :]
            if m != wanted:
                assert isinstance(wanted, Affine)
                quantized = self._quantize(check_finite(m.dequantize(parts), where), wanted)
                parts = [p.view(np.uint8).ravel() for p in quantized]
            found += parts
            if source.bias_dtype:
                found.append(stored.pop(0))
        return found

    def _quantize(self, values: Any, target: Affine) -> Sequence[Any]:
        return self.ops.quantize(values, target.bits, target.group_size, target.symmetric)[: len(target.parts)]

    def _finish(self, journal: dict[str, Any]) -> None:
        """Writes config, tokenizer and manifest, then renames the folder."""
        for path in _copied_files(self.checkpoint.path):
            with self._new_file(path.name) as file, open_regular(path) as source:
                shutil.copyfileobj(source, file)
        config = {k: v for k, v in self.checkpoint.config.items() if k not in ("quantization", "quantization_config")}
        table = {
            name: {
                "bits": m.kernel.bits,
                "group_size": m.kernel.group_size,
                **({} if isinstance(m, Affine) else {"mode": str(m).lower()}),
            }
            for name, spec in self.specs.items()
            if spec.kind == "matrix" and (m := self._trunk_format(name)).quantized
        }
        if table:
            config["quantization"] = {
                "bits": self.policy.bits if self.policy.bits < 16 else 8,
                "group_size": self.policy.group_size,
                **table,
            }
        self._save(self.work / "config.json", config)
        self._save(
            self.work / MANIFEST,
            {
                "format": PACK_FORMAT,
                "version": PACK_VERSION,
                "convention": self.checkpoint.convention,
                "source": {
                    "name": self.checkpoint.path.resolve().name,
                    "kind": self.checkpoint.kind,
                    "fingerprint": journal["settings"]["source"],
                },
                "trunk_checksums": journal["trunk"],
                "layers": [journal["layers"][str(layout.layer)] for layout in self.layouts],
            },
        )
        self.work.rename(self.destination)
        _sync_folder(self.destination.parent)
        # Last, so that a failed rename can be retried without repeating the work; readers ignore the journal.
        (self.destination / _JOURNAL).unlink()


def _copied_files(source: Path) -> list[Path]:
    """The files that are copied to a pack unchanged. Raises ConvertError for a link out of the checkpoint's folder: packs are shared, and
    must not contain private files. Links in the Hugging Face cache, from snapshots/ to blobs/, are allowed."""
    folder = source.resolve()
    homes = [folder, *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])]
    found = [source / name for name in _COPIED if (source / name).is_file()]
    for path in found:
        target = path.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise ConvertError(
                f"{path}: is a link to {target}, outside the checkpoint's folder; replace it with a copy"
            )
        if path.stat().st_size > MAX_TEXT:
            raise ConvertError(f"{path}: larger than {format_bytes(MAX_TEXT)}")
    return found


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
