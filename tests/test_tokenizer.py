from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstream import CheckpointError, RequestError
from expertstream.engine import embedded_model
from expertstream.text.tokenizer import Detokenizer, Tokenizer

TOKENIZER = Tokenizer(embedded_model())


@given(st.text())
def test_text_comes_back(text: str) -> None:
    import unicodedata

    normal = unicodedata.normalize("NFC", text)  # what the tokenizer's own normalizer does
    ids = TOKENIZER.encode(text).tolist()
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == normal


@settings(max_examples=200)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_pieces_add_up_and_never_split_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text).tolist()
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    whole = "".join(pieces) + detokenizer.flush()
    assert whole == TOKENIZER.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_emoji_wait_until_they_are_whole() -> None:
    ids = TOKENIZER.encode("a 🦊 b").tolist()
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == "a 🦊 b" and "" in pieces


def test_bytes_that_never_make_a_character_come_out_at_the_end() -> None:
    fox = [t for t in TOKENIZER.encode("🦊").tolist()]
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.add(fox[0]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_end_tokens_come_from_every_config() -> None:
    assert TOKENIZER.eos_ids == {0, 2}


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid UTF-8"):
        TOKENIZER.encode("a\udc80b")


def test_the_chat_template_is_applied() -> None:
    prompt = TOKENIZER.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def with_template(tmp_path: Path, template: str) -> Tokenizer:
    folder = Path(shutil.copytree(embedded_model(), tmp_path / "t"))
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_that_fail_or_reach_out_are_refused(tmp_path: Path, template: str) -> None:
    with pytest.raises(RequestError, match="the chat template failed"):
        with_template(tmp_path, template).apply_chat_template([{"role": "user", "content": "x"}])


def test_the_template_may_be_in_the_tokenizer_config(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_model(), tmp_path / "t"))
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages[0].content }}!"}))
    assert Tokenizer(folder).apply_chat_template([{"role": "user", "content": "x"}]) == "x!"


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing tokenizer"):
        Tokenizer(tmp_path)


def test_a_prompt_is_neither_cut_nor_padded(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    folder = Path(shutil.copytree(embedded_model(), tmp_path / "t"))
    raw = Raw.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=20)
    raw.save(str(folder / "tokenizer.json"))
    text = "one two three four five six seven eight"
    assert Tokenizer(folder).encode(text).tolist() == TOKENIZER.encode(text).tolist()
