"""Every error a user can meet. Each is one line that says what is wrong and what to do; each has an exit code.

Exit codes of the command line: 0 done, 1 output that could not be written, 2 wrong arguments, 3 a checkpoint that cannot be used,
4 a read that failed, 5 not enough memory, 6 a prompt or request that cannot be run, 7 a conversion that could not be done,
130 interrupted (Ctrl-C), 141 the reader of the output went away.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ContextLengthError",
    "ConvertError",
    "ExpertStreamError",
    "ReadError",
    "RequestError",
    "UsageError",
]


class ExpertStreamError(Exception):
    """Base of all errors that are answers, not bugs."""

    exit_code = 1


class UsageError(ExpertStreamError):
    """An option or a setting that cannot be."""

    exit_code = 2


class CheckpointError(ExpertStreamError):
    """A checkpoint that is damaged, incomplete or of a kind that is not supported."""

    exit_code = 3


class ReadError(ExpertStreamError):
    """Expert bytes that could not be read, or are not what the checkpoint says they are."""

    exit_code = 4


class BudgetError(ExpertStreamError):
    """A memory budget below what the model needs."""

    exit_code = 5


class RequestError(ExpertStreamError):
    """A prompt or a request that cannot be run: empty, too long, no chat template."""

    exit_code = 6


class ContextLengthError(RequestError):
    """A prompt longer than the context. tokens: of the prompt. limit: the most that a prompt may have, with room for one more.
    trained: the longest context that the model was trained for."""

    def __init__(self, message: str, tokens: int, limit: int, trained: int) -> None:
        super().__init__(message)
        self.tokens, self.limit, self.trained = tokens, limit, trained


class ConvertError(ExpertStreamError):
    """A conversion that could not go on: no disk space, other settings than it was begun with."""

    exit_code = 7
