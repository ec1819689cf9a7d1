"""A model on a GPU: prompts, decoding, batches, and decoding with a part of the experts on the card, beside what the card and its link can do.

    expertstream synth qwen3.5-35b-a3b /mnt/ssd/m --trunk-bits 4 --routing zipf
    python -m benchmarks.gpu /mnt/ssd/m --vram 8GiB --csv benchmarks/results/gpu.csv

Each row of the CSV has the card, its driver and the date; rates are measured in the same run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from expertstream import LLM
from expertstream.batch import Batch
from expertstream.cuda.driver import driver_version


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median of some runs, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


class Rows:
    """Prints what is measured, and keeps it for the CSV."""

    def __init__(self, card: str, model: str) -> None:
        self.card, self.model, self.rows = card, model, list[dict[str, Any]]()

    def add(self, vram: str, measure: str, value: float, unit: str) -> None:
        self.rows.append(
            {"date": datetime.date.today().isoformat(), "card": self.card, "driver": driver_version(), "model": self.model, "vram": vram,
             "measure": measure, "value": round(value, 2), "unit": unit}
        )  # fmt: skip
        print(f"{vram:16} {measure:40} {value:10.1f} {unit}", flush=True)


def measure_card(llm: Any, rows: Rows) -> None:
    """The rates of the minute: the card's memory (bytes read and written) and its link."""
    device, size = llm.ops.device, 512 << 20
    host, (a, b) = device.pinned(size), (device.empty((size,), np.uint8) for _ in range(2))

    def link() -> None:
        device.driver.upload_beside(a.address, host.ctypes.data, size, None)
        device.driver.join()
        device.driver.synchronize()

    def memory() -> None:
        for _ in range(8):
            device.driver.copy(b.address, a.address, size)
        device.driver.synchronize()

    rows.add("", "host to card", size / seconds(link, 5) / 1e9, "GB/s")
    rows.add("", "card's memory, copy", 16 * size / seconds(memory, 5) / 1e9, "GB/s")


def measure_model(llm: Any, vram: str, rows: Rows, batches: bool, prompts: list[int]) -> None:
    rng, vocabulary = np.random.default_rng(0), llm.model_config.vocab_size
    cache = llm.session().cache
    for count in prompts:
        tokens = rng.integers(1, vocabulary, count)

        def prompt(tokens: Any = tokens) -> None:
            cache.reset()
            for begin in range(0, tokens.shape[0], llm.prefill_chunk):
                llm.model(tokens[begin : begin + llm.prefill_chunk], cache, prompt=True)

        near = sum(map(len, llm.experts.vram.tier.resident)) / llm.plan.total_experts
        rows.add(vram, f"experts on the card (prompt of {count}, chunks of {llm.prefill_chunk})", 100 * near, "%")
        rows.add(vram, f"prompt of {count}", count / seconds(prompt, 3), "tokens/s")
    for name, own in (("decode after the prompt", cache), ("decode", llm.session().cache)):
        step = [own]

        def one(step: list[Any] = step) -> None:
            llm.model(rng.integers(1, vocabulary, 1), step[0])

        for _ in range(20 if batches else 300):  # until the experts that are used have come to the card
            one()
        tier = llm.experts.vram
        far = tier.far_reads + tier.host_computed
        took = seconds(one, 200)
        used = 201 * llm.top_k * llm.model_config.num_hidden_layers
        rows.add(vram, name, 1 / took, "tokens/s")
        if not tier.holds_all:
            rows.add(
                vram,
                "of 8 experts in host memory, the CPU's",
                0 if llm.ops.split is None else llm.ops.split.share(8)[8],
                "",
            )
        rows.add(
            vram,
            f"{name}: experts found on the card",
            100 * (1 - (tier.far_reads + tier.host_computed - far) / used),
            "%",
        )
    for count in (2, 4, 8, 16) if batches else ():
        caches = [llm.session().cache for _ in range(count)]
        took = seconds(lambda n=count, c=caches: llm.model.forward(Batch(rng.integers(1, vocabulary, n), c)), 30)
        rows.add(vram, f"decode, batch of {count}", count / took, "tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--vram", nargs="*", default=["8GiB"], help="smaller shares of the card that are measured too")
    parser.add_argument("--skip-all", action="store_true", help="the model is larger than the card")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[2048], help="tokens; decoding is measured after the last one"
    )
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prompt in one pass (the engine's choice)")
    parser.add_argument(
        "--cpu-experts", nargs="*", default=["auto"], help="who computes experts in host memory: auto, none, all"
    )
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows: Rows | None = None
    runs: list[tuple[str | None, str]] = [] if options.skip_all else [(None, "auto")]
    for vram, mode in [*runs, *((vram, mode) for vram in options.vram for mode in options.cpu_experts)]:
        begin = time.perf_counter()
        with LLM(
            options.model,
            device=options.device,
            memory=options.memory,
            vram=vram,
            cpu_experts=mode,
            context_length=2 * max(options.prompts),
            verify="never",
            prefill_chunk=options.chunk,
        ) as llm:
            card: Any = llm.ops
            if rows is None:
                rows = Rows(card.device.driver.name, options.model.name)
                measure_card(llm, rows)
            name = "all" if vram is None else vram if mode == "auto" else f"{vram}, CPU {mode}"
            rows.add(name, "opened in", time.perf_counter() - begin, "s")
            measure_model(llm, name, rows, vram is None, options.prompts)
    if options.csv and rows:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows.rows[0]))
            writer.writeheader()
            writer.writerows(rows.rows)


if __name__ == "__main__":
    main()
