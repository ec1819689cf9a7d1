"""What the embedded model can do, by this project's own engine. Run: python -m training.evaluate MODEL HELDOUT [--json FILE]

HELDOUT is heldout.jsonl.xz of training/prepare.py. Perplexity of what the assistant says, by kind of document; tool calls on
functions and wordings that training never saw, decoded freely (greedy), that parse, match the schema, and are right; stories'
loops and distinct n-grams; answers to 100 simple questions.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from expertstream import LLM

from .chat import Document, segments
from .generate import loops
from .unseen import QUESTIONS, STORY_OPENINGS, STORY_THEMES, TOOLS

__all__ = ["heldout", "parse_calls", "perplexity"]


def heldout(path: Path) -> list[Document]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def perplexity(llm: LLM, docs: list[Document]) -> dict[str, float]:
    """Of the learned pieces, each document in a context of its own: by category, and "all"."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for doc in docs:
        pieces = segments(doc)
        ids = [llm.tokenizer.encode(text) for text, _ in pieces]
        tokens = np.concatenate(ids)
        learned = np.concatenate([np.full(len(i), said) for i, (_, said) in zip(ids, pieces, strict=True)])[1:]
        logits = llm.model(tokens[:-1], llm.session().cache, all_logits=True, prompt=True).astype(np.float64)
        peak = logits.max(-1)
        nll = (
            peak
            + np.log(np.exp(logits - peak[:, None]).sum(-1))
            - np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]
        )
        for key in (doc["c"], "all"):
            sums[key][0] += float(nll[learned].sum())
            sums[key][1] += float(learned.sum())
    return {key: math.exp(total / count) for key, (total, count) in sorted(sums.items())}


def answer(llm: LLM, messages: list[Document], tools: list[Any] | None = None, **given: Any) -> str:
    """With its control tokens, which a tool call is written in."""
    prompt = llm.tokenizer.apply_chat_template(messages, tools=tools)
    tokens = [piece.token for piece in llm.generate(prompt, **given)]
    return llm.tokenizer.decode([t for t in tokens if t not in llm.tokenizer.eos_ids], skip_special_tokens=False)


_CALL = re.compile(
    r"<tool_call>\n<function=([^>\n]+)>\n((?:<parameter=[^>\n]+>\n(?:(?!</?tool_call>).)*?\n</parameter>\n)*)</function>\n</tool_call>",
    re.S,
)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.S)


def parse_calls(text: str) -> list[tuple[str, dict[str, str]]] | None:
    """The calls of an answer; None if what is there is not one whole call after another."""
    calls = [(m[1], dict(_PARAMETER.findall(m[2]))) for m in _CALL.finditer(text)]
    rest = _CALL.sub("", text)
    return None if "<tool_call>" in rest or "</tool_call>" in rest or "<function=" in rest else calls


def _fits(value: str, schema: dict[str, Any]) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "integer":
        return re.fullmatch(r"-?\d+", value) is not None
    if schema["type"] == "number":
        return re.fullmatch(r"-?\d+(\.\d+)?", value) is not None
    return value in ("true", "false") if schema["type"] == "boolean" else value != ""


def tool_prompts() -> Iterator[tuple[list[Any], str, str, dict[str, Any]]]:
    """(schemas, request, function, values that are in the request); two functions to choose from."""
    for i, tool in enumerate(TOOLS):
        for j, values in enumerate(tool.values):
            for wording in tool.wordings:
                other = TOOLS[(i + 3 + 5 * j) % len(TOOLS)]
                offered = [tool.schema(), other.schema()] if (i + j) % 2 else [other.schema(), tool.schema()]
                told = {k: v for k, v in values.items() if "{" + k + "}" in wording or isinstance(v, bool)}
                yield offered, wording.format(**values), tool.name, told


