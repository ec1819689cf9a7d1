"""One run of one engine in a separate process, which can be put in a control group. Prints one JSON object.

    python benchmarks/one_engine.py ours|llama MODEL SETTINGS
SETTINGS is JSON: mode, threads, prompts (lengths), decode, warm, seed. Both engines see the same tokens. With
"llama" it needs only NumPy and llama-cpp-python, so it runs in an environment without expertstream.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import sys
import time
from typing import Any, ClassVar

import numpy as np


def tokens_of(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 8000, count)]


class Llama:
    """llama.cpp through the C API in llama-cpp-python."""

    LOAD_MODES: ClassVar = {"none": 0, "mmap": 1, "dio": 4}

    def __init__(self, path: str, mode: str, threads: int, context: int) -> None:
        import llama_cpp as lib

        self.lib = lib
        lib.llama_backend_init()

        @lib.llama_log_callback
        def log(level: int, text: bytes, data: Any) -> None:
            if level >= 4:
                sys.stderr.write(text.decode(errors="replace"))

        self._log = log
        lib.llama_log_set(log, None)
        params = lib.llama_model_default_params()
        params.load_mode = self.LOAD_MODES[mode.split("-", maxsplit=1)[0]]
        params.use_extra_bufts = not mode.endswith("norepack")  # repacking weights for the processor copies them
        params.n_gpu_layers = 0
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise SystemExit("llama.cpp could not load the model")
        settings = lib.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, 2048, 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, settings)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def feed(self, tokens: list[int]) -> Any:
        array = (self.lib.llama_token * len(tokens))(*tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise SystemExit("llama_decode failed")
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def reset(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def counters(self) -> dict[str, float]:
        return {}


class Ours:
    def __init__(self, path: str, mode: str, threads: int, context: int) -> None:
        from expertstream import LLM

        self.llm = LLM(path, device="cpu", threads=threads, context_length=context, exact="exact" in mode)
        self.reset()

    def feed(self, tokens: list[int]) -> Any:
        from expertstream.generate import prefill

        if len(tokens) == 1:
            return self.llm.model(np.array(tokens), self.cache)[0]
        return prefill(self.llm.model, self.cache, np.array(tokens), self.llm.prefill_chunk)

    def reset(self) -> None:
        self.cache = self.llm.session().cache

    def counters(self) -> dict[str, float]:
        total = self.llm.experts.stats.total()
        return {
            "hits": total.hits,
            "misses": total.misses,
            "bytes_read": total.bytes_read,
            "stall_seconds": total.stall_seconds,
        }


def main() -> None:
    kind, path, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    context = max([512, *settings["prompts"]]) + settings["warm"] + settings["decode"] + 64
    begin = time.perf_counter()
    engine = (Ours if kind == "ours" else Llama)(path, settings["mode"], settings["threads"], context)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    greedy = settings.get("greedy", 0)
    if greedy:
        logits, found = engine.feed(tokens_of(1, 16)), []
        result["logits"] = [float(x) for x in logits[:4096]]
        for _ in range(greedy):
            found.append(int(np.argmax(logits)))
            logits = engine.feed(found[-1:])
        result["greedy"] = found
    for i, length in enumerate(settings["prompts"]):
        # The first prompt loads the weights; later ones find those that fit in memory.
        for state in ("cold", "warm") if i == 0 else ("warm",):
            engine.reset()
            begin = time.perf_counter()
            engine.feed(tokens_of(2, length))
            result[f"prefill_{length}_{state}_tps"] = length / (time.perf_counter() - begin)
    engine.reset()
    engine.feed(tokens_of(3, 16))
    for token in tokens_of(4, settings["warm"]):
        engine.feed([token])
    before, seconds = engine.counters(), []
    for token in tokens_of(5, settings["decode"]):
        begin = time.perf_counter()
        engine.feed([token])
        seconds.append(time.perf_counter() - begin)
    after = engine.counters()
    if seconds:
        result["decoded"] = len(seconds)
        result["decode_tps"] = len(seconds) / sum(seconds)
        result["decode_median_tps"] = 1 / statistics.median(seconds)
        result |= {name: after[name] - before[name] for name in after}
    print(json.dumps(result), flush=True)
    os._exit(0)  # llama.cpp's cleanup is slow under a memory limit


if __name__ == "__main__":
    main()
