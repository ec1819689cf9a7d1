"""The engine's options on the command line, which run, chat and serve share."""

from __future__ import annotations

from typing import Any

from .config import KV_DTYPES, POLICIES, READERS, RESIDENCIES, VERIFY

__all__ = ["ENGINE_OPTIONS", "add_engine_options"]

# As argparse names them; EngineConfig.from_options() takes them.
ENGINE_OPTIONS = (
    "memory", "residency", "policy", "reader", "queue_depth", "prefetch", "threads", "isa", "context_length", "verify", "exact", "kv_dtype",
    "experts_per_token", "beyond_trained_context",
)  # fmt: skip


def add_engine_options(parser: Any) -> None:
    """Adds them to a command's parser, in two groups."""
    memory = parser.add_argument_group("memory and reading (these change speed, never the text)")
    memory.add_argument(
        "--memory",
        metavar="SIZE",
        help="budget for trunk, context and experts, such as 8GiB; the interpreter comes on top (what is available, less a reserve)",
    )
    memory.add_argument(
        "--residency", choices=RESIDENCIES, help="who keeps experts: our slots, or the page cache (auto)"
    )
    memory.add_argument("--policy", choices=POLICIES, help="which expert makes room (s3fifo)")
    memory.add_argument("--reader", choices=READERS, help="how experts are read (auto: io_uring if it can be used)")
    memory.add_argument("--queue-depth", type=int, metavar="N", help="reads in flight (16)")
    memory.add_argument(
        "--prefetch",
        type=int,
        metavar="N",
        help="experts of the next layer to read ahead where guesses prove right (6; 0: none)",
    )
    memory.add_argument("--threads", type=int, metavar="N", help="threads that compute (as many as the processor has)")
    memory.add_argument(
        "--isa", metavar="NAME", help="scalar, avx2, avx2_vnni, avx512_vnni, neon or neon_dot (the fastest there is)"
    )
    memory.add_argument(
        "--context",
        dest="context_length",
        type=int,
        metavar="N",
        help="tokens of prompt and answer (8192; in serve and chat as many as memory holds)",
    )
    memory.add_argument(
        "--verify", choices=VERIFY, help="check a record's checksum at its first read, always, or never (first)"
    )
    values = parser.add_argument_group("precision (these change the text; what is lossy is said in the footer)")
    values.add_argument(
        "--exact",
        action="store_true",
        default=None,
        help="16-bit activations instead of 8-bit ones: float32's result but for about 1e-4; a long prompt takes twice the time",
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
