"""Text by the teacher, on one CUDA GPU. Run: python -m training.generate TEACHER.gguf OUT [--seconds N] [--part I]

OUT gets corpus.jsonl.GI.xz (older text is corpus.jsonl.0.xz and so on), one document a line: {"c": category, "m": [[role,
text], …]}. One process a GPU; each has its own seed. What is kept has been through `clean`, which `prepare` runs on older text too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

from .words import CITIES, COLORS, NAMES, a, nouns

__all__ = ["clean", "loops", "prompt"]

R = random.Random
SYSTEM = {
    "story": "You tell stories to small children. You use short, simple words and short sentences.",
    "other": "You are a kind teacher. You answer with short, simple and correct sentences.",
}
ANIMALS = "cat dog rabbit fox bear mouse duck frog owl horse pony lamb turtle squirrel elephant monkey lion penguin whale dragon unicorn kitten puppy donkey bird giraffe".split()
PEOPLE = "farmer baker teacher doctor sailor painter gardener king queen princess prince pirate wizard knight cook singer fisherman astronaut boy girl grandmother grandfather".split()
PLACES = "forest garden park village farm meadow hill river lake beach school market library castle mountain island city desert jungle ship bakery cave".split()
MOODS = (
    "happy sad brave shy funny lonely clever lazy angry curious gentle hungry sleepy proud tiny old young magic".split()
)
TOPICS = "finding a lost toy,making a new friend,helping a friend,being kind,telling the truth,learning to swim,a rainy day,the first day of school,a birthday party,a trip to the sea,planting a seed,a broken cup,a surprise,sharing food,being afraid of the dark,a long journey,a magic tree,saying sorry,a big storm,a winter night,learning to wait,a lost key,a new baby,moving to a new house".split(
    ","
)
JOBS = "make tea,plant a tree,wash the dishes,take care of a cat,make a sandwich,learn a new word,stay healthy,be a good friend,save water,write a letter,clean a room,cook rice,draw a house,fix a bike,make a new friend,sleep well,study for a test,pack a bag,bake bread,grow tomatoes,calm down,start a garden,learn to swim,read faster".split(
    ","
)
LISTS = "animals,colors,fruits,vegetables,things in a kitchen,things at school,feelings,jobs,ways to relax,ways to help at home,toys,things to take to the beach,clothes,kinds of weather,tools,sports,things that fly,things that are cold,healthy habits,gifts for a friend".split(
    ","
)
NUMBERS = ("three", "four", "five")


def prompt(r: R) -> tuple[str, str]:
    """(category, request)."""
    noun = r.choice(nouns(2500))
    what = r.random()
    if what < 0.68:
        name, other = r.sample(NAMES, 2)
        animal, place, mood, person = r.choice(ANIMALS), r.choice(PLACES), r.choice(MOODS), r.choice(PEOPLE)
        return "story", r.choice([
            f"Tell me a story about {name} and {a(mood)} {animal}.", f"Tell me a short story about {a(person)} in the {place}.",
            f"Write a little story about {r.choice(TOPICS)}.", f"Write a story about {name} and {other} who find {a(noun)} in the {place}.",
            f"Tell me a story about {a(mood)} {animal} and {a(mood)} {person}.", f"Once upon a time there was {a(mood)} {animal}. Tell me what happened.",
            f"Write a story with a happy end about {name} and the {animal}.", f"Tell a bedtime story about {a(r.choice(COLORS))} {noun}.",
            f"Write a short story about {name}. It is about {r.choice(TOPICS)}.", f"Tell me what {name} and {other} did at the {place}.",
            f"Write a short story that has the words {noun}, {animal} and {place}.", f"Tell me a story about {name} who wanted to be {a(person)}.",
        ])  # fmt: skip
    if what < 0.86:
        return "qa", r.choice([
            f"What is {a(noun)}?", f"Tell me about {r.choice(['the ', '', 'a '])}{noun}.", f"Why do people need {noun}?", f"Explain {noun} in simple words.",
            f"What can you do with {a(noun)}?", f"What do you know about {r.choice(CITIES)}?", f"Tell me something about {r.choice(ANIMALS)}s.",
        ])  # fmt: skip
    if what < 0.95:
        job = r.choice(JOBS)
        return "howto", r.choice(
            [
                f"How do I {job}?",
                f"How can I {job}?",
                f"Explain step by step how to {job}.",
                f"What is a good way to {job}?",
            ]
        )
    number, things = r.choice(NUMBERS), r.choice(LISTS)
    return "list", r.choice(
        [
            f"Name {number} {things}.",
            f"Give me {number} {things}.",
            f"List {number} {things}.",
            f"Can you name {number} {things}?",
        ]
    )


_NONSENSE = re.compile(
    r"as an ai|language model|i'm a (kind|simple|friendly)|kind,? friendly|helper|smollm|hugging|\bassistant\b|i'm here to|step 1: choose|\bteacher\. i\b|the story (?:is about|starts|begins)|(?-i:\b(?P<who>[A-Z][a-z]+) and (?P=who)\b)",
    re.IGNORECASE,
)
# The least number of words. Other categories are the teacher's worst: what it says in a chat, and sentences written anew.
LEAST = {"story": 60, "qa": 10, "howto": 20, "list": 4}
# Questions that it mostly gets wrong; facts.py, questions.py and WordNet answer such ones.
UNKNOWN = re.compile(
    r"what does (the word|an?) |use the words? |who uses |tell me two facts|why is the |how many ", re.IGNORECASE
)


def loops(text: str) -> bool:
    """Whether it goes round in circles: eight words that were there before, or a sentence three times."""
    words = text.lower().split()
    eights = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    sentences = [s.strip().lower() for s in re.split(r"[.!?]", text) if len(s.split()) > 2]
    return len(set(eights)) < len(eights) or any(sentences.count(s) > 2 for s in set(sentences))


def _follows(text: str, request: str) -> bool:
    """Whether a story keeps to few people, short sentences, and whom it was to be about: what a small model can follow."""
    sentences = [s for s in re.split(r"[.!?]+\"?\s+", text) if s]
    words = text.split()
    if len(words) > 17 * len(sentences) or max(len(s.split()) for s in sentences) > 40:
        return False
    people = set(re.findall(r"(?<=[a-z,] )[A-Z][a-z]+\b", text)) - {"I"}
    wanted = [n for n in re.findall(r"\b[A-Z][a-z]+\b", request) if n in NAMES] or [
        w for w in re.findall(r"[a-z]+", request) if w in ANIMALS or w in PEOPLE
    ]
    begin, end = " ".join(words[: len(words) // 2]).lower(), " ".join(words[len(words) // 2 :])
    return (
        len(people) <= 4
        and all(w.lower() in begin for w in wanted)
        and any(p in end for p in people | {"he ", "she ", "they "})
    )


def clean(category: str, turns: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
    """The turns, answers cut at the last whole sentence before the first repeat; None if what is left is not worth learning."""
    if category not in LEAST or (category == "qa" and UNKNOWN.match(turns[0][1])):
        return None
    out: list[tuple[str, str]] = []
    for role, said in turns:
        if role != "assistant":
            out.append((role, said))
            continue
        text = said.replace("’", "'").replace("“", '"').replace("”", '"').replace("–", "-").replace("—", "-").strip()
        if not text.isascii() or _NONSENSE.search(text):
            return None
        text = _without_repeats(text)
        words = text.lower().split()
        if len(words) < LEAST[category]:
            return None
        triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        if len(words) > 30 and len(set(triples)) < 0.9 * len(triples):
            return None
        if loops(text):
            return None
        if category == "story":
            if not _follows(text, out[-1][1]):
                return None
            common = max(words.count(w) for w in set(words) if len(w) > 3)
            if common > max(4, 0.06 * len(words)) or len(set(words[:100])) < 56 * min(len(words), 100) / 100:
                return None
            names = [w for w in re.findall(r"\b[A-Z][a-z]+\b", out[-1][1]) if w in NAMES]
            if any(n not in text for n in names):
                return None
        out.append((role, text))
    return out


def _without_repeats(text: str) -> str:
    """Up to the first sentence that was there before, and to the last sentence's end."""
    parts = re.split(r"(?<=[.!?\"])(\s+)", text)
    seen: set[str] = set()
    kept = ""
    for i in range(0, len(parts), 2):
        key = re.sub(r"\W+", " ", parts[i].lower()).strip()
        if key in seen and len(key) > 8:
            break
        seen.add(key)
        kept += (parts[i - 1] if i else "") + parts[i]
    ends = [m.end() for m in re.finditer(r"[.!?]\"?(?=\s|$)", kept)]
    if not ends:
        return kept.strip() if len(kept) < 60 else ""
    listed = re.search(r"(^|\n)(-|\*|\d+\.) ", kept)
    return kept.strip() if listed and not kept.strip()[-1].isalpha() else kept[: ends[-1]].strip()


