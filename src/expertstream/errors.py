"""All errors that a user can encounter. A message is one line that says what is wrong and what to do, in terms of the Python API; the
command line replaces keywords by its options (options.as_options). Each class has an exit code.

Exit codes of the command line: 0 success, 1 output could not be written, 2 invalid arguments, 3 unusable checkpoint, 4 read error,
5 not enough memory, 6 invalid prompt or request, 7 conversion failed, 8 GPU failed or unusable, 130 interrupted (Ctrl-C), 141 the output
was closed by its reader.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ContextLengthError",
    "ConvertError",
    "DeviceError",
    "ExpertStreamError",
    "ReadError",
    "RequestError",
    "UsageError",
]


class ExpertStreamError(Exception):
    """Base class of all errors that are not bugs in this program."""

    exit_code = 1


class UsageError(ExpertStreamError):
    """An invalid option or setting."""

    exit_code = 2


class CheckpointError(ExpertStreamError):
    """A checkpoint that is damaged, incomplete or not supported."""

    exit_code = 3


class ReadError(ExpertStreamError):
    """Expert data that could not be read, or does not match the checkpoint's description."""

    exit_code = 4


class BudgetError(ExpertStreamError):
    """A memory budget below what the model needs."""

    exit_code = 5


class RequestError(ExpertStreamError):
    """A prompt or request that cannot be run: empty, too long, no chat template."""

    exit_code = 6


class ContextLengthError(RequestError):
    """A prompt longer than the context. tokens: its length. limit: the longest prompt that leaves room for one more token.
    trained: the longest context that the model was trained for."""

    def __init__(self, message: str, tokens: int, limit: int, trained: int) -> None:
        super().__init__(message)
        self.tokens, self.limit, self.trained = tokens, limit, trained


class ConvertError(ExpertStreamError):
    """A conversion that failed: no disk space, or settings that differ from those it was started with."""

    exit_code = 7


class DeviceError(ExpertStreamError):
    """A GPU that cannot be used, or that failed."""

    exit_code = 8
