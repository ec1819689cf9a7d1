"""Corpus → tokenizer → packed rows. Run: python -m training.prepare OUT --teacher DIR --chitchat dataset.json

--teacher has `corpus.jsonl.*.xz` (training/generate.py); what is made from templates is made here. OUT gets the tokenizer's
files, train.npy and heldout.npy (rows of 1,025 tokens, uint16; the top bit says "read, not learned"), heldout.jsonl.xz
(documents) and counts.json. The split is by prompt: no prompt of the teacher's is on both sides.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import os
import random
import shutil
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from . import dialogue, questions, stories, tools
from .chat import Document, segments
from .generate import clean
from .tokenizer import train_tokenizer, words_of
from .values import use_vocabulary

__all__ = ["READ_ONLY", "digest", "load_teacher", "made"]

ROW = 1025  # 1,024 inputs and their next tokens
READ_ONLY = 0x8000
HELD_OUT = 200  # one in so many prompts
MAKERS = {"tools": tools.conversation, "story": stories.asked, "text": stories.plain, "questions": questions.ask}
# Documents made from templates, for the whole corpus.
AMOUNTS = {"tools": 420_000, "story": 120_000, "text": 40_000, "questions": 380_000}
UNIT = 2_000


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def load_teacher(path: Path) -> list[tuple[bool, Document]]:
    """Documents of one file, cleaned, as (held out?, document); a quarter of the stories as text, to be continued."""
    found = []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            raw = json.loads(line)
            turns = clean(raw["c"], raw["m"])
            if not turns:
                continue
            key = digest(turns[0][1] + turns[-1][1])
            held_out = digest(turns[0][1]) % HELD_OUT == 0
            if raw["c"] == "story" and key % 4 == 0:
                found.append((held_out, {"c": "text", "m": [{"role": "text", "content": turns[-1][1]}]}))
                continue
            messages = [{"role": role, "content": text} for role, text in turns]
            found.append((held_out, {"c": raw["c"], "m": messages, "think": key % 12 == 1}))
    return found


def made(unit: tuple[str, str, int]) -> list[Document]:
    """(category, seed, number) → documents."""
    category, seed, number = unit
    r = random.Random(f"{category} {seed}")
    return [MAKERS[category](r) for _ in range(number)]


@cache
def _tokenizer(file: str) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores already
    tokenizer = Tokenizer.from_file(file)
    use_vocabulary(words_of(tokenizer))
    return tokenizer


def encode(tokenizer_file: str, job: list[Document] | tuple[str, str, int]) -> list[np.ndarray]:
    """Documents, or a unit that is made here, as arrays of tokens."""
    _tokenizer(tokenizer_file)  # what is made has its words
    docs = made(job) if isinstance(job, tuple) else job
    pieces = [segments(doc) for doc in docs]
    ids = iter(
        _tokenizer(tokenizer_file).encode_batch(
            [text for piece in pieces for text, _ in piece], add_special_tokens=False
        )
    )
    return [
        np.concatenate([np.array(next(ids).ids, np.uint16) | (0 if learned else READ_ONLY) for _, learned in piece])
        for piece in pieces
    ]


def pack(docs: list[np.ndarray], seed: int) -> np.ndarray:
    """Rows that start at a document; the last document of a row is cut."""
    random.Random(seed).shuffle(docs)
    rows, row, length = [], [], 0
    for ids in docs:
        row.append(ids)
        length += len(ids)
        if length >= ROW:
            rows.append(np.concatenate(row)[:ROW])
            row, length = [], 0
    return np.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--chitchat", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to use instead of training one")
    parser.add_argument("--scale", type=float, default=1.0, help="of the template documents, for trials")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        found = [d for part in pool.map(load_teacher, sorted(args.teacher.glob("corpus.jsonl.*.xz"))) for d in part]
        unique = {digest(d["m"][-1]["content"]): (held, d) for held, d in found}.values()
        talk = dialogue.load(args.chitchat)
        train = [d for held, d in unique if not held] + talk[60:] * 2
        heldout = [d for held, d in unique if held] + talk[:60]
        if args.tokenizer:
            tokenizer = Tokenizer.from_file(str(args.tokenizer))
        else:
            sample = random.Random(1).sample(train, min(len(train), 120_000))
            sample += [d for c, n in AMOUNTS.items() for d in made((c, "tokenizer", min(n, 12_000)))]
            # What an answer says counts; the schemas that are only read would fill the vocabulary with JSON.
            tokenizer = train_tokenizer(
                "".join(t for t, learned in segments(d) if learned or i % 8 == 0) for i, d in enumerate(sample)
            )
        tokenizer.save(str(out / "tokenizer.json"))
        print(f"tokenizer: {tokenizer.get_vocab_size()} tokens", flush=True)
        shutil.copy(Path(__file__).parent / "chat_template.jinja", out)
        settings = {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        _tokenizer(str(out / "tokenizer.json"))  # held-out documents are made of the same words as the others
        for category, number in AMOUNTS.items():
            heldout += made((category, "heldout", number // 1000))
        with lzma.open(out / "heldout.jsonl.xz", "wt", encoding="utf-8") as file:
            random.Random(3).shuffle(heldout)
            file.writelines(json.dumps(d) + "\n" for d in heldout)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for name, docs, seed in (("heldout", heldout, 2), ("train", train, 1)):
            jobs: list[list[Document] | tuple[str, str, int]] = [docs[i : i + UNIT] for i in range(0, len(docs), UNIT)]
            labels = [Counter(d["c"] for d in job) for job in jobs]
            if name == "train":
                for category, number in AMOUNTS.items():
                    units = [(category, f"unit {i}", UNIT) for i in range(int(number * args.scale / UNIT))]
                    jobs += units
                    labels += [Counter({f"made {category}": UNIT}) for _ in units]
            ids: list[np.ndarray] = []
            for label, part in zip(labels, pool.map(partial(encode, str(out / "tokenizer.json")), jobs), strict=True):
                ids += part
                counts[name].update(label)
                counts[name]["tokens"] += sum(map(len, part))
                counts[name]["learned tokens"] += int(sum((p < READ_ONLY).sum() for p in part))
            rows = pack(ids, seed)
            np.save(out / f"{name}.npy", rows)
            print(f"{name}: {dict(counts[name])}, {len(rows):,} rows", flush=True)
    (out / "counts.json").write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
