"""Plots measurements: a PNG for each figure and one HTML page with all."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import read_text

__all__ = ["write_report"]

_COLORS = {
    "mix": "#4c72b0", "norm": "#8fa8d0", "router": "#8172b3", "shared": "#64b5cd", "experts": "#55a868", "combine": "#a3d3ae",
    "wait": "#c44e52", "submit": "#e39a9c", "head": "#ccb974", "embed": "#e3d7ac", "arrange": "#da8bc3", "python": "#8c8c8c",
}  # fmt: skip


def write_report(files: list[Path], out: Path) -> list[Path]:
    """Plots every file; returns the files written, the page last. Raises UsageError."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UsageError("report needs the package matplotlib: pip install 'expertstream[bench]'") from None
    mpl.use("Agg")
    figures: list[tuple[str, str, Any]] = []  # file name, title, figure
    for file in files:
        try:
            data = json.loads(read_text(file))
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{file}: not JSON; give the output of `bench decode --json` or `run --profile`") from None
        if isinstance(data, dict) and data.get("bench") == "decode" and data.get("rows"):
            figures += [(f"{file.stem}-{name}", title, draw(data["rows"])) for name, title, draw in _DECODE]
        elif isinstance(data, dict) and "expertstream" in data:
            figures += [(f"{file.stem}-{name}", title, draw(data)) for name, title, draw in _PROFILE]
        else:
            raise UsageError(f"{file}: not the output of `bench decode --json` or `run --profile`")
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for name, _, figure in figures:
            path = out / f"{name}.png"
            figure.savefig(path, dpi=130)
            written.append(path)
        page = out / "index.html"
        page.write_text(
            _page([(title, path) for (_, title, _), path in zip(figures, written, strict=True)]), encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    return [*written, page]


def _page(pictures: list[tuple[str, Path]]) -> str:
    parts = []
    for title, path in pictures:
        picture = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(title)
        parts.append(f"<h2>{name}</h2><img alt='{name}' src='data:image/png;base64,{picture}'>")
    style = "body{font:16px system-ui;margin:2em auto;max-width:60em;color:#222}img{max-width:100%}h2{margin-top:2em}"
    return f"<!doctype html><meta charset=utf-8><title>expertstream</title><style>{style}</style><h1>expertstream</h1>{''.join(parts)}\n"


def _axes(title: str, width: float = 7.5, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speed(rows: list[dict[str, Any]]) -> Any:
    context = min(row["context"] for row in rows)
    rows = sorted((row for row in rows if row["context"] == context), key=lambda row: row["budget_bytes"])
    figure, axes = _axes(f"Decoding speed by memory budget, context {context:,}")
    x = [row["budget_bytes"] / (1 << 30) for row in rows]
    axes.plot(x, [row["memory_limit_tps"] for row in rows], "--", color="#4c72b0", label="memory limit")
    disk = [row["disk_limit_tps"] if row["read_bytes_per_token"] else None for row in rows]
    axes.plot(x, disk, "--", color="#c44e52", label="disk limit")
    axes.plot(x, [row["warm_tps"] for row in rows], "o-", color="#222222", label="warm")
    axes.plot(x, [row["cold_tps"] for row in rows], "o:", color="#8c8c8c", label="cold")
    top = max(row[key] for row in rows for key in ("memory_limit_tps", "warm_tps"))
    axes.set(xlabel="memory budget, GiB", ylabel="tokens per second", ylim=(0, top * 1.15))
    axes.legend(frameon=False)
    return figure


def _hits(rows: list[dict[str, Any]]) -> Any:
    figure, axes = _axes("Experts found in memory")
    rows = sorted(rows, key=lambda row: row["fraction"])
    axes.plot([100 * row["fraction"] for row in rows], [100 * row["hit_rate"] for row in rows], "o-", color="#55a868")
    axes.plot([0, 100], [0, 100], ":", color="#8c8c8c", label="if all experts were used equally often")
    axes.set(xlabel="share of the experts that fit, %", ylabel="hit rate, %", xlim=(0, 100), ylim=(0, 102))
    axes.legend(frameon=False)
    return figure


def _contexts(rows: list[dict[str, Any]]) -> Any:
    figure, axes = _axes("Decoding speed by context")
    for fraction in sorted({row["fraction"] for row in rows}):
        mine = sorted((row for row in rows if row["fraction"] == fraction), key=lambda row: row["context"])
        axes.plot(
            [row["context"] for row in mine],
            [row["warm_tps"] for row in mine],
            "o-",
            label=f"{fraction:.0%} of the experts",
        )
    axes.set(xlabel="tokens of context", ylabel="tokens per second", xscale="log")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def _phases(data: dict[str, Any]) -> Any:
    summary = data["expertstream"]
    figure, axes = _axes("Time per layer by phase", height=2.8)
    named = "decode_ms" if summary["decode_ms"] else "prompt_ms"  # one legend for both bars
    for y, key in enumerate(("decode_ms", "prompt_ms")):
        left, phases = 0.0, summary[key]
        for phase, color in _COLORS.items():
            width = phases.get(phase, 0.0) / max(1, summary["layers"])
            if width:
                axes.barh(y, width, left=left, color=color, label=phase if key == named else None)
                left += width
        axes.text(left, y, f" {left:.2f} ms", va="center")
    axes.set_yticks([0, 1], ["decode", "prompt"])
    axes.set(xlabel="milliseconds per token and layer")
    axes.margins(x=0.12)
    axes.legend(frameon=False, ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    return figure


def _heat(data: dict[str, Any]) -> Any:
    selected = data["expertstream"]["selected"]
    figure, axes = _axes("How often each expert was selected", height=max(2.6, 0.12 * len(selected) + 1.6))
    image = axes.imshow(selected, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    figure.colorbar(image, label="times")
    return figure


def _timeline(data: dict[str, Any]) -> Any:
    """The last decoded token, op by op."""
    events = [e for e in data["traceEvents"] if e["ph"] == "X"]
    tokens = [e for e in events if e["tid"] == 1 and e["args"]["tokens"] == 1] or [e for e in events if e["tid"] == 1]
    figure, axes = _axes("One token", width=10, height=2.6)
    if tokens:
        token = tokens[-1]
        for e in events:
            if e["tid"] == 2 and token["ts"] <= e["ts"] < token["ts"] + token["dur"]:
                axes.barh(0, e["dur"] / 1000, left=(e["ts"] - token["ts"]) / 1000, color=_COLORS[e["args"]["phase"]])
    axes.set(xlabel="milliseconds", yticks=[])
    from matplotlib.patches import Patch

    handles = [
        Patch(color=color, label=phase)
        for phase, color in _COLORS.items()
        if phase not in ("python", "arrange", "embed")
    ]
    axes.legend(handles=handles, frameon=False, ncols=9, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    return figure


_DECODE = (
    ("speed", "Tokens per second by memory budget", _speed),
    ("hits", "Hit rate", _hits),
    ("contexts", "Tokens per second by context", _contexts),
)
_PROFILE = (
    ("phases", "Time per layer by phase", _phases),
    ("timeline", "One token, op by op", _timeline),
    ("experts", "Which experts were selected", _heat),
)
