"""Text to tokens and back, by the checkpoint's own tokenizer.json and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as _Tokenizer

from .checkpoint.reader import read_json
from .errors import CheckpointError, RequestError
from .ops import I64
from .template import render_template

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer:
    """Raises CheckpointError for a folder without a usable tokenizer."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{path}: missing tokenizer: no tokenizer.json")
        try:
            self._tokenizer = _Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from None
        # Some files carry settings of their training; a prompt is neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path
        self._config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        self.eos_ids = self._eos_ids()

    def _eos_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those of config.json, generation_config.json and the tokenizer's own."""
        ids: set[int] = set()
        for name in ("config.json", "generation_config.json"):
            if (self.path / name).exists():
                config = read_json(self.path / name)
                for holder in (config, config.get("text_config")):
                    value = holder.get("eos_token_id") if isinstance(holder, dict) else None
                    ids |= {v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int)}
        found = self._tokenizer.token_to_id(self._special("eos_token"))
        return frozenset(ids if found is None else {*ids, found})

    def _special(self, name: str) -> str:
        """A token of tokenizer_config.json, which has it as a text or as an object; "" if it has none."""
        token = self._config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    def encode(self, text: str) -> I64:
        """Raises RequestError for text that is not Unicode."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RequestError("the prompt is not valid UTF-8") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def message_starts(self, tokens: I64) -> list[int]:
        """Where messages begin in a prompt of this family's chat templates; none for others."""
        start = self._tokenizer.token_to_id("<|im_start|>")
        return [] if start is None else np.flatnonzero(tokens == start).tolist()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are no whole character as U+FFFD."""
        return self.decode([token], skip_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The messages ({"role", "content"}) as one prompt that asks for an answer. Runs in a sandbox: a template sees what it is
        given and nothing else, and takes no more time and memory than anybody needs. Raises RequestError if there is no template or
        it refuses the messages."""
        values: dict[str, Any] = {"messages": list(messages), "add_generation_prompt": True, "tools": None}
        values |= {name: self._special(name) for name in ("bos_token", "eos_token")} | variables
        template = self._template()
        try:
            return render_template(template, values)
        except Exception as error:  # a template is a program of somebody's, and may fail as any other
            raise RequestError(f"{self.path}: the chat template failed: {error or type(error).__name__}") from None

    def writes_xml_calls(self) -> bool:
        """Whether the template teaches calls as <function=NAME><parameter=KEY>…, not as JSON."""
        try:
            return "<function=" in self._template()
        except RequestError:
            return True

    def _template(self) -> str:
        file = self.path / "chat_template.jinja"
        if file.exists():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str):
            raise RequestError(f"{self.path}: missing chat template; give a raw prompt, without --chat")
        return template


class Detokenizer:
    """Tokens to text piece by piece, never splitting a character: bytes that do not yet make one wait for the next token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._begin, self._end = 0, 0  # _ids[_begin:_end] is shown already and gives the context for what follows

    def add(self, token: int) -> str:
        """The text that this token completes, maybe empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids[self._begin :], self._skip)
        if text.endswith("\ufffd") and len(self._ids) - self._end < 8:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is left at the end, bytes that never made a character as U+FFFD."""
        return (
            self._emit(self._tokenizer.decode(self._ids[self._begin :], self._skip))
            if self._end < len(self._ids)
            else ""
        )

    def _emit(self, text: str) -> str:
        shown = len(self._tokenizer.decode(self._ids[self._begin : self._end], self._skip))
        self._begin, self._end = self._end, len(self._ids)
        return text[shown:]
