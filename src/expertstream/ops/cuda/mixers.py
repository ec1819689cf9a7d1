"""Token mixers on a GPU: attention over keys and values, and the gated delta rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from ...batch import Batch
from ...cuda.device import DeviceArray
from ...cuda.recording import SEGMENT
from ...kv_cache import State
from .. import AttentionWeights, DeltaWeights
from .rows import Rows, cdiv

__all__ = ["Mixers"]

_KEPT = {"float32": 0, "uint16": 1, "uint8": 3}  # how keys and values are stored
_ROWS, _MANY_ROWS, _KEYS = 16, 64, 64  # of attention.cu
_SCORE_BYTES = 256 << 20  # of attention, at a time


class _Part(NamedTuple):
    """Rows of a batch, of one sequence, that are added to its state at once."""

    state: Any
    begin: int  # the first row
    length: int
    position: int  # of the first row


def _rounds(states: Sequence[State], batch: Batch) -> Iterator[list[_Part]]:
    """The parts of all sequences that can be processed together; a snapshot of a part's end is taken when the next round is asked for."""
    running = [(state, segment.parts(state)) for state, segment in zip(states, batch.segments, strict=True)]
    while running:
        parts, left = [], []
        for state, parts_of in running:
            found = next(parts_of, None)
            if found is not None:
                rows, position = found
                parts.append(_Part(state, rows.start, rows.stop - rows.start, position))
                left.append((state, parts_of))
        if parts:
            yield parts
        running = left


