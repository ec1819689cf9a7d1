"""Settings of an engine, checked once. The only module that reads environment variables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import read_text
from .machine import usable_processors

__all__ = [
    "API_KEY",
    "EngineConfig",
    "IoSettings",
    "api_key",
    "config_folder",
    "data_folder",
    "format_bytes",
    "parse_bytes",
]

API_KEY = "EXPERTSTREAM_API_KEY"  # what clients of a server must send
_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}

DEFAULT_CONTEXT = 8192  # tokens, unless the model was trained for fewer
LEAST_CHUNK = 64  # tokens of a prompt at a time; every larger chunk is a multiple of it
RESIDENCIES = ("auto", "slots", "os")
READERS = ("auto", "uring", "pread")
POLICIES = ("lru", "lfu", "s3fifo")
KV_DTYPES = ("bf16", "f32", "int8")
VERIFY = ("first", "always", "never")


def parse_bytes(text: str | int) -> int:
    """ "8GiB", "500M", 1024 → bytes. K, M, G, T are powers of 1000; Ki, Mi, Gi, Ti of 1024. Raises UsageError."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if not isinstance(text, str) or len(text) > 40:
        raise UsageError(f"{str(text)[:40]!r} is not a size; write for example 8GiB or 500M")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{text!r} is not a size; write for example 8GiB or 500M")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """Bytes as people read them, in powers of 1024: 1536 → "1.5 KiB"."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if abs(count) < 1024 or unit == "TiB":
            break
    return f"{count:.1f} {unit}" if abs(count) < 100 else f"{count:.0f} {unit}"


@dataclass(frozen=True)
class IoSettings:
    """How a disk is best read. `bench io` measures it once and keeps it in the user's cache folder, by device."""

    queue_depth: int = 16
    split_bytes: int = 256 << 10
    bytes_per_second: float = 0.0  # 0: not measured

    @staticmethod
    def _file() -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "expertstream" / "io.json"

    @classmethod
    def load(cls, path: Path) -> IoSettings:
        """What was kept for the disk that holds `path`; the defaults if nothing was, or if it cannot be read."""
        try:
            found = json.loads(read_text(cls._file()))[str(os.stat(path).st_dev)]
            settings = cls(int(found["queue_depth"]), int(found["split_bytes"]), float(found["bytes_per_second"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UsageError):
            return cls()
        sound = 1 <= settings.queue_depth <= 1024 and 4096 <= settings.split_bytes <= 1 << 30
        return settings if sound and settings.split_bytes % 4096 == 0 else cls()

    def save(self, path: Path) -> None:
        """Keeps it for the disk that holds `path`. Raises UsageError."""
        file = self._file()
        try:
            known = json.loads(read_text(file))
        except (OSError, ValueError, RecursionError):
            known = {}
        known = known if isinstance(known, dict) else {}
        known[str(os.stat(path).st_dev)] = vars(self)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1))
        except OSError as error:
            raise UsageError(f"{file}: cannot be written: {error.strerror}") from None


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run; what is not set is found out from the machine and the checkpoint.

    Of these only `experts_per_token`, `kv_dtype` and `exact` change what is computed, and `beyond_trained_context` what is allowed; the
    rest decides where bytes lie.
    """

    memory_bytes: int | None = None  # trunk + state + slots; None: what is available now
    residency: str = "auto"
    policy: str = "s3fifo"  # docs/cache-policies.md
    reader: str = "auto"
    queue_depth: int = 0  # reads in flight; 0: what `bench io` found for this disk, else 16
    split_bytes: int = 0  # larger reads are cut into pieces of this; 0 likewise, else 256 KiB
    prefetch: int = 6  # experts of the next layer that may be read before its router has spoken
    threads: int = 0  # 0: as many as this process may use
    isa: str = ""  # "": the fastest this machine has
    ops: str = "cpu"
    sequences: int = 1  # texts that may be under way at once, each with a context of its own
    prefix_cache_bytes: int = 0  # of the memory budget, for what was computed of earlier prompts
    context_length: int = 0  # 0: 8,192, or what the model was trained for if that is less
    context_part: int = (
        0  # n, where context_length is 0: what the model was trained for, if 1/n of the memory holds it, or else less
    )
    beyond_trained_context: bool = False  # lossy: context_length may be more than the model was trained for
    exact: bool = False  # 16-bit activations in products with quantized weights, instead of 8-bit ones
    kv_dtype: str = "bf16"
    prefill_chunk: int = 2048
    experts_per_token: int = 0  # 0: as trained. Fewer is lossy.
    verify: str = "first"  # checksums of a pack's records: at the first read of each, at every read, or never

    def __post_init__(self) -> None:
        for name, allowed in (
            ("residency", RESIDENCIES),
            ("policy", POLICIES),
            ("reader", READERS),
            ("kv_dtype", KV_DTYPES),
            ("verify", VERIFY),
            ("ops", ("cpu", "reference")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name, least, most in (
            ("queue_depth", 0, 1024),
            ("split_bytes", 0, 1 << 30),
            ("prefetch", 0, 64),
            ("threads", 0, 1024),
            ("sequences", 1, 256),
            ("prefix_cache_bytes", 0, 1 << 50),
            ("context_part", 0, 1024),
            ("context_length", 0, 1 << 30),
            ("prefill_chunk", 64, 65536),
            ("experts_per_token", 0, 65536),
        ):
            if type(getattr(self, name)) is not int or not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} is a whole number from {least} to {most}, not {getattr(self, name)!r}")
        for name, unit in (("split_bytes", 4096), ("prefill_chunk", 64)):
            if getattr(self, name) % unit:
                raise UsageError(f"{name} is a multiple of {unit}, not {getattr(self, name)}")
        for name in ("exact", "beyond_trained_context"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.memory_bytes is not None and self.memory_bytes <= 0:
            raise UsageError("memory is more than nothing")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Options as given by a caller; what is missing or None comes from EXPERTSTREAM_ISA and EXPERTSTREAM_THREADS, then
        the defaults. `memory` may be a text such as "8GiB"."""
        environ = os.environ if environ is None else environ
        values = {k: v for k, v in options.items() if v is not None}
        if "memory" in values and "memory_bytes" in values:
            raise UsageError("give either memory or memory_bytes")
        if "memory" in values:
            values["memory_bytes"] = parse_bytes(values.pop("memory"))
        if "isa" not in values and environ.get("EXPERTSTREAM_ISA"):
            values["isa"] = environ["EXPERTSTREAM_ISA"]
        if "threads" not in values and environ.get("EXPERTSTREAM_THREADS"):
            text = environ["EXPERTSTREAM_THREADS"]
            if not text.isdecimal() or int(text) == 0:
                raise UsageError(f"EXPERTSTREAM_THREADS is a number of threads, not {text!r}")
            values["threads"] = int(text)
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(
                f"unknown option {unknown[0]!r}; there are {', '.join(cls.__dataclass_fields__)} and memory"
            )
        return cls(**values)

    @property
    def activation_bits(self) -> int:
        return 16 if self.exact else 8

    @property
    def thread_count(self) -> int:
        return self.threads or usable_processors()


def config_folder() -> Path:
    """Where a user keeps settings, such as a system prompt. Raises UsageError where there is no home."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config") / "expertstream"


def data_folder() -> Path:
    """Where a user's sessions are kept. Raises UsageError where there is no home."""
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "expertstream"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise UsageError("this user has no home folder; set HOME") from None


def api_key() -> str:
    """The key that clients of a server must send, from the environment: a process list does not show it. "" if there is none."""
    return os.environ.get(API_KEY, "").strip()
