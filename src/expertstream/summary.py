"""The summary that `expertstream inspect` prints, read from a checkpoint's headers; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint.reader import open_checkpoint
from .config import DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig
from .experts.budget import default_budget
from .experts.store import slot_bytes
from .kv_cache import state_bytes
from .machine import available_bytes, memory_limit_bytes
from .models import config_of, expert_layouts, scratch_bytes, weight_map
from .text.visible import one_line
from .units import format_bytes

__all__ = ["summarize", "summary_text"]


def summarize(path: str | Path) -> dict[str, Any]:
    """Architecture, parameters, bits, bytes, and how much of them fits in this machine's memory. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    config = config_of(checkpoint)
    specs, layouts = weight_map(config), expert_layouts(config, checkpoint)
    trunk_bytes = checkpoint.trunk_bytes(specs)
    trunk_parameters = embedding_bytes = 0
    trunk_formats: dict[str, int] = {}
    for name, spec in specs.items():
        count = 1
        for n in spec.shape:
            count *= n
        trunk_parameters += count
        if spec.kind == "matrix":
            m = checkpoint.matrix_format(name, *spec.shape)
            trunk_formats[str(m)] = trunk_formats.get(str(m), 0) + m.nbytes
            if name == "model.embed_tokens" and not config.tie_word_embeddings:
                embedding_bytes = m.nbytes  # one row of it is read per token
    expert_parameters = [sum(m.rows * m.cols for m in layout.format.matrices) for layout in layouts]
    experts = sum(layout.num_experts for layout in layouts)
    expert_bytes = [layout.bytes_per_expert for layout in layouts]
    routed = config.num_experts_per_tok * sum(expert_bytes)
    formats = {", ".join(dict.fromkeys(map(str, layout.format.matrices[:2]))): None for layout in layouts}
    # What `run` needs with its defaults: everything but the slots, plus one layer's experts.
    settings = EngineConfig.from_options({})
    context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    state = state_bytes(config.states, context, settings.kv_dtype)
    fixed = trunk_bytes + state + scratch_bytes(config, LEAST_CHUNK, context, settings.thread_count)
    slot = max(slot_bytes(layout) for layout in layouts)
    available = available_bytes()
    fit = max(0, min(experts, (default_budget(available) - fixed) // slot))
    return {
        "path": str(path),
        "kind": checkpoint.kind,
        "model_type": checkpoint.config.get("model_type"),
        "layers": config.num_hidden_layers,
        "layer_types": {kind: config.layer_types.count(kind) for kind in dict.fromkeys(config.layer_types)},
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "parameters_total": trunk_parameters
        + sum(layout.num_experts * n for layout, n in zip(layouts, expert_parameters, strict=True)),
        "parameters_active": trunk_parameters + config.num_experts_per_tok * sum(expert_parameters),
        "expert_format": "; ".join(formats),
        "trunk_formats_bytes": trunk_formats,
        "trunk_bytes": trunk_bytes,
        "bytes_per_expert": max(expert_bytes),
        "experts_bytes": sum(layout.num_experts * n for layout, n in zip(layouts, expert_bytes, strict=True)),
        "routed_bytes_per_token": routed,
        "bytes_per_token": routed + trunk_bytes - embedding_bytes,
        "context_tokens": context,
        "context_bytes": state,
        "skipped_tensors": checkpoint.skipped,
        "machine": {
            "memory_limit_bytes": memory_limit_bytes(),
            "memory_available_bytes": available,
            "floor_bytes": fixed + config.num_experts_per_tok * slot,
            "experts_that_fit": fit,
            "share_of_experts_that_fit": fit / experts,
        },
    }


def summary_text(s: dict[str, Any]) -> str:
    """The summary as text."""
    machine, kinds = s["machine"], ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in s["layer_types"].items())
    skipped = ", ".join(f"{n} tensors of {what}" for what, n in s["skipped_tensors"].items())
    trunk = "; ".join(f"{format_bytes(n)} {name}" for name, n in s["trunk_formats_bytes"].items())
    rows = [
        ("checkpoint", f"{s['path']} ({s['kind']})"),
        ("architecture", f"{s['model_type']}, {s['layers']} layers ({kinds}), hidden size {s['hidden_size']}"),
        ("experts", f"{s['num_experts']} per layer, {s['num_experts_per_tok']} used per token"),
        ("parameters", f"{s['parameters_total'] / 1e9:.4g} B total, {s['parameters_active'] / 1e9:.4g} B active"),
        ("expert bits", s["expert_format"]),
        ("trunk", f"{format_bytes(s['trunk_bytes'])} ({trunk})"),
        ("one expert", format_bytes(s["bytes_per_expert"])),
        ("all experts", format_bytes(s["experts_bytes"])),
        (
            "per token",
            f"{format_bytes(s['bytes_per_token'])} read, of which experts {format_bytes(s['routed_bytes_per_token'])}",
        ),
        (
            "context",
            f"{format_bytes(s['context_bytes'])} for {s['context_tokens']:,} tokens; trained for {s['max_position_embeddings']:,}",
        ),
        ("skipped", skipped or "nothing"),
        (
            "this machine",
            f"{format_bytes(machine['memory_available_bytes'])} available of {format_bytes(machine['memory_limit_bytes'])}",
        ),
        (
            "",
            f"needs at least {format_bytes(machine['floor_bytes'])}; {machine['share_of_experts_that_fit']:.0%} of the experts fit",
        ),
    ]
    return "\n".join(f"{name:<13} {one_line(value)}" for name, value in rows)
