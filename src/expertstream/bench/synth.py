"""Synthetic packs: a model's sizes with random weights, written at the disk's speed, for benchmarks before downloading the real one.

Random weights need care to behave like a model. Codes are zero-mean and matrices keep activations at unit scale, so that no layer
explodes; what is added to the residual stream is small compared with the embeddings, so that routing follows the token instead of
sticking to a few experts (with hit rates that no real model has). Routing is nearly uniform, or Zipf by means of a constant channel:
channel 0 of every embedding is the same, nothing writes to it, and the router's column 0 holds the logarithm of each expert's share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..checkpoint.format import MANIFEST, PACK_FORMAT, PACK_VERSION, WeightSpec, record_pieces
from ..checkpoint.pack import TRUNK, experts_file, write_records
from ..checkpoint.quantize import BitPolicy, quantized_format
from ..checkpoint.safetensors import header_bytes
from ..engine import embedded_model
from ..errors import UsageError
from ..formats import Affine, Dense, ExpertFormat, MatrixFormat
from ..formats.numbers import to_bf16, to_f32
from ..layers import DecoderConfig
from ..models import read_config, weight_map
from ..ops.cpu import CpuOps
from ..units import format_bytes
from .geometry import TRACE
from .traces import load_trace, save_trace

__all__ = ["Matrix", "Synthesizer", "trunk_formats", "write_synthetic"]

_SPREAD = {2: 0.8165, 4: 4.3205, 8: 73.32}  # standard deviation of the codes 1…2^bits − 1 around the middle one
_BACK = ("o_proj", "out_proj", "down_proj")  # matrices whose output is added to the residual stream
_POOL = 32 << 20

Progress = Callable[[int, int], None]

_MARK = ".synth"  # marks a folder that is being written


@dataclass(frozen=True)
class Matrix:
    """One random matrix as a checkpoint stores it: its parts, row by row."""

    format: MatrixFormat
    parts: tuple[NDArray[np.uint8], ...]

    @property
    def data(self) -> NDArray[np.uint8]:
        return self.parts[0]


class Synthesizer:
    """Draws matrices. Bytes are copied from random offsets of a random pool: random enough for benchmarks, and far faster."""

    def __init__(self, c: DecoderConfig, policy: BitPolicy, routing: str, seed: int, scale_dtype: str) -> None:
        self.config, self.policy, self.routing, self.scale_dtype = c, policy, routing, scale_dtype
        self.rng = np.random.default_rng(seed)
        self.pools: dict[int, NDArray[np.uint8]] = {}

    def _bytes(self, bits: int, count: int) -> NDArray[np.uint8]:
        """Packed codes, each between 1 and 2^bits − 1: zero-mean around 2^(bits−1)."""
        pool = self.pools.get(bits)
        if pool is None:
            pool = self.rng.integers(1, 1 << bits, _POOL, np.uint8)
            for part in range(1, 8 // bits):
                pool |= self.rng.integers(1, 1 << bits, _POOL, np.uint8) << (part * bits)
            self.pools[bits] = pool
        out = np.empty(count, np.uint8)
        at = 0
        while at < count:
            begin = int(self.rng.integers(0, _POOL // 2))
            step = min(count - at, _POOL - begin)
            out[at : at + step] = pool[begin : begin + step]
            at += step
        return out

    def quantized(self, m: Affine, deviation: float) -> Matrix:
        """Values with this standard deviation; scales vary by a factor of up to 1.25 either way."""
        groups = m.rows * m.cols // m.group_size
        step = deviation / _SPREAD[m.bits] * self.rng.uniform(0.8, 1.25, min(groups, 65536))
        scales = np.resize(_narrow(step, m.dtype), groups)
        parts = self._bytes(m.bits, m.part_bytes[0]), scales.view(np.uint8)
        if m.symmetric:
            return Matrix(m, parts)
        biases = _narrow(-(1 << (m.bits - 1)) * to_f32(scales.view(np.uint8), m.dtype), m.dtype).view(np.uint8)
        return Matrix(m, (*parts, biases))

    def matrix(self, module: str, m: MatrixFormat, spec: WeightSpec) -> Matrix:
        """A trunk matrix, drawn according to its role."""
        embedding, back = module == "model.embed_tokens", module.endswith(_BACK)
        deviation = 1.0 if embedding else m.cols**-0.5 * (0.3 if back else 1.0)
        if isinstance(m, Affine):
            w = self.quantized(m, deviation)
            return self._with_constant_channel(w) if embedding else self._without_first_row(w) if back else w
        values = self.rng.standard_normal((m.rows, m.cols), np.float32) * np.float32(deviation)
        if embedding:
            values[:, 0] = 2.0
        elif back:
            values[0] = 0.0
        elif spec.sensitive and m.rows == self.config.num_experts:
            values *= 2  # sharp enough that rounding seldom changes which experts are selected
            values[:, 0] = self._log_shares(m.rows)
        return Matrix(m, (to_bf16(values).view(np.uint8).ravel(),))

    def _log_shares(self, experts: int) -> Any:
        if self.routing != "zipf":
            return 0.0
        order = self.rng.permutation(experts)
        return -0.6 * np.log(1 + order).astype(np.float32)

    def _with_constant_channel(self, w: Matrix) -> Matrix:
        """Sets column 0 of every row to the largest code, so that its values differ only by their scales."""
        w.data.reshape(w.format.rows, -1)[:, 0] |= (1 << w.format.kernel.bits) - 1
        return w

    def _without_first_row(self, w: Matrix) -> Matrix:
        """Sets row 0, which writes to channel 0 of the residual stream, to zero."""
        middle = 1 << (w.format.kernel.bits - 1)
        byte = sum(middle << shift for shift in range(0, 8, w.format.kernel.bits))
        w.data[: w.data.size // w.format.rows] = byte
        return w

    def vector(self, name: str, spec: WeightSpec) -> NDArray[np.float32]:
        """A trunk tensor that is not a matrix, as a Hugging Face checkpoint stores it (norms without their +1)."""
        if name.endswith("A_log"):
            return np.log(self.rng.uniform(1, 16, spec.shape)).astype(np.float32)
        if name.endswith("dt_bias"):
            return np.full(spec.shape, -4, np.float32)
        if spec.kind == "vector" and name.endswith("norm.weight"):
            return np.ones(spec.shape, np.float32)
        if spec.kind == "conv":
            return self.rng.standard_normal(spec.shape, np.float32) * np.float32(0.5)
        return np.zeros(spec.shape, np.float32)

    def experts(self, format: ExpertFormat) -> Iterator[Matrix]:
        """gate, up and down of one expert after another, endlessly."""
        while True:
            for i, m in enumerate(format.matrices):
                assert isinstance(m, Affine)
                w = self.quantized(m, m.cols**-0.5 * (0.3 if i == 2 else 1.0))
                yield self._without_first_row(w) if i == 2 else w


def _narrow(values: Any, dtype: str) -> NDArray[Any]:
    return to_bf16(np.asarray(values, np.float32)) if dtype == "bf16" else np.asarray(values, np.float16)


def _with_scales(m: MatrixFormat, dtype: str) -> MatrixFormat:
    return replace(m, dtype=dtype) if isinstance(m, Affine) else m


def trunk_formats(c: DecoderConfig, policy: BitPolicy, scale_dtype: str) -> dict[str, MatrixFormat]:
    """module → format of every trunk matrix."""
    return {
        name: _with_scales(
            quantized_format(Dense(*_two(spec.shape), "bf16"), policy.trunk_bits_of(spec), policy), scale_dtype
        )
        for name, spec in weight_map(c).items()
        if spec.kind == "matrix"
    }


def expert_format(c: DecoderConfig, policy: BitPolicy, scale_dtype: str) -> ExpertFormat:
    spec = c.experts[0]
    gate, up, down = (
        _with_scales(quantized_format(Dense(*shape, "bf16"), policy.bits, policy), scale_dtype)
        for shape in spec.shapes.values()
    )
    return ExpertFormat(gate, up, down, spec.activation, "f32" if spec.biased else "")


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, cols = shape
    return rows, cols


def write_synthetic(
    folder: Path,
    config: dict[str, Any],
    policy: BitPolicy | None = None,
    routing: str = "uniform",
    trace: Path | None = None,
    gguf: Path | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = lambda done, total: None,
) -> int:
    """Writes a pack; returns its bytes. `gguf`: also writes the same values as a GGUF file, which needs symmetric groups of 32. `trace`: a
    recorded routing trace for `bench decode` to follow. Raises UsageError."""
    policy = policy or BitPolicy()
    if gguf is not None and not (
        policy.symmetric and policy.group_size == 32 and (policy.bits, policy.trunk_bits) in ((4, 4), (4, 8))
    ):
        raise UsageError("a GGUF twin needs 4-bit experts in symmetric groups of 32 (Q4_0) and a trunk of 4 or 8 bits")
    if folder.exists() or folder.is_symlink():  # a dangling link, too
        raise UsageError(f"{folder}: already exists; choose another name or remove it")
    for path in (folder, gguf):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path.absolute().parent}: no such folder")
    c = read_config(config, str(folder))
    dtype = "f16" if policy.symmetric else "bf16"
    synthesizer = Synthesizer(c, policy, routing, seed, dtype)
    ops, formats, experts = CpuOps(threads), trunk_formats(c, policy, dtype), expert_format(c, policy, dtype)
    if any(not m.quantized for m in experts.matrices):
        raise UsageError(
            f"experts of {c.moe_intermediate_size}×{c.hidden_size} cannot be quantized in groups of 32 or more"
        )
    tensors = _plan_trunk(c, formats)
    total = sum(nbytes for _, _, nbytes in tensors.values())
    total += c.num_hidden_layers * c.num_experts * record_pieces(experts)[1]
    free = shutil.disk_usage(folder.absolute().parent).free
    if free < total * (2 if gguf is not None else 1):
        raise UsageError(f"{folder}: needs {format_bytes(total)} of disk space; {format_bytes(free)} are free")
    work = folder.with_name(folder.name + ".partial")
    if work.exists():
        if not (work / _MARK).is_file():
            raise UsageError(f"{work}: exists and was not made by synth; move it away")
        shutil.rmtree(work)
    work.mkdir()
    (work / _MARK).touch()
    twin = None
    if gguf is not None:
        from .gguf_twin import GGUFTwin, config_for_twin

        twin = GGUFTwin(gguf, config_for_twin(c), formats, experts, embedded_model())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with (work / TRUNK).open("wb") as file:
        checksums = _write_trunk(file, c, formats, tensors, synthesizer, twin, advance)
    layers = []
    for layer in range(c.num_hidden_layers):
        with (work / experts_file(layer)).open("wb") as file:
            records = _records(synthesizer, experts, c.num_experts, ops, twin, layer, advance)
            layers.append(write_records(file, layer, c.num_experts, experts, records))
    table = {name: {"bits": m.bits, "group_size": m.group_size} for name, m in formats.items() if isinstance(m, Affine)}
    quantization = {"bits": policy.bits, "group_size": policy.group_size, **table}
    (work / "config.json").write_text(json.dumps({**config, "quantization": quantization}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded_model() / name, work / name)
    if trace is not None:
        save_trace(work / TRACE, load_trace(trace))
    manifest = {
        "format": PACK_FORMAT, "version": PACK_VERSION, "convention": "hf", "trunk_checksums": checksums, "layers": layers,
        "source": {"name": "synthetic", "seed": seed, "routing": routing},
    }  # fmt: skip
    (work / MANIFEST).write_text(json.dumps(manifest))
    if twin is not None:
        twin.close()
    (work / _MARK).unlink()
    work.rename(folder)
    return sum(file.stat().st_size for file in folder.iterdir())


def _plan_trunk(c: DecoderConfig, formats: dict[str, MatrixFormat]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    names = {"bf16": "BF16", "f16": "F16"}
    for name, spec in weight_map(c).items():
        if spec.kind != "matrix":
            tensors[name] = ("F32", spec.shape, 4 * int(np.prod(spec.shape)))
            continue
        m = formats[name]
        if not m.quantized:
            tensors[f"{name}.weight"] = ("BF16", (m.rows, m.cols), m.nbytes)
            continue
        k = m.kernel
        tensors[f"{name}.weight"] = ("U32", (m.rows, m.cols * k.bits // 32), m.part_bytes[0])
        for part in m.parts[1:]:
            shape = (m.rows, m.cols // k.group_size)
            tensors[f"{name}.{part.name}"] = (names[k.dtype], shape, m.rows * part.row_bytes)
    return tensors


def _write_trunk(
    file: Any,
    c: DecoderConfig,
    formats: dict[str, MatrixFormat],
    tensors: dict[str, tuple[str, tuple[int, ...], int]],
    synthesizer: Synthesizer,
    twin: Any,
    advance: Callable[[int], None],
) -> dict[str, str]:
    file.write(header_bytes(tensors, {"format": "pt"}, aligned=True))
    checksums = {}
    names = iter(tensors)
    for name, spec in weight_map(c).items():
        if spec.kind == "matrix":
            w = synthesizer.matrix(name, formats[name], spec)
            parts = list(w.parts)
            if twin is not None:
                twin.matrix(name, w)
        else:
            values = synthesizer.vector(name, spec)
            parts = [values.view(np.uint8).ravel()]
            if twin is not None:
                twin.vector(name, values)
        for part in parts:
            file.write(part.data)
            checksums[next(names)] = xxhash.xxh3_64_hexdigest(part.data)
            advance(part.size)
    return checksums


def _records(
    synthesizer: Synthesizer,
    format: ExpertFormat,
    count: int,
    ops: CpuOps,
    twin: Any,
    layer: int,
    advance: Callable[[int], None],
) -> Iterator[NDArray[np.uint8]]:
    offsets, record_bytes = record_pieces(format)
    draw = synthesizer.experts(format)
    for expert in range(count):
        record, at = np.zeros(record_bytes, np.uint8), iter(offsets)  # biases stay 0
        for i, m in enumerate(format.matrices):
            w = next(draw)
            if twin is not None:
                twin.expert(layer, expert, i, w)
            # Tiles of random rows are as random; only a twin needs the same values, so only then are they rearranged.
            for part in ops.tiled(m, w.parts) if twin is not None or i == 2 else w.parts:
                begin = next(at)
                record[begin : begin + part.size] = part
            if format.bias_dtype:
                next(at)
        yield record
        advance(record_bytes)
