"""A mailbox through which a recorded step asks the host to compute some of its experts: kernels/exchange.cu."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import _native
from ..errors import DeviceError
from ..formats.numbers import F32, I64
from .device import Device, DeviceArray

__all__ = ["Compute", "Exchange", "Question"]

# As kAsked, kAnswered, kFailed, kExperts and kParts in exchange.cu.
_ASKED, _ANSWERED, _FAILED, _EXPERTS, _PARTS = 0, 8, 16, 24, 12
_WORDS = 32
_NEVER = 1 << 62  # an answer to every question: the card is not to wait
_THREADS, _BLOCKS = 256, 8
_LOOK = 0.05  # seconds without a question after which the card is looked at
_STEP = 4096  # more than the layers of a model: the distance between the questions of two steps


class Question(NamedTuple):
    """Row p of y (pairs, H) is to be expert i applied to x[pair_token[p]], for p in [pair_start[i], pair_start[i + 1]). guess: what the
    next layer will probably select, the most likely first."""

    experts: list[int]
    x: F32
    pair_start: I64
    pair_token: I64
    y: F32
    guess: list[int]


Compute = Callable[[int, Question], None]


def _patience() -> float:
    """Seconds that a kernel waits for the host. Windows resets a card whose kernel runs for 2 seconds."""
    try:
        windows = "microsoft" in Path("/proc/version").read_text(encoding="utf-8").lower()
    except OSError:
        windows = False
    return 1.5 if windows else 20.0


class Exchange:
    """Of one recording, for so many tokens. All layers use it, one after another."""

    def __init__(self, device: Device, tokens: int, top_k: int, hidden: int) -> None:
        self._device, self.tokens, self.top_k = device, tokens, top_k
        n = pairs = self.pairs = tokens * top_k
        sizes = (8 * _WORDS, 8 * n, 8 * n * _PARTS, 8 * (n + 1), 8 * n, 4 * tokens * hidden, 4 * n * hidden, 8 * n, 4 * n)  # fmt: skip
        starts = np.cumsum([0, *(-(-size // 128) * 128 for size in sizes)]).tolist()
        self.memory = device.pinned(starts[-1])
        views = [self.memory[at : at + size] for at, size in zip(starts, sizes, strict=False)]
        self.control: I64 = views[0].view(np.int64)
        self.experts: I64 = views[1].view(np.int64)
        self.addresses: I64 = views[2].view(np.int64).reshape(pairs, _PARTS)
        self.pair_start: I64 = views[3].view(np.int64)
        self.pair_token: I64 = views[4].view(np.int64)
        self.x: F32 = views[5].view(np.float32).reshape(tokens, hidden)
        self.y: F32 = views[6].view(np.float32).reshape(pairs, hidden)
        self._guess: I64 = views[7].view(np.int64)
        self._likely: F32 = views[8].view(np.float32)
        base = device.registered(self.memory)
        self._box = tuple(base + at for at in starts[:-1])
        self.chosen = device.empty((pairs,), np.int64)
        self._own = device.empty((1 + pairs,), np.int32)
        self._kernels, self._patience = device.kernels("exchange.cu"), _patience()
        self.formats: list[_native.ExpertFormat] = []
        self._layers: list[int] = []  # their numbers
        self.step = 0
        self.computed: I64 = np.zeros(0, np.int64)  # experts of each layer that the host computed in the last step

    def ask(
        self,
        layer: int,
        format: _native.ExpertFormat,
        table: DeviceArray,
        arena: tuple[int, int],
        selected: DeviceArray,
        x: DeviceArray,
        share: DeviceArray,
        step: DeviceArray,
        last: bool,
        guess: tuple[DeviceArray, DeviceArray] | None,
    ) -> int:
        """Records a layer's question; the address of its pairs' experts, −1 for those that the host computes. table (experts, P):
        addresses; arena: the address and the size of the memory that both can read. guess (T, top_k): what the next layer will probably
        select, and with which weights."""
        self.formats.append(format)
        self._layers.append(layer)
        pairs, hidden = self.pairs, x.shape[1]
        self._kernels["ask"](
            (1, 1, 1), _THREADS, 16 * pairs, *self._box, table.address, table.shape[1], *arena, selected.address, self.tokens, self.top_k,
            x.address, hidden, share.address, step.address, len(self.formats) - 1, int(last),
            *((0, 0) if guess is None else (guess[0].address, guess[1].address)), self.chosen.address, self._own.address,
        )  # fmt: skip
        return self.chosen.address

    def collect(self, y: DeviceArray, step: DeviceArray) -> None:
        """Records that the answer comes into y (pairs, H)."""
        self._kernels["collect"](
            (_BLOCKS, 1, 1), _THREADS, 0, *self._box, self._own.address, step.address, len(self.formats) - 1,
            int(self._patience * 1e9), y.shape[1], y.address,
        )  # fmt: skip

    def begin(self) -> int:
        """Call before a replay; the number of its step."""
        self.step += _STEP
        self.control[_ASKED] = self.control[_ANSWERED] = self.step
        self.control[_FAILED] = 0
        self.computed = np.zeros(len(self.formats), np.int64)
        return self.step

    def answer(self, engine: _native.Engine, arena: _native.Arena, base: int, compute: Compute) -> None:
        """Computes what the card asks for until the step ends. base: the card's address of the arena. compute: computes a layer's experts
        if some of them are elsewhere. Raises DeviceError, and what compute() raises."""
        layer, driver = -1, self._device.driver
        try:
            driver.running()  # hands the step to the card
            limit = time.monotonic() + self._patience
            while True:
                layer = engine.answer(
                    arena, base, self.formats, self.control, self.addresses, self.pair_start, self.pair_token, self.x, self.y, self.step,
                    _LOOK, self.computed, layer,
                )  # fmt: skip
                if layer == len(self.formats):
                    return
                if layer >= 0:
                    compute(self._layers[layer], self._question())
                    limit = time.monotonic() + self._patience
                elif not (driver.running() or self._asks()) or time.monotonic() > limit:
                    raise DeviceError("the GPU did not go on with a step; load the model again")
        except BaseException:
            self.give_up()
            raise

    def _asks(self) -> bool:
        """Whether there is a question without an answer."""
        return bool(self.control[_ASKED] > self.control[_ANSWERED])

    def _question(self) -> Question:
        experts, pairs, guesses = self.control[_EXPERTS : _EXPERTS + 3].tolist()
        likeliest_first = np.argsort(-self._likely[:guesses], kind="stable")
        return Question(
            self.experts[:experts].tolist(), self.x, self.pair_start[: experts + 1].copy(), self.pair_token[:pairs].copy(), self.y[:pairs],
            list(dict.fromkeys(self._guess[:guesses][likeliest_first].tolist())),
        )  # fmt: skip

    def give_up(self) -> None:
        """Lets the card go on without answers."""
        self.control[_ANSWERED] = _NEVER

    def check(self) -> None:
        """Raises DeviceError if the card has not had an answer in time, so that the step's results are worthless."""
        if self.control[_FAILED]:
            raise DeviceError(
                f"the GPU waited for the processor for more than {self._patience:.0f} seconds; "
                "repeat the request, with fewer threads or cpu_experts=none if it happens again"
            )