def main() -> None:
    import torch

    from .teacher import Teacher  # needs a GPU's libraries; `clean` does not

    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--part", type=int, default=0, help="which GPU, and which seed")
    parser.add_argument("--slots", type=int, default=4096)
    args = parser.parse_args()
    part = args.part
    torch.cuda.set_device(part)
    teacher = Teacher(args.teacher, args.slots, length=400, temperature=0.75, min_p=0.1)
    r = R(f"teacher {part}")
    asked: list[tuple[str, str]] = [prompt(r) for _ in range(int(args.seconds * 3000))]
    texts = [
        f"<|im_start|>system\n{SYSTEM['story' if c == 'story' else 'other']}<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"
        for c, q in asked
    ]
    prompts = [e.ids for e in teacher.tokenizer.encode_batch(texts, add_special_tokens=False)]
    args.out.mkdir(parents=True, exist_ok=True)
    kept = tokens = written = 0
    answers = teacher.write(prompts, args.seconds, seed=part)
    decoded = teacher.tokenizer.decode_batch([ids for _, ids in answers], skip_special_tokens=True)
    with lzma.open(args.out / f"corpus.jsonl.G{part}.xz", "wt", encoding="utf-8", preset=1) as file:
        for (i, ids), text in zip(answers, decoded, strict=True):
            written, tokens = written + 1, tokens + len(ids)
            category, question = asked[i]
            turns = clean(category, [("user", question), ("assistant", text)])
            if turns:
                document: dict[str, Any] = {"c": category, "m": turns}
                file.write(json.dumps(document) + "\n")
                kept += 1
    print(f"{written:,} documents of {tokens:,} tokens written, {kept:,} kept", flush=True)


if __name__ == "__main__":
    main()
