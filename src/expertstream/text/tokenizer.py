"""Text to tokens and back, by the checkpoint's own tokenizer.json and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as _Tokenizer

from ..errors import CheckpointError, ContextLengthError, RequestError
from ..files import read_json, read_text
from ..formats.numbers import I64
from .control import ChatPrompt, ControlText
from .family import Family, family_of
from .messages import standard_messages
from .template import render_template

__all__ = ["Detokenizer", "Tokenizer"]

MAX_TEMPLATE = 4 << 20  # bytes
MAX_COUNTED = 1 << 20  # characters of a text that is far too long
PIECE = 32 << 10  # characters that are tokenized together to see how long a text is


class Tokenizer:
    """Raises CheckpointError for a folder without a usable tokenizer."""

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json"
        if not file.exists():
            raise CheckpointError(f"{path}: missing tokenizer: no tokenizer.json")
        try:
            self._tokenizer = _Tokenizer.from_str(read_text(file))
        except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
            if not _is_failure(error):
                raise
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from None
        # Some files carry settings of their training; a prompt is neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.path = path
        self._config = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        self.eos_ids = self._eos_ids()
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._bytes: _TokenBytes | None = None
        self._chat_template: str | None = None
        self._family: Family | None = None

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

    def encode(self, text: str | ChatPrompt, limit: int | None = None) -> I64:
        """(T,) tokens. limit: how many fit; a text that has clearly more is only counted, piece by piece, since tokenizing it whole takes
        some hundred bytes of memory for each of its characters. Raises ContextLengthError for such a text, RequestError for one that is
        not Unicode."""
        parts = text.parts if isinstance(text, ChatPrompt) else (text,)
        for part in parts:
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError("the prompt is not valid UTF-8") from None
        if limit is not None and sum(map(len, parts)) > max(limit, PIECE):
            self._check_length(parts, limit)
        ids: list[int] = []
        for part in parts:
            ids += self._ids(part)
        return np.array(ids, np.int64)

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except BaseException as error:  # the library panics on some texts, and a panic is no Exception
            if _is_failure(error):
                raise RequestError(f"the tokenizer failed on this text: {type(error).__name__}") from None
            raise

    def _check_length(self, parts: Sequence[str], limit: int) -> None:
        count, cuts = self.count(parts)
        if count - 16 * cuts > limit:  # each cut adds a few tokens at most
            raise ContextLengthError(
                f"the prompt has about {count} tokens, but the context has room for {limit}", count, limit, 0
            )

    def count(self, parts: Sequence[str]) -> tuple[int, int]:
        """About how many tokens a text has, counted in pieces, and in how many; of a very long text the rest is extrapolated."""
        count, cuts, seen = 0, 0, 0
        for part in parts:
            for begin in range(0, len(part), PIECE):
                if seen > MAX_COUNTED:
                    return count * sum(map(len, parts)) // seen, cuts
                piece = part[begin : begin + PIECE]
                count += len(self._ids(piece))
                cuts, seen = cuts + 1, seen + len(piece)
        return count, cuts

    def message_starts(self, tokens: I64) -> list[int]:
        """Where messages begin in a prompt; none where the tokenizer has no token for it."""
        start = self._tokenizer.token_to_id(self.family.message_start)
        return [] if start is None else np.flatnonzero(tokens == start).tolist()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token: int) -> str:
        """One token as text; bytes that are no whole character as U+FFFD."""
        return self.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for, which may be a part of a character."""
        if self._bytes is None:
            self._bytes = _TokenBytes(self._tokenizer)
        return self._bytes(token)

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        """The text of chat_prompt()."""
        return self.chat_prompt(messages, **variables).text

    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        parse_control_tokens: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> ChatPrompt:
        """The messages ({"role", "content"}) as one prompt that asks for an answer, brought into the form of text.messages first. Control
        tokens come from the template alone: what looks like one in a message, a tool or another variable is plain text, unless
        `parse_control_tokens`. The template runs in a sandboxed process with limits on time and memory. Raises RequestError if there is no
        template or it refuses the messages."""
        template, family = self._template(), self.family
        given: dict[str, Any] = {"tools": None, **family.variables(dict(template_variables or {})), **variables}
        tokens = () if parse_control_tokens else self.control_tokens(template)
        messages = family.messages(standard_messages(messages))
        control = ControlText(tokens, (messages, given))
        values: dict[str, Any] = {"add_generation_prompt": True}
        values |= {name: self._special(name) for name in ("bos_token", "eos_token")} | control.mark(given)
        values["messages"] = [control.mark_message(message) for message in messages]
        return control.cut(render_template(template, values))

    def content(self, text: str, parse_control_tokens: bool = False) -> ChatPrompt:
        """Text that is not the template's own, as part of a prompt."""
        if parse_control_tokens:
            return ChatPrompt((text,))
        control = ControlText(self.control_tokens(self._template()), text)
        return control.cut(control.mark(text))

    def added_tokens(self) -> list[str]:
        """Texts that the tokenizer always reads as tokens of their own."""
        return [token.content for token in self._added.values() if token.content.strip()]

    def control_tokens(self, template: str = "") -> list[str]:
        """Texts that the tokenizer reads as tokens of their own and that steer a model: special tokens, and those that a template
        writes. Others, such as runs of spaces or HTML tags of some vocabularies, are ordinary text."""
        return [t.content for t in self._added.values() if t.special or (t.content.strip() and t.content in template)]

    @property
    def family(self) -> Family:
        """How models of this chat template write."""
        if self._family is None:
            try:
                template = self._template()
            except RequestError:
                template = ""
            self._family = family_of(template)
        return self._family

    def _template(self) -> str:
        """The chat template, as it was when it was first used. Raises CheckpointError, RequestError."""
        if self._chat_template is None:
            self._chat_template = self._read_template()
        return self._chat_template

    def _read_template(self) -> str:
        file = self.path / "chat_template.jinja"
        if file.exists():
            try:
                return read_text(file, MAX_TEMPLATE)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}") from None
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, str):
            raise RequestError(f"{self.path}: no chat template; give a raw prompt instead of messages")
        return template


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _TokenBytes:
    """Bytes of tokens, by the way in which the tokenizer's decoder spells them."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        self._table: dict[str, int] | None = None
        if decoder is not None and b"ByteLevel" in decoder.__getstate__():
            # GPT-2's table: printable bytes are themselves, the others follow from U+0100 on.
            plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
            others = [b for b in range(256) if b not in plain]
            self._table = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}

    def __call__(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._table is not None:
            return bytes(self._table[char] for char in text) if set(text) <= self._table.keys() else text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):  # SentencePiece's single bytes
            return bytes([int(text[3:5], 16)])
        return text.replace("\u2581", " ").encode()


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
