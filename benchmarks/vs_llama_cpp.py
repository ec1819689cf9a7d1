"""expertstream compared with llama.cpp: the same weights, tokens and threads, in the same run.

    python -m benchmarks.vs_llama_cpp [--geometry qwen3.5-35b-a3b] [--layers 16] [--rounds 3] [--folder DIR]

Writes a synthetic model as a pack and as its GGUF twin (Q4_0 experts, Q8_0 trunk), installs llama-cpp-python in a separate
environment, and checks that both engines give the same logits and greedy tokens. Each round then runs every engine and mode, and measures
disk, memory and arithmetic before and after each run: resident (everything fits), and in a control group with a quarter of the model's
bytes (needs root; mmap also with a read-ahead of 128 KiB, the usual value). Prints medians and ratios; every run is written to
benchmarks/results/vs_llama_cpp.csv. llama.cpp without repacking keeps one copy of the weights; with repacking it is faster and keeps two.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from expertstream.bench.geometry import geometry_config
from expertstream.bench.machine import arithmetic_peak, disk_rates, memory_bandwidth
from expertstream.bench.plan import load_model
from expertstream.bench.speed import drop_page_cache
from expertstream.bench.synth import write_synthetic
from expertstream.checkpoint.quantize import BitPolicy
from expertstream.config import EngineConfig
from expertstream.units import format_bytes

from .control_group import memory_group

WORKER = Path(__file__).parent / "one_engine.py"
PEER = "llama-cpp-python==0.3.36"
RESIDENT = [("ours", "default"), ("ours", "exact"), ("llama", "none"), ("llama", "mmap-norepack")]
LIMITED = [("ours", "default"), ("llama", "mmap-norepack"), ("llama", "mmap-norepack-readahead128")]
# Modes that copy the weights; run once, to record how they fail.
HOPELESS = [("llama", "none-norepack"), ("llama", "dio-norepack"), ("llama", "mmap")]


def peer_python(folder: Path) -> Path:
    """The interpreter of an environment with llama-cpp-python, which is built from source on the first call."""
    python = folder / "peer" / "bin" / "python"
    if not python.exists():
        print(f"installing {PEER} (compiling takes some minutes)", flush=True)
        venv.create(folder / "peer", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER, "numpy"], check=True)
    return python


@contextmanager
def read_ahead(path: Path, kib: int) -> Iterator[None]:
    """Sets the disk's read-ahead, and restores it afterwards."""
    device = os.stat(path).st_dev
    setting = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    if not setting.exists():
        setting = setting.parent.parent.parent / "queue" / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def run(
    kind: str,
    mode: str,
    paths: dict[str, Path],
    python: dict[str, Path],
    settings: dict[str, Any],
    limit: int = 0,
    timeout: int = 600,
) -> dict[str, Any]:
    """One worker's result, or {"failed": reason}."""
    command = [str(python[kind]), str(WORKER), kind, str(paths[kind]), json.dumps({**settings, "mode": mode})]
    ahead = read_ahead(paths[kind], 128) if mode.endswith("readahead128") else nullcontext()
    with ahead, memory_group(limit) if limit else nullcontext() as group:
        if group is not None:
            command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {timeout} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [""]
        return {"failed": "killed: out of memory" if done.returncode == -9 else f"exit {done.returncode}: {last[0]}"}
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=48, help="tokens decoded per run; fewer for llama.cpp under the limit"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/vs_llama_cpp"),
        help="for the models and llama.cpp's environment (kept)",
    )
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "vs_llama_cpp.csv")
    parser.add_argument("--table", action="store_true", help="print README's table from the CSV without measuring")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.csv)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    threads = EngineConfig.from_options({}).thread_count
    name = f"{args.geometry}-{args.layers}"
    paths = {"ours": args.folder / name, "llama": args.folder / f"{name}.gguf"}
    if not paths["ours"].exists():
        paths["llama"].unlink(missing_ok=True)
        policy = BitPolicy(4, 32, 8, symmetric=True)
        print("writing the model in both formats", flush=True)
        write_synthetic(
            paths["ours"], geometry_config(args.geometry, args.layers), policy, gguf=paths["llama"], threads=threads
        )
    python = {"ours": Path(sys.executable), "llama": peer_python(args.folder)}
    size = sum(file.stat().st_size for file in paths["ours"].iterdir())
    limit = size // 4 // 4096 * 4096
    model = load_model(str(paths["ours"]), 0, BitPolicy())
    print(
        f"{name}: pack {format_bytes(size)}, GGUF {format_bytes(paths['llama'].stat().st_size)}, limit {format_bytes(limit)}, {threads} threads"
    )

    base = {"threads": threads, "prompts": [], "warm": 0, "decode": 0}
    check = {
        kind: run(kind, mode, paths, python, {**base, "greedy": 16})
        for kind, mode in (("ours", "exact"), ("llama", "mmap-norepack"))
    }
    if any("failed" in result for result in check.values()):
        raise SystemExit(f"the engines could not be compared: { {k: r.get('failed') for k, r in check.items()} }")
    a, b = (np.array(check[kind]["logits"]) for kind in ("ours", "llama"))
    same = next(
        (i for i, pair in enumerate(zip(*(check[k]["greedy"] for k in check), strict=True)) if pair[0] != pair[1]), 16
    )
    print(
        f"same weights: logits differ by {np.linalg.norm(a - b) / np.linalg.norm(b):.2%} (llama.cpp rounds activations to 8 bits), the first {same} of 16 greedy tokens are equal"
    )

    rows: list[dict[str, Any]] = []
    for number in range(args.rounds):
        about = {"round": number, "model": name, "model_bytes": size, "threads": threads, "greedy_equal": same}
        print(f"round {number}", flush=True)
        plans = [("resident", kind, mode, 0) for kind, mode in RESIDENT if number == 0 or mode != "exact"] + [
            ("quarter", kind, mode, limit) for kind, mode in LIMITED
        ]
        if number == 0:
            plans += [("quarter", kind, mode, limit) for kind, mode in HOPELESS]
        for place, kind, mode, most in plans:
            slow = place == "quarter" and kind == "llama"
            settings = {
                "threads": threads, "prompts": [512, 2048] if place == "resident" else [] if slow else [2048],
                "warm": 2 if slow else 16, "decode": 6 if slow else args.tokens,
            }  # fmt: skip
            before = limits(paths["ours"], model.slot_bytes, threads)
            for path in paths.values():
                if path.is_dir():
                    drop_page_cache(path)
                else:
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            result = run(kind, mode, paths, python, settings, most, 180 if slow else 600)
            result.pop("logits", None)
            after = limits(paths["ours"], model.slot_bytes, threads)
            measured = {key: (before[key] + after[key]) / 2 for key in before}
            rows.append(
                {**about, **measured, "place": place, "engine": kind, "mode": mode, "limit_bytes": most, **result}
            )
            print(
                f"  {place:8} {kind:5} {mode:27} {_said(result)}; disk {measured['disk_bytes_per_second'] / 1e9:.2f}, "
                f"memory {measured['memory_bytes_per_second'] / 1e9:.1f} GB/s",
                flush=True,
            )
            _write(args.csv, rows)
    print("\n".join(["", table(rows), "", *reach(rows, model)]))


