"""Teaches a trained model the tokens that training seldom met. Run: python -m training.finish DATA MODEL OUT

On a CPU, twenty minutes on two cores. DATA has prepare.py's train.npy, by which a token is seldom. Only the embeddings of such tokens
change (they are the output's rows too), on conversations of tools.py that are made of such words, and on what training had.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from .chat import segments
from .model import Model
from .prepare import READ_ONLY
from .tokenizer import words_of
from .tools import conversation
from .values import use_vocabulary

SEED = 20261125
SELDOM = 0.5  # times in a million tokens, or less: above that, copying is as good as that of any word
ROWS, LENGTH, KNOWN = 8, 512, 3  # so many rows a step, and of them so many of the training's
SHORT = 330  # tokens of a conversation at most: more calls for what is read


def conversations(r: random.Random, tokenizer: Tokenizer, number: int) -> Tensor:
    """(number, LENGTH + 1) token ids, the top bit where a token is only read."""
    rows = []
    for _ in range(number):
        row: list[int] = []
        while len(row) <= LENGTH:
            pieces = [
                (tokenizer.encode(text, add_special_tokens=False).ids, learned)
                for text, learned in segments(conversation(r))
            ]
            if sum(len(ids) for ids, _ in pieces) < SHORT:
                for ids, learned in pieces:
                    row += ids if learned else [i | READ_ONLY for i in ids]
        rows.append(row[: LENGTH + 1])
    return torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rate", type=float, default=0.02, help="of Adam, at the start; 0 at the end")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    corpus = np.load(args.data / "train.npy")
    counts = np.bincount((corpus & (READ_ONLY - 1)).ravel(), minlength=tokenizer.get_vocab_size())
    vocab = tokenizer.get_vocab()
    words = [w for w in words_of(tokenizer) if counts[vocab[w]] * 1_000_000 < SELDOM * corpus.size]
    if not words:
        raise SystemExit(f"{args.model} has met all its tokens: there is nothing to finish")
    print(f"{len(words):,} words are seldom without their space: {' '.join(words[:12])} …", flush=True)
    state = load_file(args.model / "model.safetensors")
    model = Model(json.loads((args.model / "config.json").read_text()))
    model.load_state_dict({k: v.float() for k, v in state.items()})
    model.requires_grad_(False)
    embedding = model.model.embed_tokens.weight.requires_grad_(True)
    changing = torch.zeros(len(embedding), 1)
    changing[[vocab[w] for w in words]] = 1
    embedding.register_hook(lambda gradient: gradient * changing)
    optimizer = torch.optim.Adam([embedding], lr=args.rate, betas=(0.9, 0.95))
    r = random.Random(SEED)
    use_vocabulary(["_".join(r.sample(words, r.randint(1, 4))) for _ in range(20_000)])
    begin, losses = time.monotonic(), []
    while (done := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, (len(losses) + 1) / 10) * (1 - done)
        # What training had says where such words do not stand.
        known = torch.from_numpy(corpus[r.sample(range(len(corpus)), KNOWN), : LENGTH + 1].astype(np.int64))
        rows = torch.cat([conversations(r, tokenizer, ROWS - KNOWN), known])
        ids = rows & (READ_ONLY - 1)
        hidden, _, _ = model(ids[:, :-1])
        targets = torch.where(rows[:, 1:] < READ_ONLY, ids[:, 1:], -100)
        learned = targets >= 0
        loss = cross_entropy(hidden[learned].float() @ embedding.T, targets[learned])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % 10 == 0:
            print(f"{len(losses)} steps, {done:.0%}: loss {np.mean(losses[-10:]):.4f}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(args.model / name, args.out / name)
    key = "model.embed_tokens.weight"
    state[key] = torch.where(changing.bool(), embedding.detach(), state[key].float()).to(torch.bfloat16)
    save_file(state, args.out / "model.safetensors", metadata={"format": "pt"})
    record = {"seed": SEED, "words": len(words), "rate": args.rate, "steps": len(losses), "losses": losses[::10]}
    (args.out / "finish.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
