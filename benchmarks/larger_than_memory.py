"""A model four times larger than its memory limit, with every combination of residency and reader.

Run as root: python -m benchmarks.larger_than_memory [--geometry small] [--layers N] [--rounds 3] [--folder DIR]
Writes a synthetic pack and runs `expertstream run` in a control group limited to a quarter of its size: cold page cache, 64 tokens,
same seed. Rounds are interleaved; medians are printed and every run is written to benchmarks/results/. Outputs must be identical.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from expertstream.bench.geometry import geometry_config
from expertstream.bench.machine import disk_rates
from expertstream.bench.speed import drop_page_cache
from expertstream.bench.synth import write_synthetic
from expertstream.units import format_bytes

from .control_group import memory_group, peak_bytes, run_inside

MODES = [
    ("slots", "uring"),
    ("slots", "pread"),
    ("os", "uring"),
    ("os", "pread"),
]
PROMPT = "Once upon a time there was a little girl who lived in a house by the sea."


def one_run(group: Path, folder: Path, residency: str, reader: str, tokens: int) -> dict[str, Any]:
    drop_page_cache(folder)
    command = [
        str(Path(sys.executable).parent / "expertstream"), "run", str(folder), PROMPT, "--json", "--residency", residency, "--reader", reader,
        "--max-tokens", str(tokens), "--temperature", "1", "--seed", "1", "--context", "1024",
    ]  # fmt: skip
    result = run_inside(group, command)
    if result.returncode != 0:
        raise SystemExit(f"{residency} {reader}: exit {result.returncode}: {result.stderr}")
    out = json.loads(result.stdout)
    s, e = out["stats"], out["stats"]["decode_experts"]
    return {
        "residency": residency, "reader": reader, "tokens": out["tokens"], "decode_tps": s["decode_tps"], "ttft_seconds": s["ttft_seconds"],
        "hit_rate": e["hit_rate"], "bytes_read": e["bytes_read"] + s["prefill_experts"]["bytes_read"],
        "bytes_read_per_token": e["bytes_read"] / max(1, s["generated_tokens"] - 1), "stall_seconds": e["stall_seconds"],
        "peak_group_bytes": peak_bytes(group), "budget_bytes": out["memory"]["budget_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--geometry", default="small")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write the pack (a temporary folder)")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "larger_than_memory.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"{args.geometry}-{args.layers}"
        if not folder.exists():
            write_synthetic(folder, geometry_config(args.geometry, args.layers))
        size = sum(f.stat().st_size for f in folder.iterdir())
        limit = size // 4 // 4096 * 4096
        print(f"{folder.name}: {format_bytes(size)}, limit {format_bytes(limit)}")
        rows: list[dict[str, Any]] = []
        for number in range(args.rounds):
            rate = disk_rates(folder, 1 << 20, depths=(16,), splits=(256 << 10,), seconds=2)[0].bytes_per_second
            print(f"round {number}: disk {rate / 1e9:.2f} GB/s")
            for residency, reader in MODES:
                with memory_group(limit) as group:
                    row = one_run(group, folder, residency, reader, args.tokens)
                rows.append(
                    {"round": number, "model_bytes": size, "limit_bytes": limit, "disk_bytes_per_second": rate, **row}
                )
                print(
                    f"  {residency:5} {reader:5} {row['decode_tps']:.2f} tokens/s, {row['hit_rate']:.1%} hits",
                    flush=True,
                )
        assert all(row["tokens"] == rows[0]["tokens"] for row in rows), "outputs differ"
    args.csv.parent.mkdir(exist_ok=True)
    with args.csv.open("w", newline="") as file:
        fields = [k for k in rows[0] if k != "tokens"]
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(
        f"{'residency':9} {'reader':6} {'tokens/s':>8} {'of disk':>8} {'hit rate':>8} {'read/token':>12} {'first token':>11} {'peak':>9}"
    )
    for residency, reader in MODES:
        mine = [r for r in rows if (r["residency"], r["reader"]) == (residency, reader)]

        def middle(f: Any, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.median(map(f, mine))

        used = middle(lambda r: r["bytes_read_per_token"] * r["decode_tps"] / r["disk_bytes_per_second"])
        print(
            f"{residency:9} {reader:6} {middle(lambda r: r['decode_tps']):8.2f} {used:8.0%} {middle(lambda r: r['hit_rate']):8.1%} "
            f"{format_bytes(middle(lambda r: r['bytes_read_per_token'])):>12} {middle(lambda r: r['ttft_seconds']):9.2f} s "
            f"{format_bytes(middle(lambda r: r['peak_group_bytes'])):>9}"
        )


if __name__ == "__main__":
    main()