def limits(path: Path, record: int, threads: int) -> dict[str, float]:
    """The machine's limits at this moment; shared machines drift within minutes."""
    disk = disk_rates(path, record, depths=(16,), splits=(256 << 10,), seconds=1)[0]
    return {
        "disk_bytes_per_second": disk.bytes_per_second,
        "memory_bytes_per_second": memory_bandwidth(threads),
        "multiply_adds_per_second": arithmetic_peak(threads),
    }


def _said(result: dict[str, Any]) -> str:
    if "failed" in result:
        return str(result["failed"])
    parts = [f"decode {result['decode_tps']:.2f}/s"]
    parts += [
        f"{key.removesuffix('_tps').replace('_', ' ')} {value:.0f}/s"
        for key, value in result.items()
        if key.startswith("prefill")
    ]
    if "hits" in result:
        parts.append(f"hits {result['hits'] / max(1, result['hits'] + result['misses']):.0%}")
    return ", ".join(parts)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    fields = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items() if text != ""} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def median(rows: list[dict[str, Any]], place: str, kind: str, mode: str, key: str) -> float | None:
    found = [
        row[key] for row in rows if (row["place"], row["engine"], row["mode"]) == (place, kind, mode) and key in row
    ]
    return statistics.median(found) if found else None


def table(rows: list[dict[str, Any]]) -> str:
    """README's table, from the CSV alone: medians, and their ratio to llama.cpp's best mode in the same setting."""
    names = {
        ("resident", "ours", "default"): "**expertstream**, everything in memory",
        ("resident", "llama", "none"): "llama.cpp, repacked weights",
        ("resident", "llama", "mmap-norepack"): "llama.cpp, mmap",
        ("quarter", "ours", "default"): "**expertstream**, a quarter of the memory",
        ("quarter", "llama", "mmap-norepack"): "llama.cpp, mmap",
        ("quarter", "llama", "mmap-norepack-readahead128"): "llama.cpp, mmap, read-ahead 128 KiB",
        ("quarter", "llama", "dio-norepack"): "llama.cpp, direct I/O or repacked",
    }
    columns = ("decode_tps", "prefill_512_warm_tps", "prefill_2048_warm_tps")
    best = {
        (place, key): max(
            (median(rows, *peer, key) or 0.0 for peer in names if peer[:2] == (place, "llama")), default=0.0
        )
        for place in ("resident", "quarter")
        for key in columns
    }
    lines = ["| | decode, tokens/s | prompt of 512 | prompt of 2,048 |", "|---|---|---|---|"]
    for plan, name in names.items():
        cells = []
        for key in columns:
            value = median(rows, *plan, key)
            if value is None:
                cells.append("")
                continue
            over = best[plan[0], key]
            ratio = f" ({value / over:.{1 if value / over < 10 else 0}f}×)" if plan[1] == "ours" and over else ""
            cells.append(f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f}{ratio}")
        mine = [row for row in rows if (row["place"], row["engine"], row["mode"]) == plan]
        if not mine:
            continue
        if not any(cells):
            cells[0] = str(mine[0].get("failed", ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reach(rows: list[dict[str, Any]], model: Any) -> list[str]:
    """The share of the machine's limits reached, each measured before and after the run."""
    lines = []
    resident = [row for row in rows if (row["place"], row["engine"], row["mode"]) == ("resident", "ours", "default")]
    memory = statistics.median(
        row["decode_median_tps"] * model.cost.bytes / row["memory_bytes_per_second"] for row in resident
    )
    lines.append(
        f"resident decode: {memory:.0%} of the memory-bandwidth limit ({model.cost.bytes / 1e9:.2f} GB per token)"
    )
    products = model.cost.multiply_adds - model.cost.head_multiply_adds
    for length in (512, 2048):
        share = statistics.median(
            row[f"prefill_{length}_warm_tps"] * products / row["multiply_adds_per_second"] for row in resident
        )
        lines.append(f"resident prompt of {length}: {share:.0%} of the int8 peak")
    quarter = [
        row
        for row in rows
        if (row["place"], row["engine"], row["mode"]) == ("quarter", "ours", "default") and "decode_tps" in row
    ]
    if quarter:
        used = statistics.median(
            row["bytes_read"] / row["decoded"] * row["decode_tps"] / row["disk_bytes_per_second"] for row in quarter
        )
        lines.append(f"decode in a quarter of the memory: {used:.0%} of the disk's steady rate")
    return lines


if __name__ == "__main__":
    main()
