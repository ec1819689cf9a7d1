"""Words to write documents with: lists by hand, and WordNet (Debian's wordnet-base, a permissive licence)."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

__all__ = ["BOYS", "CITIES", "COLORS", "COUNTRIES", "GIRLS", "NAMES", "Sense", "a", "examples", "nouns", "senses"]

WORDNET = Path("/usr/share/wordnet")
BOYS = (
    "Adam Ben Carlos Daniel Eli Finn George Hugo Ivan Jack Kofi Leo Max Noah Omar Peter Quinn Ravi Sam Theo Tom Umar"
    " Victor Will Yusuf Zane Oscar Liam Kenji Mateo Felix Arthur"
).split()
GIRLS = (
    "Anna Bella Clara Dana Emma Fatima Grace Hana Ida Julia Kate Lily Mia Nora Olga Priya Rosa Sara Tess Uma Vera"
    " Wendy Yara Zoe Aisha Maya Ruby Ella Lucy Sofia Ingrid Mei"
).split()
NAMES = BOYS + GIRLS
CITIES = (
    "Paris,London,Rome,Madrid,Berlin,Vienna,Prague,Oslo,Cairo,Lagos,Nairobi,Delhi,Mumbai,Tokyo,Osaka,Seoul,Beijing,Sydney,Toronto"
    ",Chicago,Boston,Denver,Seattle,Austin,Lima,Bogota,Santiago,Havana,Dublin,Lisbon,Athens,Warsaw,Helsinki,Stockholm,Brussels"
    ",Zurich,Geneva,Milan,Naples,Munich,Hamburg,Lyon,Porto,Krakow,Riga,Tallinn,Manila,Jakarta,Hanoi,Bangkok,Accra,Dakar,Tunis"
    ",Casablanca,Montreal,Vancouver,Houston,Phoenix,Dallas,Miami,Atlanta,Detroit,New York,San Francisco,Los Angeles,Hong Kong"
    ",Cape Town,Buenos Aires,Mexico City"
).split(",")
COLORS = "red blue green yellow orange purple pink brown black white gray golden silver".split()
COUNTRIES = (
    "France Spain Italy Germany Austria Norway Sweden Egypt Nigeria Kenya India Japan China Australia Canada Peru Chile"
    " Brazil Ireland Portugal Greece Poland Finland Belgium Switzerland Thailand Vietnam Ghana Senegal Morocco Mexico"
).split()


class Sense(NamedTuple):
    word: str
    kind: str  # noun, verb, adj, adv
    gloss: str
    examples: tuple[str, ...]
    hypernym: str  # the first word of the next more general sense, or ""
    frequency: int  # how often the sense occurs in WordNet's tagged texts


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiouAEIOU" else "a ") + noun


@cache
def senses() -> list[Sense]:
    """Senses of single lower-case words, those first that are used most; one a word and kind."""
    count: dict[tuple[str, int], int] = {}
    for line in (WORDNET / "cntlist.rev").read_text().splitlines():
        key, number, times = line.split()
        if number == "1":
            word, rest = key.split("%")
            count[word, int(rest[0])] = int(times)
    found = []
    for digit, kind in ((1, "noun"), (2, "verb"), (3, "adj"), (4, "adv")):
        data, first = {}, {}
        for line in (WORDNET / f"data.{kind}").read_text().splitlines():
            if line[0] != " ":
                data[line[:8]] = line
        for line in (WORDNET / f"index.{kind}").read_text().splitlines():
            if line[0] != " ":
                fields = line.split()
                first[fields[0]] = fields[-int(fields[2])]
        for word, offset in first.items():
            if not re.fullmatch(r"[a-z]{3,12}", word):
                continue
            head, _, text = data[offset].partition(" | ")
            gloss = re.split(r"; ?\"", text)[0].strip().rstrip(";")
            pointer = re.search(r" @ (\d{8}) n ", head)
            general = data[pointer[1]].split()[4].replace("_", " ") if pointer and pointer[1] in data else ""
            quoted = tuple(q for q in re.findall(r'"([^"]+)"', text) if word[:4] in q.lower())
            found.append(Sense(word, kind, gloss, quoted, general, count.get((word, digit), 0)))
    return sorted(found, key=lambda s: -s.frequency)


@cache
def nouns(limit: int = 4000) -> list[str]:
    """The nouns used most."""
    return [s.word for s in senses() if s.kind == "noun"][:limit]


@cache
def examples() -> list[str]:
    """Short sentences and phrases that WordNet gives as examples."""
    return [q for s in senses() for q in s.examples if 12 <= len(q) <= 70 and q.isascii()]
