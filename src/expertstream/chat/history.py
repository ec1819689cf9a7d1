"""The input history: a file that only its owner can read. Deleting a session also removes its entries."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from stat import S_ISREG

from prompt_toolkit.history import FileHistory

from ..files import private_folder, read_text, write_private

__all__ = ["TypedLines"]


class TypedLines(FileHistory):
    """prompt_toolkit's history file (for each entry a comment, then its lines after a "+"), with the session's name in the comments.
    session: returns the name of the current session. Raises OSError."""

    def __init__(self, path: Path, session: Callable[[], str]) -> None:
        self._path, self._session = path, session
        private_folder(path.parent)
        os.close(self._open())
        super().__init__(str(path))

    def _open(self) -> int:
        """A descriptor for appending, which the caller closes; makes the file private."""
        file = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
        try:
            if not S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(self._path))
            os.fchmod(file, 0o600)
        except BaseException:
            os.close(file)
            raise
        return file

    def store_string(self, string: str) -> None:
        lines = "".join(f"+{line}\n" for line in string.split("\n"))
        text = f"\n# {time.strftime('%Y-%m-%d %H:%M:%S')}\t{self._session()}\n{lines}"
        with os.fdopen(self._open(), "ab") as out:
            out.write(text.encode("utf-8", "replace"))

    def forget(self, session: str, texts: Collection[str]) -> None:
        """Removes the entries of a session, and every entry that equals one of these texts. Raises OSError."""
        kept: list[str] = []
        forgotten = {text.strip() for text in texts}
        for entry in ("\n" + read_text(self._path)).split("\n# "):
            head, _, body = entry.partition("\n")
            typed = "\n".join(line[1:] for line in body.splitlines() if line.startswith("+"))
            if head.partition("\t")[2] == session or typed.strip() in forgotten:
                forgotten.add(typed.strip())
            else:
                kept.append(entry)
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        write_private(temporary, "\n# ".join(kept).rstrip("\n").encode() + b"\n")
        temporary.replace(self._path)
        self._loaded_strings = [text for text in self._loaded_strings if text.strip() not in forgotten]
