"""Data of the user rather than of a model: folders, disk measurements, the server's key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .files import read_text

__all__ = ["API_KEY", "IoSettings", "api_key", "cache_folder", "config_folder", "data_folder"]

API_KEY = "EXPERTSTREAM_API_KEY"  # the variable with the key that clients must send


@dataclass(frozen=True)
class IoSettings:
    """The best settings for reading a disk. `bench io` measures them once and stores them by device in the user's cache folder."""

    queue_depth: int = 16
    split_bytes: int = 256 << 10
    bytes_per_second: float = 0.0  # 0: not measured

    @staticmethod
    def _file() -> Path:
        return cache_folder() / "io.json"

    @classmethod
    def load(cls, path: Path) -> IoSettings:
        """The stored settings of the disk that holds `path`; the defaults if there are none or they are unreadable."""
        try:
            found = json.loads(read_text(cls._file()))[str(os.stat(path).st_dev)]
            settings = cls(int(found["queue_depth"]), int(found["split_bytes"]), float(found["bytes_per_second"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError, UsageError):
            return cls()
        sound = 1 <= settings.queue_depth <= 1024 and 4096 <= settings.split_bytes <= 1 << 30
        return settings if sound and settings.split_bytes % 4096 == 0 else cls()

    def save(self, path: Path) -> None:
        """Stores the settings for the disk that holds `path`. Raises UsageError."""
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


def cache_folder() -> Path:
    """The folder of what can be made again. Raises UsageError if there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "expertstream"


def config_folder() -> Path:
    """The folder of the user's settings, such as a system prompt. Raises UsageError if there is no home folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or _home() / ".config") / "expertstream"


def data_folder() -> Path:
    """The folder of the user's sessions. Raises UsageError if there is no home folder."""
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "expertstream"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise UsageError("this user has no home folder; set HOME") from None


def api_key() -> str:
    """The key that clients of a server must send, "" if there is none. From the environment, which process lists do not show."""
    return os.environ.get(API_KEY, "").strip()
