"""The plan command."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from ..errors import UsageError
from ..units import format_bytes, parse_bytes
from .synth import add_quantization, policy_of

__all__ = ["add_plan"]


def add_plan(commands: Any, style: dict[str, Any]) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        usage="expertstream plan [OPTIONS] MODEL|GEOMETRY",
        help="predict a model's speed on this machine, before any download",
        description=(
            "Measures this machine's memory, disk, arithmetic and GPU for a few seconds, and predicts from these and the model's sizes\n"
            "what fits, the hit rate, the speed, and which hardware change would help most."
        ),
        **style,
    )
    plan.add_argument(
        "model", metavar="MODEL|GEOMETRY", help="a checkpoint folder, a known model (see synth), or a config.json"
    )
    plan.add_argument("--layers", type=int, default=0, metavar="N", help="only the first N layers (all)")
    plan.add_argument(
        "--memory",
        metavar="SIZE",
        action="append",
        help="a budget; may be repeated (a quarter, half and all of the free memory)",
    )
    plan.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:N (the first NVIDIA GPU if there is one, else the CPU)"
    )
    plan.add_argument("--vram", metavar="SIZE", help="a budget of the GPU's memory (what is free, less a reserve)")
    plan.add_argument("--context", type=int, default=8192, metavar="N", help="tokens of context (8192)")
    plan.add_argument("--prompt", type=int, default=2048, metavar="N", help="tokens of the prompt to predict (2048)")
    plan.add_argument(
        "--routing",
        choices=("real", "uniform"),
        default="real",
        help="experts selected as in trained models, or uniformly (real)",
    )
    plan.add_argument(
        "--disk", type=Path, default=Path(), metavar="PATH", help="a folder on the disk that will hold the model (here)"
    )
    plan.add_argument("--threads", type=int, metavar="N", help="compute threads (one per available processor)")
    add_quantization(plan)
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(function=_plan)


def _plan(options: argparse.Namespace) -> int:
    from ..bench.card import measure_card
    from ..bench.machine import arithmetic_peak, disk_rates, memory_bandwidth
    from ..bench.plan import Machine, advice, load_model, predict
    from ..cuda.driver import device_number
    from ..experts.budget import default_budget
    from ..machine import available_bytes

    engine = EngineConfig.from_options({"threads": options.threads, "device": options.device, "vram": options.vram})
    threads, number = engine.thread_count, device_number(engine.device)
    if number is None and engine.vram_bytes is not None:
        raise UsageError("--vram needs a GPU; --device is cpu, or no NVIDIA GPU can be used (--device cuda says why)")
    if not (1 <= options.context <= 1 << 24 and 1 <= options.prompt <= options.context):
        raise UsageError(
            f"--context must be from 1 to {1 << 24} and --prompt from 1 to --context; got {options.context} and {options.prompt}"
        )
    model = load_model(options.model, options.layers, policy_of(options))
    available = available_bytes()
    budgets = [parse_bytes(text) for text in options.memory or ()] or [available // 4, available // 2, available]
    where = Path(options.model) if Path(options.model).is_dir() else options.disk
    rates = disk_rates(where, model.slot_bytes, depths=(16,), splits=(256 << 10,), seconds=2.0)
    machine = Machine(memory_bandwidth(threads), rates[0].bytes_per_second, arithmetic_peak(threads))
    card = None if number is None else measure_card(number)
    settings: dict[str, Any] = {
        "context": options.context,
        "prompt_tokens": options.prompt,
        "routing": options.routing,
        "threads": threads,
    }
    if card is not None:
        settings |= {"card": card, "vram_bytes": engine.vram_bytes or default_budget(card.free_bytes)}
    found = [predict(model, machine, budget, **settings) for budget in budgets]
    if options.json:
        print(
            json.dumps(
                {
                    "model": options.model, "model_bytes": model.model_bytes, "bytes_per_token": model.cost.bytes,
                    "machine": vars(machine),
                    "settings": settings if card is None else settings | {"card": vars(card)},
                    "predictions": [vars(p) if p is not None else {"budget_bytes": b} for p, b in zip(found, budgets, strict=True)],
                },
                indent=1,
            )
        )  # fmt: skip
        return 0
    print(
        f"{options.model}: {format_bytes(model.model_bytes)}, of which each token reads {format_bytes(model.cost.bytes)} "
        f"(trunk {format_bytes(model.cost.trunk_bytes)}, {model.cost.experts} experts of {format_bytes(model.cost.expert_bytes)})\n"
        f"this machine: memory {machine.memory_rate / 1e9:.1f} GB/s, disk {machine.disk_rate / 1e9:.2f} GB/s, "
        f"{machine.arithmetic_rate / 1e9:.0f} G multiply-adds/s, {format_bytes(available)} available, {threads} threads"
    )
    if card is not None:
        print(
            f"{card.name}: memory {card.memory_rate / 1e9:.0f} GB/s, link {card.link_rate / 1e9:.1f} GB/s, "
            f"{card.arithmetic_rate / 1e12:.1f} T multiply-adds/s, a layer's kernels {1e6 * card.layer_seconds:.0f} µs, "
            f"{format_bytes(settings['vram_bytes'])} of {format_bytes(card.free_bytes)} used"
        )
    on_card = "" if card is None else f"{'on GPU':>7} "
    print(
        f"\n{'memory':>9} {'experts':>8} {on_card}{'hits':>6} {'disk/token':>10} {'decode':>8} {'prefill':>9} {'first token':>11}  bound by"
    )
    total = model.config.num_hidden_layers * model.config.num_experts
    for budget, p in zip(budgets, found, strict=True):
        if p is None:
            print(f"{format_bytes(budget):>9} is too small for the trunk, the context and one layer's experts")
            continue
        on_card = "" if card is None else f"{min(1, p.vram_experts / total):7.0%} "
        print(
            f"{format_bytes(budget):>9} {min(1, p.slots / total):8.0%} {on_card}{p.hit_rate:6.0%} {format_bytes(p.missed_bytes):>10} "
            f"{p.decode_tps:6.2f}/s {p.prefill_tps:7.1f}/s {p.ttft_seconds:9.1f} s  {p.bound}"
        )
    helps = [(what, times) for what, times in advice(model, machine, budgets[-1], **settings) if times > 1.05]
    print(
        "\nwhat would speed up decoding most: "
        + (", ".join(f"{what} ×{times:.2f}" for what, times in helps) or "none of the changes considered")
    )
    return 0
