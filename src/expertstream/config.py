"""Engine settings, validated once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from .errors import UsageError
from .machine import usable_processors
from .units import parse_bytes

__all__ = ["EngineConfig", "EngineOptions"]

DEFAULT_CONTEXT = 8192  # tokens, unless the model was trained for fewer
DEFAULT_CHUNK = 2048
LEAST_CHUNK = 64  # tokens of a prompt in one pass; every larger chunk is a multiple of it
RESIDENCIES = ("auto", "slots", "os")
READERS = ("auto", "uring", "pread")
POLICIES = ("lru", "lfu", "s3fifo")
KV_DTYPES = ("bf16", "f32", "int8")
CPU_EXPERTS = ("auto", "none", "all")
VERIFY = ("first", "always", "never")


class EngineOptions(TypedDict, total=False):
    """The keywords of LLM(): the fields of EngineConfig, and `memory`, a size such as "8GiB"."""

    memory: str | int | None
    memory_bytes: int | None
    residency: str | None
    policy: str | None
    reader: str | None
    queue_depth: int | None
    split_bytes: int | None
    prefetch: int | None
    threads: int | None
    isa: str | None
    ops: str | None
    device: str | None
    vram: str | int | None
    vram_bytes: int | None
    cpu_experts: str | None
    sequences: int | None
    prefix_cache_bytes: int | None
    context_length: int | None
    context_memory_fraction: float | None
    beyond_trained_context: bool | None
    exact: bool | None
    kv_dtype: str | None
    prefill_chunk: int | None
    experts_per_token: int | None
    verify: str | None


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run. Settings that are not given are derived from the machine and the checkpoint.

    Only `experts_per_token`, `kv_dtype` and `exact` change the results, and `beyond_trained_context` what is allowed; the rest
    affects only memory and speed.
    """

    memory_bytes: int | None = None  # trunk + state + slots; None: what is available now
    residency: str = "auto"
    policy: str = "s3fifo"  # docs/cache-policies.md
    reader: str = "auto"
    queue_depth: int = 0  # reads in flight; 0: the value that `bench io` saved for this disk, else 16
    split_bytes: int = 0  # larger reads are split into pieces of this size; 0: likewise, else 256 KiB
    prefetch: int = 6  # experts of the next layer that may be read before its router has run
    threads: int = 0  # 0: as many as this process may use
    isa: str = ""  # "": the fastest that this machine supports
    ops: str = "cpu"
    device: str = "auto"  # cpu, cuda, cuda:N; auto: the first GPU if there is one and the extra is installed
    vram_bytes: int | None = (
        None  # of the GPU's memory, for trunk, context and experts; None: what is free, less a margin
    )
    # Who computes experts that are in the host's memory while a GPU decodes: the CPU all of them (all), the GPU (none), or both, as fast
    # as they are (auto).
    cpu_experts: str = "auto"
    sequences: int = 1  # sequences that may run at the same time, each with its own context
    prefix_cache_bytes: int = 0  # part of the memory budget, for cached prompt states
    context_length: int = 0  # 0: 8,192, or the context that the model was trained for if that is shorter
    context_memory_fraction: float = 0  # with context_length 0: the trained context, in at most this part of memory
    beyond_trained_context: bool = False  # lossy: context_length may exceed what the model was trained for
    exact: bool = False  # 16-bit activations in products with quantized weights, instead of 8-bit ones
    kv_dtype: str = "bf16"
    prefill_chunk: int = (
        0  # tokens of a prompt in one pass, at most; 0: 2,048, or more where a GPU holds a part of the experts
    )
    experts_per_token: int = 0  # 0: as trained. Fewer is lossy.
    verify: str = "first"  # when to verify the checksum of a pack's record: at its first read, at every read, or never

    def __post_init__(self) -> None:
        for name, allowed in (
            ("residency", RESIDENCIES),
            ("policy", POLICIES),
            ("reader", READERS),
            ("kv_dtype", KV_DTYPES),
            ("verify", VERIFY),
            ("ops", ("cpu", "reference")),
            ("cpu_experts", CPU_EXPERTS),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name, least, most in (
            ("queue_depth", 0, 1024),
            ("split_bytes", 0, 1 << 30),
            ("prefetch", 0, 64),
            ("threads", 0, 1024),
            ("sequences", 1, 256),
            ("prefix_cache_bytes", 0, 1 << 50),
            ("context_length", 0, 1 << 30),
            ("prefill_chunk", 0, 65536),
            ("experts_per_token", 0, 65536),
        ):
            if type(getattr(self, name)) is not int or not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} must be an integer from {least} to {most}; got {getattr(self, name)!r}")
        fraction = self.context_memory_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise UsageError(f"context_memory_fraction must be a number from 0 to 1; got {fraction!r}")
        for name, unit in (("split_bytes", 4096), ("prefill_chunk", 64)):
            if getattr(self, name) % unit:
                raise UsageError(f"{name} must be a multiple of {unit}; got {getattr(self, name)}")
        for name in ("exact", "beyond_trained_context"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} must be True or False; got {getattr(self, name)!r}")
        for name in ("memory", "vram"):
            size = getattr(self, f"{name}_bytes")
            if size is not None and size <= 0:
                raise UsageError(f"{name} must be greater than 0; got {size}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", self.device):
            raise UsageError(f"device must be auto, cpu, cuda or cuda:N; got {self.device!r}")
        if self.device.startswith("cuda") and self.ops != "cpu":
            raise UsageError(f"ops must be cpu where device is {self.device}; got {self.ops!r}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> EngineConfig:
        """A config from a caller's options; those missing or None come from EXPERTSTREAM_DEVICE, EXPERTSTREAM_ISA and
        EXPERTSTREAM_THREADS, then the defaults. `memory` and `vram` may be strings such as "8GiB"."""
        environ = os.environ if environ is None else environ
        values = {k: v for k, v in options.items() if v is not None}
        for name in ("memory", "vram"):
            if name in values and f"{name}_bytes" in values:
                raise UsageError(f"give either {name} or {name}_bytes, not both")
            if name in values:
                values[f"{name}_bytes"] = parse_bytes(values.pop(name))
        if "device" not in values and environ.get("EXPERTSTREAM_DEVICE"):
            values["device"] = environ["EXPERTSTREAM_DEVICE"]
        if "isa" not in values and environ.get("EXPERTSTREAM_ISA"):
            values["isa"] = environ["EXPERTSTREAM_ISA"]
        if "threads" not in values and environ.get("EXPERTSTREAM_THREADS"):
            text = environ["EXPERTSTREAM_THREADS"]
            if not text.isdecimal() or int(text) == 0:
                raise UsageError(f"EXPERTSTREAM_THREADS must be a whole number greater than 0; got {text!r}")
            values["threads"] = int(text)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(
                f"unknown option {unknown[0]!r}; the options are {', '.join(cls.__dataclass_fields__)}, memory and vram"
            )
        return cls(**values)

    @property
    def activation_bits(self) -> int:
        return 16 if self.exact else 8

    @property
    def thread_count(self) -> int:
        return self.threads or usable_processors()
