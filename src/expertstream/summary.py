"""What `expertstream inspect` says about a checkpoint: read from headers, nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint.reader import open_checkpoint
from .config import DEFAULT_CONTEXT, LEAST_CHUNK, EngineConfig, format_bytes
from .experts.budget import default_budget
from .experts.store import slot_bytes
from .kv_cache import state_bytes
from .machine import available_bytes, memory_limit_bytes
from .models import find_model
from .ops import MatrixFormat
from .visible import one_line

__all__ = ["summarize", "summary_text"]


def summarize(path: str | Path) -> dict[str, Any]:
    """Architecture, parameters, bits and bytes, and what of it fits this machine. Raises CheckpointError."""
    checkpoint = open_checkpoint(path)
    module = find_model(checkpoint.config, str(path))
    config = module.Config.from_json(checkpoint.config, str(path))
    specs, layouts = module.weight_map(config), module.expert_layouts(config, checkpoint)
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
            trunk_formats[_format_name(m)] = trunk_formats.get(_format_name(m), 0) + m.nbytes
            if name == "model.embed_tokens" and not config.tie_word_embeddings:
                embedding_bytes = m.nbytes  # one row of it is read a token
    format = layouts[0].format
    expert_parameters = sum(m.rows * m.cols for m in format.matrices)
    experts = config.num_hidden_layers * config.num_experts
    bytes_per_expert = layouts[0].bytes_per_expert
    routed = config.num_hidden_layers * config.num_experts_per_tok * bytes_per_expert
    # What `run` would need with its defaults: everything but the slots, and one layer's experts.
    settings = EngineConfig.from_options({})
    context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    state = state_bytes(config.states, context, settings.kv_dtype)
    fixed = trunk_bytes + state + config.scratch_bytes(LEAST_CHUNK, context, settings.thread_count)
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
        "parameters_total": trunk_parameters + experts * expert_parameters,
        "parameters_active": trunk_parameters
        + config.num_hidden_layers * config.num_experts_per_tok * expert_parameters,
        "expert_format": _format_name(format.gate)
        if format.gate == format.up
        else f"{_format_name(format.gate)}, {_format_name(format.up)}",
        "trunk_formats_bytes": trunk_formats,
        "trunk_bytes": trunk_bytes,
        "bytes_per_expert": bytes_per_expert,
        "experts_bytes": experts * bytes_per_expert,
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


def _format_name(m: MatrixFormat) -> str:
    return f"{m.bits}-bit affine, groups of {m.group_size}, {m.dtype} scales" if m.quantized else m.dtype


def summary_text(s: dict[str, Any]) -> str:
    """The summary for a person."""
    machine, kinds = s["machine"], ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in s["layer_types"].items())
    skipped = ", ".join(f"{n} tensors of {what}" for what, n in s["skipped_tensors"].items())
    trunk = "; ".join(f"{format_bytes(n)} {name}" for name, n in s["trunk_formats_bytes"].items())
    rows = [
        ("checkpoint", f"{s['path']} ({s['kind']})"),
        ("architecture", f"{s['model_type']}, {s['layers']} layers ({kinds}), hidden size {s['hidden_size']}"),
        ("experts", f"{s['num_experts']} a layer, {s['num_experts_per_tok']} used a token"),
        ("parameters", f"{s['parameters_total'] / 1e9:.4g} B total, {s['parameters_active'] / 1e9:.4g} B active"),
        ("expert bits", s["expert_format"]),
        ("trunk", f"{format_bytes(s['trunk_bytes'])} ({trunk})"),
        ("one expert", format_bytes(s["bytes_per_expert"])),
        ("all experts", format_bytes(s["experts_bytes"])),
        (
            "read a token",
            f"{format_bytes(s['bytes_per_token'])}, of which experts {format_bytes(s['routed_bytes_per_token'])}",
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
            f"at least {format_bytes(machine['floor_bytes'])} are needed; {machine['share_of_experts_that_fit']:.0%} of the experts fit",
        ),
    ]
    return "\n".join(f"{name:<13} {one_line(value)}" for name, value in rows)
