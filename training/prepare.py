"""Corpus → tokenizer → packed rows. Run: python -m training.prepare CORPUS_DIR OUT_DIR

CORPUS_DIR holds `corpus.jsonl.*.xz`, one document a line: {"c": category, "m": [[role, text], …]}.
OUT_DIR gets tokenizer.json, tokenizer_config.json, chat_template.jinja, train.npy and heldout.npy (rows, uint16).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROW = 1025  # 1,024 inputs and their next tokens
VOCAB = 8192
SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
]  # fmt: skip
# The family's pre-tokenizer: contractions, words with their marks, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def render(doc: dict) -> str:
    """Chat documents in ChatML; a quarter of the stories as plain text, so that raw prompts work too."""
    turns = doc["m"]
    key = turns[0][1]
    if doc["c"] == "story" and digest(key + turns[-1][1]) % 4 == 0:
        return turns[-1][1] + "<|endoftext|>"
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def load(path: Path) -> list[tuple[bool, str]]:
    """Documents of one file as (held out?, text). The split is by prompt, so no prompt is on both sides."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        docs = [json.loads(line) for line in lines]
    return [(digest(d["m"][0][1]) % 200 == 0, render(d)) for d in docs]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(docs: list[list[int]], seed: int) -> np.ndarray:
    """Rows that start at a document; the last document of a row is cut."""
    random.Random(seed).shuffle(docs)
    rows, row = [], []
    for ids in docs:
        row += ids
        if len(row) >= ROW:
            rows.append(np.array(row[:ROW], np.uint16))
            row = []
    return np.stack(rows)


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    files = sorted(source.glob("corpus.jsonl.*.xz"))
    with ProcessPoolExecutor() as pool:
        docs = [doc for part in pool.map(load, files) for doc in part]
    # A document seen twice teaches nothing new.
    docs = list(dict.fromkeys(docs))
    train = [text for held_out, text in docs if not held_out]
    heldout = [text for held_out, text in docs if held_out]
    tokenizer = train_tokenizer(train[::4])
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"},
            indent=1,
        )
    )
    for name, texts, seed in (("train", train, 1), ("heldout", heldout, 2)):
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        rows = pack(ids, seed)
        np.save(out / f"{name}.npy", rows)
        print(f"{name}: {len(texts):,} documents, {sum(map(len, ids)):,} tokens, {len(rows):,} rows", flush=True)


if __name__ == "__main__":
    main()