def evaluate_tools(llm: LLM) -> dict[str, Any]:
    """Shares of the prompts: a call that parses; with the right function, every required parameter and only values that the schema
    allows; and with the values that the request names."""
    parsed = matched = right = total = 0
    wrong = []
    for offered, request, name, told in tool_prompts():
        total += 1
        # Without the model's repetition penalty, which would be one for the names that a call has to repeat.
        greedy = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 160}
        text = answer(llm, [{"role": "user", "content": request}], offered, **greedy)
        calls = parse_calls(text)
        if not calls:
            wrong.append([request, text])
            continue
        parsed += 1
        schemas = {s["function"]["name"]: s["function"]["parameters"] for s in offered}
        called, arguments = calls[0]
        schema = schemas.get(called)
        valid = (
            schema is not None
            and set(schema["required"]) <= arguments.keys() <= schema["properties"].keys()
            and all(_fits(value, schema["properties"][key]) for key, value in arguments.items())
        )
        matched += valid
        same = {k: json.dumps(v) if isinstance(v, bool) else str(v) for k, v in told.items()}
        if valid and called == name and all(arguments.get(k, "").lower() == v.lower() for k, v in same.items()):
            right += 1
        else:
            wrong.append([request, text])
    return {
        "prompts": total,
        "parsed": parsed / total,
        "matches_schema": matched / total,
        "right": right / total,
        "wrong": wrong,
    }


def evaluate_stories(llm: LLM) -> dict[str, float]:
    texts, ended = [], 0
    for i, (opening, theme) in enumerate((o, t) for o in STORY_OPENINGS for t in STORY_THEMES):
        prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": opening.format(theme)}])
        pieces = list(llm.generate(prompt, seed=i, max_tokens=300))
        texts.append("".join(p.text for p in pieces))
        ended += pieces[-1].finish_reason == "stop"
    grams: dict[int, list[tuple[str, ...]]] = {1: [], 2: [], 3: []}
    for text in texts:
        words = re.findall(r"[a-z']+", text.lower())
        for n, found in grams.items():
            found += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return {
        "prompts": len(texts),
        "loops": sum(map(loops, texts)) / len(texts),
        "ends_by_itself": ended / len(texts),
        "words": sum(len(t.split()) for t in texts) / len(texts),
        **{f"distinct_{n}": len(set(found)) / len(found) for n, found in grams.items()},
    }


def evaluate_questions(llm: LLM) -> dict[str, Any]:
    wrong = []
    for question, accepted in QUESTIONS:
        text = answer(
            llm, [{"role": "user", "content": question}], temperature=0.0, repetition_penalty=1.0, max_tokens=60
        )
        if not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in accepted):
            wrong.append([question, text])
    return {"questions": len(QUESTIONS), "right": 1 - len(wrong) / len(QUESTIONS), "wrong": wrong}


# Continued as text, and answered as a chat, with the model's own sampling and seed 1: what the model card shows, unedited.
SAMPLE_TEXTS = ("Once upon a time", "The old lighthouse")
SAMPLE_CHATS = (
    ("Tell me a short story about a rabbit.",), ("What is the capital of France?",), ("Why is the sky blue?",), ("What is 7 plus 5?",),
    ("How do I make tea?",), ("My name is Greta.", "What is my name?"), ("I am sad because my dog is sick.",), ("Who are you?",),
)  # fmt: skip


def samples(llm: LLM) -> str:
    lines = []
    for text in SAMPLE_TEXTS:
        written = "".join(piece.text for piece in llm.generate(text, seed=1, max_tokens=200))
        lines.append(f"> **{text}**{written}")
    for turns in SAMPLE_CHATS:
        messages: list[Document] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            said = answer(llm, messages, seed=1, max_tokens=250)
            messages.append({"role": "assistant", "content": said})
        lines.append("\n\n".join(f"{m['role']}: {m['content']}" for m in messages))
    request = "What is the weather like in Tokyo?"
    said = answer(llm, [{"role": "user", "content": request}], [TOOLS[0].schema()], seed=1, max_tokens=150)
    lines.append(f"user, with the function {TOOLS[0].name}: {request}\n\nassistant: {said}")
    return "\n\n---\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", action="store_true", help="only the samples of the model card")
    args = parser.parse_args()
    if args.samples:
        with LLM(args.model, context_length=2048) as llm:
            print(samples(llm))
        return
    result: dict[str, Any] = {}
    with LLM(args.model, context_length=2048) as llm:
        for name, found in (
            ("perplexity", perplexity(llm, heldout(args.heldout))),
            ("tools", evaluate_tools(llm)),
            ("stories", evaluate_stories(llm)),
            ("questions", evaluate_questions(llm)),
        ):
            result[name] = found
            print(
                name,
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if k != "wrong"}),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
