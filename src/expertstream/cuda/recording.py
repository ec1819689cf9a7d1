"""A decode step that is recorded once and replayed: one CUDA graph for so many sequences.

What differs between steps lies in one block of inputs, which the graph's first kernel copies: tokens, the angles of their positions, and
where each sequence's states are. Which experts run is decided on the card, by a table of addresses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _native
from ..batch import Batch
from ..formats.numbers import F32, I64
from ..kv_cache import KVCache, State, WindowState
from .device import Device, DeviceArray
from .exchange import Compute, Exchange

__all__ = ["LayerStates", "RecordedBatch", "Recording"]

_MOST_LAYERS = 512
SEGMENT = 1024  # positions; of kernels/attention.cu

Angles = Callable[[I64, Sequence[float], float], tuple[F32, F32]]


class LayerStates(list[State]):
    """The states of one layer, of the sequences at the time of recording."""

    def __init__(self, layer: int, states: Sequence[State]) -> None:
        super().__init__(states)
        self.layer = layer


class RecordedBatch(Batch):
    """A batch whose tokens are on the card and whose states are found in the inputs."""

    def __init__(self, like: Batch, tokens: DeviceArray) -> None:
        super().__init__(like.tokens, like.caches, like.prompt)
        self.segments = like.segments
        self.tokens = tokens  # type: ignore[assignment]

    def states(self, layer: int) -> list[State]:
        return LayerStates(layer, super().states(layer))

    def between_layers(self) -> None:
        return


class Recording:
    """One graph. ids: which experts each layer's router selected in the last replay, (layers, sequences, top_k)."""

    def __init__(self, device: Device, sequences: int, segments: int, angles: Angles) -> None:
        """segments: of attention, at most, that a sequence has while this recording is used."""
        self.device, self.sequences, self.segments, self._angles = device, sequences, segments, angles
        # A sequence has a token, its angles, and at most 56 bytes for each of the layers.
        size = (16 << 10) + sequences * (8 * _MOST_LAYERS * 7 + (8 << 10))
        self._host = device.pinned(size)
        self._card = device.empty((size,), np.uint8)
        self._used = 16  # after the number of words that are used
        self._tokens, self.tokens = self._reserve((sequences,), np.int64)
        self._rotations: list[tuple[Sequence[float], float, NDArray[Any], NDArray[Any]]] = []
        self._attention: list[tuple[int, NDArray[Any]]] = []  # layer, its table (sequences, 7)
        self._delta: list[tuple[int, NDArray[Any]]] = []  # layer, its table (sequences, 4)
        self._selected: DeviceArray | None = None  # (layers, sequences, top_k), of which `_layers` are used
        self._layers = 0
        self._kept: list[Any] = []
        self._pinned = [self._host]
        self._caches: list[
            weakref.ref[KVCache]
        ] = []  # of the last replay; a sequence that has ended gives its memory back
        self.ids: NDArray[np.int64] = np.empty((0, sequences, 0), np.int64)
        # What the host computes: the arena with these experts, the mailbox, and its inputs.
        self.exchange: Exchange | None = None
        self.guess: tuple[DeviceArray, DeviceArray] | None = None  # of the layer that follows, for ask()
        self._arena: tuple[_native.Arena, int] | None = None  # and the card's address of it
        self._step, self._share = self._reserve((1,), np.int64), self._reserve((0,), np.int32)

    def _reserve(self, shape: Sequence[int], dtype: Any) -> tuple[NDArray[Any], DeviceArray]:
        """Room in the inputs: the host's view and the card's."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        begin, self._used = self._used, self._used + -(-size // 16) * 16
        assert self._used <= self._host.shape[0], "the inputs of a step are larger than expected"
        view = self._host[begin : begin + size].view(dtype).reshape(shape)
        return view, DeviceArray(self.device, shape, dtype, self._card._block, self._card.address + begin)

    def record(self, batch: Batch, run: Callable[[Batch], Any]) -> None:
        """Records run(batch), which returns the logits as an array on the card. Nothing is computed."""
        with self.device.private_memory() as pool:
            self._pool = pool
            self.device.driver.begin_capture()
            try:
                # Read by a kernel, which does not wait for copies that run beside, as an upload would.
                copy, inputs = self.device.kernels("rows.cu")["copy_inputs"], self.device.registered(self._host)
                copy((32, 1, 1), 256, 0, self._card.address, inputs)
                logits: DeviceArray = run(RecordedBatch(batch, self.tokens))
                self._logits = self._bring(logits)
                if self._selected is not None:
                    self._ids = self._bring(self._selected[: self._layers])
            finally:
                self._graph = self.device.driver.end_capture()

    def _bring(self, array: DeviceArray) -> NDArray[Any]:
        """Pinned memory that receives an array's values at the end of each replay."""
        memory = self.device.pinned(max(array.nbytes, 1))
        self._pinned.append(memory)
        to: NDArray[Any] = memory.view(array.dtype).reshape(array.shape)
        self.device.driver.bring(to.ctypes.data, array.address, array.nbytes)
        self._kept.append(array)
        return to

    def close(self) -> None:
        """Destroys the graph; its memory can be used by others."""
        self.device.driver.synchronize()
        self.device.driver.drop(self._graph)
        self._kept.clear()
        self._selected = None
        self.device.unpin(self._pinned if self.exchange is None else [*self._pinned, self.exchange.memory])
        self.device.absorb(self._pool)

    # What the ops ask for while they are recorded.

    def rotary(self, frequencies: Sequence[float], scale: float) -> tuple[DeviceArray, DeviceArray]:
        """The angles of the sequences' positions."""
        shape = (self.sequences, len(frequencies))
        (cos, on_card), (sin, other) = self._reserve(shape, np.float32), self._reserve(shape, np.float32)
        self._rotations.append((frequencies, scale, cos, sin))
        return on_card, other

    def attention_table(self, states: Sequence[State]) -> DeviceArray:
        """The sequences as attention.cu's Sequence."""
        assert isinstance(states, LayerStates)
        view, table = self._reserve((self.sequences, 7), np.int64)
        self._attention.append((states.layer, view))
        return table

    def delta_table(self, states: Sequence[State]) -> DeviceArray:
        """The sequences as delta.cu's Sequence."""
        assert isinstance(states, LayerStates)
        view, table = self._reserve((self.sequences, 4), np.int64)
        self._delta.append((states.layer, view))
        return table

    def selection(self, top_k: int) -> DeviceArray:
        """Room (sequences, top_k) for what a layer's router selects; the values are in `ids` after each replay."""
        if self._selected is None:
            self._selected = self.device.empty((_MOST_LAYERS, self.sequences, top_k), np.int64)
        self._layers += 1
        return self._selected[self._layers - 1]

    def ask(
        self,
        layer: int,
        format: _native.ExpertFormat,
        table: DeviceArray,
        arena: _native.Arena,
        selected: DeviceArray,
        x: DeviceArray,
        share: Callable[[int], NDArray[np.int32]],
        last: bool,
    ) -> int:
        """Has the host compute a part of a layer's pairs whose experts lie in the arena, for x (T, H); where the experts of all pairs are,
        −1 for those of the host. share: of n experts, 0 to the number given, how many are the host's."""
        if self.exchange is None:
            top_k, hidden = selected.shape[1], x.shape[1]
            self.exchange = Exchange(self.device, self.sequences, top_k, hidden)
            memory = arena.view()
            self._arena = arena, self.device.registered(memory) if self.device.is_registered(memory) else 0
            self._share = self._reserve((self.exchange.pairs + 1,), np.int32)
            self._share[0][:] = share(self.exchange.pairs)
        assert self._arena is not None and self._arena[0] is arena
        place = self._arena[1], arena.size if self._arena[1] else 0
        guess, self.guess = self.guess, None
        return self.exchange.ask(layer, format, table, place, selected, x, self._share[1], self._step[1], last, guess)

    def collect(self, y: DeviceArray) -> None:
        """Puts what the host has computed into y (pairs, H)."""
        assert self.exchange is not None
        self.exchange.collect(y, self._step[1])

    # Replays.

    def launch(self, batch: Batch) -> None:
        """Starts a replay on the tokens and states of a batch."""
        self._tokens[:] = batch.tokens
        positions = batch.positions()
        for frequencies, scale, cos, sin in self._rotations:
            cos[:], sin[:] = self._angles(positions, frequencies, scale)
        self._place([segment.cache for segment in batch.segments], positions)
        self._host[:8].view(np.int64)[0] = self._used // 4
        if self.exchange is not None:
            self._step[0][0] = self.exchange.begin()
        self.device.driver.replay(self._graph)

    def _place(self, caches: Sequence[KVCache], positions: I64) -> None:
        """Fills the tables."""
        same = len(caches) == len(self._caches) and all(
            known() is cache for known, cache in zip(self._caches, caches, strict=True)
        )
        for layer, table in self._attention:
            states: Any = [cache.layers[layer] for cache in caches]
            if not same or isinstance(states[0], WindowState):
                for s, state in enumerate(states):
                    state.reserve(int(positions[s]), 1)
                    table[s] = state.keys.address, state.values.address, state.keys.shape[1], state.first, 0, s, 1
            table[:, 4] = positions
        for layer, table in () if same else self._delta:
            for s, cache in enumerate(caches):
                own: Any = cache.layers[layer]
                table[s] = own.conv_state.address, own.recurrent_state.address, s, 1
        self._caches = [weakref.ref(cache) for cache in caches]

    def answer(self, engine: _native.Engine, compute: Compute) -> None:
        """Computes the host's part of a replay that was launched; returns when it is done with the last layer. Raises DeviceError, and what
        compute() raises."""
        if self.exchange is not None and self._arena is not None:
            self.exchange.answer(engine, *self._arena, compute)

    @property
    def computed(self) -> I64:
        """(layers,): experts that the host has computed in the last replay."""
        return np.zeros(self._layers, np.int64) if self.exchange is None else self.exchange.computed

    def finish(self) -> F32:
        """Waits for the replay; its logits. Raises DeviceError."""
        self.device.wait()
        if self.exchange is not None:
            self.exchange.check()
        if self._selected is not None:
            self.ids = self._ids.copy()
        return np.array(self._logits)
