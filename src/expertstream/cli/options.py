"""The engine's options on the command line, shared by run, chat and serve."""

from __future__ import annotations

import re
from typing import Any

from ..config import CPU_EXPERTS, KV_DTYPES, POLICIES, READERS, RESIDENCIES, VERIFY

__all__ = ["ENGINE_OPTIONS", "SAMPLING_OPTIONS", "add_engine_options", "as_options"]

# As argparse names them; EngineConfig.from_options() takes them.
ENGINE_OPTIONS = (
    "memory", "device", "vram", "cpu_experts", "residency", "policy", "reader", "queue_depth", "prefetch", "threads", "isa",
    "context_length", "verify", "exact", "kv_dtype", "experts_per_token", "beyond_trained_context",
)  # fmt: skip


# As SamplingParams.from_options() takes them.
SAMPLING_OPTIONS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logprobs", "stop",
)  # fmt: skip

_KEYWORD = re.compile(r"\b([a-z_]+)=([\w.]+)|^([a-z_]+)(?= must )")
_FLAGS = {name: f"--{name.replace('_', '-')}" for name in (*ENGINE_OPTIONS, *SAMPLING_OPTIONS, "bits")} | {
    "context_length": "--context"
}


def as_options(message: str) -> str:
    """Replaces keywords of the Python API in an error message (memory=8GiB, "memory must") by command-line options (--memory 8GiB)."""

    def option(match: re.Match[str]) -> str:
        flag = _FLAGS.get(match[1] or match[3])
        return match[0] if flag is None else flag if match[2] in (None, "True") else f"{flag} {match[2]}"

    return _KEYWORD.sub(option, message)


def add_engine_options(parser: Any) -> None:
    """Adds the engine's options to a command's parser, in two groups."""
    memory = parser.add_argument_group("memory and reading (these change speed, never the output)")
    memory.add_argument(
        "--memory",
        metavar="SIZE",
        help="budget for trunk, context and experts, such as 8GiB, without the interpreter (available memory less a reserve)",
    )
    memory.add_argument(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:N (the first NVIDIA GPU if there is one, else the CPU); same output",
    )
    memory.add_argument(
        "--vram",
        metavar="SIZE",
        help="budget of the GPU's memory for trunk, context and experts (what is free, less a reserve)",
    )
    memory.add_argument(
        "--cpu-experts",
        choices=CPU_EXPERTS,
        help="with a GPU, which of the experts in the host's memory the CPU computes while decoding (auto: as many as is fastest)",
    )
    memory.add_argument(
        "--residency", choices=RESIDENCIES, help="cache experts in the engine's own slots or in the page cache (auto)"
    )
    memory.add_argument("--policy", choices=POLICIES, help="eviction policy of the expert cache (s3fifo)")
    memory.add_argument("--reader", choices=READERS, help="how experts are read (auto: io_uring if available)")
    memory.add_argument("--queue-depth", type=int, metavar="N", help="reads in flight (16)")
    memory.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="experts of the next layer to read ahead where predictions are accurate (6; 0: none)",
    )
    memory.add_argument("--threads", type=int, metavar="N", help="compute threads (one per available processor)")
    memory.add_argument(
        "--isa", metavar="NAME", help="scalar, avx2, avx2_vnni, avx512_vnni, neon or neon_dot (the fastest supported)"
    )
    memory.add_argument(
        "--context",
        dest="context_length",
        type=int,
        metavar="N",
        help="tokens of prompt and answer (8192; in serve and chat, as many as fit in memory)",
    )
    memory.add_argument(
        "--verify", choices=VERIFY, help="check a record's checksum at its first read, always, or never (first)"
    )
    values = parser.add_argument_group("precision (these change the output; lossy options are named in the footer)")
    values.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="16-bit activations instead of 8-bit ones: within about 1e-4 of float32; long prompts take twice as long",
    )
    values.add_argument(
        "--beyond-trained-context",
        action="store_true",
        default=None,
        help="lossy: allow a --context longer than the model was trained for",
    )
    values.add_argument("--kv-dtype", choices=KV_DTYPES, help="keys and values in memory (bf16; int8 is lossy)")
    values.add_argument(
        "--experts-per-token", type=int, metavar="N", help="lossy: use fewer experts than the model was trained with"
    )