class Mixers(Rows):
    """Implements the token mixers of `ops.Ops`."""

    def attend(
        self,
        w: AttentionWeights,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        angles: tuple[DeviceArray, DeviceArray],
        states: Sequence[State],
        batch: Batch,
    ) -> DeviceArray:
        out = self.device.empty((q.shape[0], w.heads * w.head_dim))
        if self.recording is not None:
            table, segments = self.recording.attention_table(states), self.recording.segments
            if w.window:
                segments = min(segments, cdiv(w.window, SEGMENT) + 1)
            dtype = cast(Any, states[0]).keys.dtype.name
            blocks = self._constant("blocks", q.shape[0], 1)
            n = q.shape[0]
            self._attend_table(w, q, k, v, angles, dtype, table, n, blocks, _ROWS, segments, 0, n, out)
            return out
        for parts in _rounds(states, batch):
            self._attend(w, q, k, v, angles, parts, out)
        return out

    def _attend(
        self,
        w: AttentionWeights,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        angles: tuple[DeviceArray, DeviceArray],
        parts: list[_Part],
        out: DeviceArray,
    ) -> None:
        device, per_kv = self.device, w.heads // w.kv_heads
        per_block = _ROWS if parts[0].length * per_kv <= 2 * _ROWS else _MANY_ROWS
        together = max(1, per_block // per_kv)
        table, blocks, segments = [], [], 1
        for i, (state, begin, count, position) in enumerate(parts):
            table.append(
                (state.keys.address, state.values.address, state.keys.shape[1], state.first, position, begin, count)
            )
            blocks += [(i, t) for t in range(0, count, together)]
            oldest = max(0, position + 1 - w.window) if w.window else 0
            segments = max(segments, cdiv(position + count, SEGMENT) - oldest // SEGMENT)
        dtype, rows = parts[0].state.keys.dtype.name, sum(part.length for part in parts)
        sequences, places = device.send(np.array(table, np.int64)), device.send(np.array(blocks, np.int32))
        self._attend_table(
            w, q, k, v, angles, dtype, sequences, len(parts), places, per_block, segments, parts[0].begin, rows, out
        )

    def _attend_table(
        self,
        w: AttentionWeights,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        angles: tuple[DeviceArray, DeviceArray],
        dtype: str,
        sequences: DeviceArray,
        count: int,
        blocks: DeviceArray,
        per_block: int,
        segments: int,
        first_row: int,
        rows: int,
        out: DeviceArray,
    ) -> None:
        """Rows [first_row, first_row + rows) of `count` sequences, whose states a table on the card gives. blocks: (sequence, first token)
        of each block of `per_block` rows. segments: at most, of a sequence."""
        device, d, together = self.device, w.head_dim, max(1, per_block // (w.heads // w.kv_heads))
        kernels = device.kernels("attention.cu", HEAD_DIM=d, KV_DTYPE=_KEPT[dtype])
        cos, sin = angles
        turned = device.empty((q.shape[0], w.heads * d))
        scale = float(np.float32(1) / np.sqrt(np.float32(d)))
        kernels["prepare_heads"](
            (rows, w.heads + w.kv_heads, 1), 32, 0, q.address, k.address, v.address, cos.address, sin.address, cos.shape[1],
            self._vector(w.q_norm), self._vector(w.k_norm), w.eps, scale, w.heads, w.kv_heads, int(w.gated), sequences.address, count,
            first_row, turned.address,
        )  # fmt: skip
        # As many rows at a time as there is room for their scores.
        width = segments * SEGMENT
        unit = together if count == 1 else 1  # rows of a block: of several sequences, each has one
        slab = max(unit, min(rows, _SCORE_BYTES // (4 * w.heads * width)) // unit * unit)
        few, per_kv = per_block == _ROWS, w.heads // w.kv_heads
        heads = cdiv(per_kv, per_block) * w.kv_heads
        for first in range(0, rows, slab):
            some = min(slab, rows - first)
            which = blocks if some == rows else blocks[first // unit : cdiv(first + some, unit)]
            begin = first_row + first
            scores, keep = device.empty((some * w.heads, width)), device.empty((some * w.heads, width // _KEYS))
            ends, sums = device.empty((some * w.heads, segments, 2)), device.empty((some * w.heads, segments, d))
            kernels["scores_few" if few else "scores_many"](
                (which.shape[0], heads, width // (16 if few else _KEYS)), 256, 0, turned.address, sequences.address, which.address,
                w.heads, w.kv_heads,
                w.window, begin, width, scores.address,
            )  # fmt: skip
            kernels["soften"](
                (cdiv(some * w.heads, 16), segments, 1), 256, 0, sequences.address, count, w.heads, w.kv_heads, w.window, begin, some,
                together, width, segments, scores.address, keep.address, ends.address,
            )  # fmt: skip
            kernels["weigh_few" if few else "weigh_many"](
                (which.shape[0], heads, cdiv(d, 16 if few else 64) * segments), 64 if few else 256, 0, sequences.address, which.address,
                w.heads, w.kv_heads, w.window,
                begin, width, segments, scores.address, keep.address, sums.address,
            )  # fmt: skip
            kernels["merge_heads"](
                (some, w.heads, 1), min(256, cdiv(d, 32) * 32), 0, ends.address, sums.address, segments, self._vector(w.sinks), q.address,
                int(w.gated), w.heads, begin, out.address,
            )  # fmt: skip

    def gated_delta(
        self,
        w: DeltaWeights,
        qkv: DeviceArray,
        z: DeviceArray,
        a: DeviceArray,
        b: DeviceArray,
        states: Sequence[State],
        batch: Batch,
    ) -> DeviceArray:
        out = self.device.empty(z.shape)
        if self.recording is not None:
            table = self.recording.delta_table(states)
            self._delta(w, (qkv, z, a, b), table, qkv.shape[0], 1, 0, qkv.shape[0], None, out)
            return out
        for parts in _rounds(states, batch):
            rows = [(p.state.conv_state.address, p.state.recurrent_state.address, p.begin, p.length) for p in parts]
            longest, count = max(part.length for part in parts), sum(part.length for part in parts)
            table = self.device.send(np.array(rows, np.int64))
            chunked = parts[0].state.recurrent_state.address if batch.prompt else None
            self._delta(w, (qkv, z, a, b), table, len(parts), longest, parts[0].begin, count, chunked, out)
        return out

    def _delta(
        self,
        w: DeltaWeights,
        inputs: tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray],
        sequences: DeviceArray,
        count: int,
        longest: int,
        first_row: int,
        rows: int,
        chunked: int | None,
        out: DeviceArray,
    ) -> None:
        """Rows [first_row, first_row + rows) of `count` sequences with at most `longest` each, whose states a table on the card gives.
        chunked: the address of the only sequence's state, for the chunked form."""
        qkv, z, a, b = inputs
        device, channels, dv = self.device, qkv.shape[1], z.shape[1] // w.value_heads
        kernels, kernel, wide = (
            device.kernels("delta.cu", KEY_DIM=w.key_dim, VALUE_DIM=dv),
            w.conv.shape[0],
            cdiv(channels, 128),
        )
        mixed = device.empty(qkv.shape)
        scale, norm = float(np.float32(1) / np.sqrt(np.float32(w.key_dim))), self._vector(w.norm)
        if chunked is None and longest == 1:
            kernels["convolve_step"](
                (wide, count, 1), 128, 0, qkv.address, self._vector(w.conv), sequences.address, channels, kernel, mixed.address
            )  # fmt: skip
        else:
            kernels["convolve"](
                (wide, cdiv(longest, 32), count), 128, 0, qkv.address, self._vector(w.conv), sequences.address, channels, kernel,
                mixed.address,
            )  # fmt: skip
            kernels["keep_inputs"]((wide, count, 1), 128, 0, qkv.address, sequences.address, channels, kernel)
        if chunked is None:
            kernels["delta_step"](
                (w.value_heads, count, 1), cdiv(dv, 32) * 32, 0, mixed.address, z.address, a.address, b.address, self._vector(w.a_log),
                self._vector(w.dt_bias), sequences.address, channels, w.key_heads, w.value_heads, scale, norm, w.eps, out.address,
            )  # fmt: skip
            return
        values = qkv.shape[0] * w.value_heads
        g, beta = device.empty((values,)), device.empty((values,))
        kernels["prepare_delta"](
            (rows, 2 * w.key_heads + 1, 1), 32, 0, mixed.address, channels, w.key_heads, scale, a.address, b.address, self._vector(w.a_log),
            self._vector(w.dt_bias), w.value_heads, first_row, g.address, beta.address,
        )  # fmt: skip
        chunks = cdiv(rows, 64)
        pairs, ends = (
            device.empty((chunks * w.value_heads, 2 * 64 * 64)),
            device.empty((chunks * w.value_heads, 2 * 64)),
        )
        kernels["delta_pairs"](
            (chunks, w.value_heads, 1), 256, 0, mixed.address, g.address, beta.address, first_row, rows, channels, w.key_heads,
            w.value_heads, pairs.address, ends.address,
        )  # fmt: skip
        shared = 4 * (w.key_dim * 32 + 64 * 64 + 64 * 32 + 2 * 64 * 36 + 2 * 64)
        kernels["delta_chunks"](
            (w.value_heads, cdiv(dv, 32), 1), 256, shared, mixed.address, beta.address, chunked, first_row, rows, channels, w.key_heads,
            w.value_heads, pairs.address, ends.address, out.address,
        )  # fmt: skip
        kernels["finish_delta"](
            (rows * w.value_heads, 1, 1), 128, 0, out[first_row:].address, z[first_row:].address, norm, w.eps
        )
