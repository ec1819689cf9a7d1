"""Hit rates of the cache policies and of the optimum on routing traces of real models.

    python -m benchmarks.cache_policies [TRACE …]

Traces are .npz files written by `expertstream trace` or JSON lines {"tok", "layers"}; the default is the embedded model's. Writes
benchmarks/results/cache_policies.csv and docs/cache-policies.png, and prints the tables of docs/cache-policies.md. Nothing is timed: the
figures are the same on every machine.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from expertstream.bench.traces import BELADY, SHARES, hit_rate, load_trace
from expertstream.config import POLICIES

ROOT = Path(__file__).parent.parent
NAMES = (*POLICIES, BELADY)


def measure(path: Path) -> list[dict[str, Any]]:
    trace = load_trace(path)
    tokens, layers, top_k = trace.experts.shape
    title = f"{path.stem.removesuffix('-trace').removeprefix('trace_')}: {layers} layers, {top_k} of {trace.num_experts} experts, {tokens:,} tokens"
    return [
        {"trace": title, "share": share, "slots": round(share * trace.num_experts), **{name: hit_rate(trace, name, round(share * trace.num_experts)) for name in NAMES}}
        for share in SHARES
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for title in dict.fromkeys(row["trace"] for row in rows):
        lines += [
            f"**{title}**",
            "",
            "| experts that fit | " + " | ".join(NAMES) + " |",
            "|---" * (len(NAMES) + 1) + "|",
        ]
        for row in rows:
            if row["trace"] == title:
                rates = [float(row[name]) for name in NAMES]
                best = max(rates[:-1])
                cells = [f"**{rate:.1%}**" if rate == best else f"{rate:.1%}" for rate in rates]
                lines.append(f"| {float(row['share']):.1%} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = list(dict.fromkeys(row["trace"] for row in rows))
    figure, axes = pyplot.subplots(1, len(titles), figsize=(4.6 * len(titles), 4), sharey=True, squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        mine = [row for row in rows if row["trace"] == title]
        shares = [100 * row["share"] for row in mine]
        for name, style in zip(NAMES, ("o-", "s-", "^-", "k--"), strict=True):
            axis.plot(
                shares,
                [100 * row[name] for row in mine],
                style,
                label="optimum (Belady)" if name == BELADY else name,
                markersize=4,
            )
        axis.plot([0, 100], [0, 100], color="0.8", linewidth=1, label="uniform routing")
        axis.set(title=title.replace(": ", "\n"), xlabel="experts of a layer that fit, %", xlim=(0, 100), ylim=(0, 100))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("hits, %")
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="*", metavar="TRACE")
    args = parser.parse_args()
    rows = [row for path in args.traces or [ROOT / "tests/data/embedded-trace.npz"] for row in measure(path)]
    with (ROOT / "benchmarks/results/cache_policies.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, ROOT / "docs/cache-policies.png")
    print(table(rows))


if __name__ == "__main__":
    main()
