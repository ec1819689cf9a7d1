"""What the parameters of made-up functions may hold: kinds of values, each with names, a type and a way to draw one.

Where a list would be learned by heart (languages, colors, currencies), some of the values are words that nobody has heard.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

from .words import CITIES, COLORS, COUNTRIES, NAMES, examples, nouns, senses

__all__ = ["KINDS", "SLOTS", "Kind", "code", "distinct", "made_up", "price", "use_vocabulary", "vocabulary"]

R = random.Random
_KNOWN: list[str] = []


def use_vocabulary(known: list[str]) -> None:
    """Words that have a token of their own: half or more of what `vocabulary` gives from now on.

    Most words stand after a space, so that the token of a word without one is seldom learned; and what is never learned cannot be
    copied: a model read "dishes_with" and called choose_with. In names and values every such word is met.
    """
    _KNOWN[:] = known
    vocabulary.cache_clear()


@cache
def vocabulary() -> list[str]:
    """To make names and values of; some words more than once."""
    common = nouns()
    return common + _KNOWN * max(1, len(common) // len(_KNOWN)) if _KNOWN else common


def distinct(r: R, number: int) -> list[str]:
    """Words of the vocabulary, each once."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[r.choice(vocabulary())] = None
    return list(found)


class Kind(NamedTuple):
    """A kind of parameter: names and descriptions it may have, a value, and how a request may mention it."""

    names: tuple[str, ...]
    type: str
    descriptions: tuple[str, ...]
    value: Callable[[R], Any]
    phrases: tuple[str, ...]


# Things of a kind, so that a request says by its words what it is about.
_LISTED = {
    kind: things.split(",")
    for kind, things in {
        "language": "English,French,Spanish,German,Italian,Polish,Greek,Japanese,Chinese,Arabic,Hindi,Turkish,Dutch,Danish,Finnish,Thai,Czech,Hebrew,Russian,Welsh,Persian,Bengali,Norwegian,Hungarian,Vietnamese,Swahili,Irish,Basque,Icelandic,Zulu",
        "animal": "dog,cat,horse,hamster,parrot,wolf,eagle,shark,tiger,snake,turtle,whale,fox,rabbit,owl,spider,crocodile,goat,penguin,bee,knight,bishop,camel,hedgehog,dolphin,gorilla",
        "plant": "rose,tulip,oak,birch,cactus,fern,tomato,basil,orchid,grass,hazel,lavender,palm,ivy,sunflower,pine,lily,mint",
        "dish": "pizza,noodles,sushi,chicken soup,salad,fried rice,pancakes,burgers,tacos,beef stew,curry,dumplings,apple pie,grilled fish,potatoes,chocolate cake,an omelette,falafel,ice cream,lamb chops",
        "drink": "coffee,tea,espresso,cocoa,green tea,cappuccino,lemonade,hot milk,a latte,juice,mint tea",
        "illness": "a headache,fever,a cough,a sore throat,back pain,a rash,a cold,stomach ache,brown leaves,a toothache,dizziness,red eyes,itching,tiny spots,a swollen foot",
        "drug": "aspirin,ibuprofen,penicillin,insulin,vitamin C,cough syrup,paracetamol,iron pills,eye drops,magnesium",
        "sport": "football,tennis,swimming,chess,running,basketball,hockey,rowing,golf,cycling,boxing,skiing,volleyball,judo,climbing,handball",
        "job": "doctor,dentist,plumber,teacher,nurse,cook,driver,lawyer,painter,gardener,programmer,carpenter,baker,pilot,tailor,translator,skin doctor,children's doctor,electrician,surgeon",
        "school": "math,history,biology,physics,music,art,chemistry,geography,English,French,economics,sports,Latin,statistics,philosophy,programming",
        "appliance": "dishwasher,washing machine,fridge,toaster,phone,laptop,dryer,television,freezer,coffee machine,tablet,headphones,heater,vacuum cleaner,stove,printer,camera,watch",
        "material": "iron,gold,oxygen,carbon,Mars,helium,copper,Jupiter,sodium,silver,Venus,neon,Saturn,lead,Pluto,sulfur,the moon,mercury,zinc",
        "topicword": "cats,love,the sea,autumn,gravity,volcanoes,black holes,friendship,engines,magnets,my boss,spring,the rain,democracy,photosynthesis,trains,the stars,money,fractions,evolution,old age,electricity,freedom,penguins,recursion",
    }.items()
}  # fmt: skip


def made_up(r: R) -> str:
    """A name that nobody has heard, to be copied letter by letter."""
    syllables = (
        "".join((r.choice("bcdfghjklmnprstvwz"), r.choice("aeiou"), r.choice(["", "", "n", "r", "s", "l", "k"])))
        for _ in range(r.randint(2, 4))
    )
    return "".join(syllables).capitalize()


def code(r: R) -> str:
    letters = "".join(r.choices(string.ascii_uppercase, k=r.randint(1, 4)))
    digits = "".join(r.choices(string.digits, k=r.randint(1, 6)))
    return r.choice(["{a}-{d}", "{a}{d}", "{a}_{d}", "#{a}{d}", "{d}{a}", "{d}-{a}", "{d}"]).format(a=letters, d=digits)


def price(r: R) -> float:
    return round(r.uniform(0.5, 900), r.choice([1, 2]))


def _or_made_up(known: list[str], r: R) -> str:
    return r.choice(known) if r.random() < 0.6 else made_up(r)


def _listed(kind: str, r: R) -> str:
    """Of the list, or words that nobody would expect there: small letters where the list has them."""
    known = _LISTED[kind]
    if r.random() < 0.65:
        return r.choice(known)
    word = r.choice([made_up(r), r.choice(vocabulary()), r.choice(senses()).word])
    return word.capitalize() if known[0][0].isupper() else word.lower()


def _date(r: R) -> str:
    return f"20{r.randint(20, 35)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def _email(r: R) -> str:
    return f"{r.choice(NAMES).lower()}{r.choice(['', '.', '_'])}{r.choice(vocabulary())}@{r.choice(vocabulary())}.{r.choice(['com', 'org', 'net', 'io'])}"


def _title(r: R) -> str:
    words = [r.choice(vocabulary()).capitalize() if r.random() < 0.7 else made_up(r) for _ in range(r.randint(1, 3))]
    return r.choice(["", "", "The "]) + " ".join(words)


def _query(r: R) -> str:
    """What somebody looks for: one to three words, or a small phrase."""
    x, y = r.choice(vocabulary()), r.choice(senses()[:9000]).word
    if r.random() < 0.5:
        return " ".join(r.choices(vocabulary(), k=r.randint(1, 3)))
    return r.choice([f"how to {y} a {x}", f"the {y} {x}", f"cheap {x}s", f"{x} of {made_up(r)}", f"best {x} in {r.choice(CITIES)}", f"why {x}s {y}", f"{x} and {y}", f"{r.choice(NAMES)}'s {x}", f"a {r.choice(COLORS)} {x}", f"{y} {x}s for beginners", f"old {x} pictures", f"what a {x} is", f"{x} {r.randint(1900, 2035)}"])  # fmt: skip


def _sentence(r: R) -> str:
    return r.choice(examples())


def _phrase(r: R) -> str:
    """Some words out of a sentence, or all of a short one."""
    words = r.choice(examples()).rstrip(".").split()
    return " ".join(words[: r.randint(2, 7)]).rstrip(",;:")


def _stem(r: R) -> str:
    """What a file may be called, without its ending."""
    noun = r.choice(vocabulary())
    return r.choice([noun, noun, f"{noun}{r.randint(1, 99)}", f"{noun}_{r.choice(vocabulary())}", f"{noun}-{r.randint(1, 9)}", f"{noun[:3].upper()}_{r.randint(1, 9999)}", f"{made_up(r).lower()}", f"{noun.capitalize()}", f"{noun[:4]}{r.randint(1, 999):03}"])  # fmt: skip


def _file(r: R) -> str:
    folder = r.choice(
        [
            "",
            "",
            "",
            "/home/",
            "/tmp/",
            "docs/",
            "data/",
            "~/",
            "/var/",
            f"{r.choice(vocabulary())}/",
            f"/{r.choice(vocabulary())}/",
        ]
    )
    ending = r.choice("txt csv json pdf md png jpg jpeg html xml log doc gif py zip mp3 yaml tar bmp odt tex c".split())
    return f"{folder}{_stem(r)}.{ending}"


def _list(r: R) -> list[str]:
    return distinct(r, r.randint(2, 4))


def _whole(low: int, high: int) -> Callable[[R], int]:
    return lambda r: r.randint(low, high)


def _amount(r: R) -> float:
    return r.choice([r.randint(1, 5000), r.randint(1, 50) * 10, price(r)])


def _spot(r: R) -> str:
    kinds = ["Street", "Square", "Station", "Road", "Bridge", "Park", "Avenue", "Hill"]
    return r.choice(
        [
            _or_made_up(CITIES, r),
            f"the {r.choice(vocabulary())}",
            f"{r.choice([made_up(r), r.choice(vocabulary()).capitalize()])} {r.choice(kinds)}",
            _title(r),
        ]
    )


def _command(r: R) -> str:
    commands = "ls -l {}|cat {}|wc -l {}|rm {}|head -n 3 {}|du -h {}|echo {}|python3 {}|date|pwd|uptime|git status|mkdir {}|touch {}"
    return r.choice(commands.split("|")).replace("{}", _file(r))


def _goods(r: R) -> str:
    thing = r.choice(vocabulary())
    return r.choice([thing, f"{thing}s", f"{r.choice(COLORS)} {thing}s", f"{r.choice(vocabulary())} {thing}s", f"{code(r)} {thing}s", f"{r.choice(string.ascii_uppercase)}{r.choice(string.ascii_uppercase)} {thing}s", f"{r.choice(senses()[:6000]).word} {thing}s"])  # fmt: skip


def _tracking(r: R) -> str:
    return r.choice([code(r), "".join(r.choices(string.ascii_uppercase + string.digits, k=r.randint(5, 9)))])


def _url(r: R) -> str:
    site = f"{r.choice([r.choice(vocabulary()), made_up(r).lower()])}.{r.choice(['com', 'org', 'net', 'io', 'de'])}"
    return r.choice(["", "https://", "https://www."]) + site + r.choice(["", "", f"/{r.choice(vocabulary())}"])


def _version(r: R) -> str:
    return r.choice(["", "v"]) + ".".join(str(r.randint(0, 20)) for _ in range(r.choice([2, 3, 3])))


def _sql(r: R) -> str:
    table, column = r.choice(vocabulary()), r.choice(vocabulary())
    return r.choice([f"SELECT * FROM {table}", f"SELECT {column} FROM {table} LIMIT {r.randint(1, 99)}", f"SELECT COUNT(*) FROM {table}", f"DELETE FROM {table} WHERE {column} = {r.randint(1, 99)}", f"DROP TABLE {table}"])  # fmt: skip


def _person(r: R) -> str:
    return r.choice([f"{r.choice(NAMES)} {made_up(r)}", f"{made_up(r)} {made_up(r)}", _or_made_up(NAMES, r), r.choice(["Albert Einstein", "Mozart", "Marie Curie", "Shakespeare", "Napoleon", "Gandhi", "Cleopatra", "Picasso"])])  # fmt: skip


def _letters(r: R, least: int, most: int) -> str:
    return "".join(r.choices(string.ascii_uppercase, k=r.randint(least, most)))


def _currency(r: R) -> str:
    known = "USD EUR GBP JPY CHF INR CNY SEK NOK PLN BRL CAD AUD TRY MXN ZAR".split()
    return r.choice(known) if r.random() < 0.6 else _letters(r, 3, 3)


def _phone(r: R) -> str:
    return r.choice(["{}-{}", "{}-{}", "0{} {}", "+{}{}"]).format(r.randint(100, 999), f"{r.randint(0, 9999):04}")


def _device(r: R) -> str:
    return r.choice([r.choice(vocabulary()), f"{r.choice(vocabulary())} {r.choice(vocabulary())}", f"{r.choice(vocabulary())} {r.choice(['light', 'lamp', 'door', 'room', 'window', 'fan'])}"])  # fmt: skip


KINDS = [
    Kind(("city", "location", "place", "town", "destination", "origin"), "string", ("The city", "Name of the city", "City to use", "Where"), partial(_or_made_up, CITIES), ("in {}", "for {}", "near {}", "in the city of {}")),
    Kind(("country", "region", "nation"), "string", ("The country", "Country name"), partial(_or_made_up, COUNTRIES), ("in {}", "for {}", "from {}")),
    Kind(("name", "person", "user", "contact", "recipient", "guest", "owner", "author"), "string", ("Name of the person", "Who", "The person's name"), partial(_or_made_up, NAMES), ("for {}", "with {}", "under the name {}")),
    Kind(("date", "day", "start_date", "deadline", "due_date"), "string", ("Date as YYYY-MM-DD", "The day, YYYY-MM-DD", "When, as YYYY-MM-DD"), _date, ("on {}", "for {}", "by {}")),
    Kind(("time", "start_time", "hour"), "string", ("Time as HH:MM", "Time of day, 24 hours"), lambda r: f"{r.randint(0, 23):02}:{r.choice(['00', '15', '30', '45', '10', '05'])}", ("at {}", "for {}")),
    Kind(("email", "to", "address"), "string", ("Email address", "Address to send to"), _email, ("to {}", "with the email {}", "for {}")),
    Kind(("id", "order_id", "code", "reference", "ticket_id", "account"), "string", ("The id", "Reference code", "Number of the order"), _tracking, ("with id {}", "with the code {}", "number {}", "for {}")),
    Kind(("query", "keyword", "topic", "term", "subject", "search"), "string", ("What to look for", "Search words", "The topic"), _query, ("about {}", "on {}", "for {}", 'for "{}"')),
    Kind(("message", "text", "note", "body", "content", "comment", "title"), "string", ("The text", "Text to use", "What it says"), _sentence, ('saying "{}"', 'with the text "{}"', "that says: {}", 'with the words "{}"')),
    Kind(("title", "show", "song", "restaurant", "company", "brand", "event"), "string", ("The title", "What it is called", "Its name"), _title, ("called {}", "named {}", "with the title {}", 'called "{}"')),
    Kind(("phone", "number", "phone_number", "mobile"), "string", ("Phone number", "Number to call"), _phone, ("on {}", "at {}", "with the number {}")),
    Kind(("room", "device", "object", "item", "place", "part"), "string", ("Which one", "The thing to use", "What it is about"), lambda r: r.choice(vocabulary()), ("in the {}", "for the {}", "of the {}", "on the {}")),
    Kind(("file", "path", "filename"), "string", ("Path of the file", "File to use"), _file, ("in {}", "from {}", "called {}", "at {}")),
    Kind(("language", "target_language", "lang"), "string", ("The language", "Language to use"), partial(_listed, "language"), ("in {}", "into {}", "to {}")),
    Kind(("color", "colour", "shade"), "string", ("The color", "Color to use"), lambda r: r.choice(COLORS) if r.random() < 0.7 else f"{r.choice(['dark', 'light', 'bright'])} {r.choice(vocabulary())}", ("in {}", "with the color {}", "that is {}")),
    Kind(("count", "limit", "quantity", "number", "people", "guests", "copies", "max_results", "rooms"), "integer", ("How many", "Number of items", "The count"), _whole(1, 60), ("with {n} of {}", "and make it {}", "with {n} set to {}", "{n} {}")),
    Kind(("minutes", "duration", "days", "seconds", "length", "weeks", "nights"), "integer", ("How long", "Duration", "Length of time"), _whole(1, 240), ("for {} {n}", "with {n} {}", "lasting {}")),
    Kind(("amount", "price", "budget", "max_price", "weight", "distance", "value"), "number", ("The amount", "The number to use", "How much"), _amount, ("with {n} {}", "of {}", "for {}", "up to {}")),
    Kind(("year",), "integer", ("The year",), _whole(1900, 2035), ("from {}", "in {}", "for the year {}")),
    Kind(("level", "volume", "percent", "brightness", "temperature", "speed", "score"), "integer", ("The level", "Value from 0 to 100"), _whole(0, 100), ("to {}", "at {}", "with {n} {}")),
    Kind(("items", "tags", "names", "words", "list", "ingredients", "products"), "array", ("The items", "List of words"), _list, ("with {}", "for {}", "containing {}")),
]  # fmt: skip

# What a parameter of scenes.txt may hold: type in the schema, usual names of such a parameter, value.
SLOTS: dict[str, tuple[str, tuple[str, ...], Callable[[R], Any]]] = (
    {kind.names[0]: (kind.type, kind.names, kind.value) for kind in KINDS}
    | {kind: ("string", (kind, "which", "name"), partial(_listed, kind)) for kind in _LISTED if kind != "language"}
    | {
        "currency": ("string", ("currency", "code"), _currency),
        "degrees": ("number", ("degrees", "temperature", "target"), lambda r: r.choice([r.randint(5, 30), r.randint(10, 59) / 2])),
        "phrase": ("string", ("text", "words", "message", "phrase"), _phrase),
        "ticker": ("string", ("symbol", "ticker", "share"), lambda r: _letters(r, 2, 5)),
        "food": ("string", ("ingredient", "food"), lambda r: " ".join(distinct(r, r.choice([1, 1, 2])))),
        "spot": ("string", ("place", "from", "to", "stop"), _spot),
        "goods": ("string", ("product", "item", "article"), _goods),
        "rare": ("string", ("word", "term"), lambda r: r.choice(senses()).word if r.random() < 0.7 else made_up(r).lower()),
        "stars": ("integer", ("stars", "rating"), _whole(1, 5)),
        "command": ("string", ("command", "cmd", "line"), _command),
        "room": ("string", ("room", "device", "thing", "object", "part"), _device),
        "team": ("string", ("team", "club"), lambda r: r.choice([_or_made_up(CITIES, r), f"the {made_up(r)} {r.choice(vocabulary()).capitalize()}s", f"{made_up(r)} United", _title(r)])),
        "star": ("string", ("person", "artist", "name"), _person),
        "url": ("string", ("url", "link", "page"), _url),
        "version": ("string", ("version", "tag"), _version),
        "sql": ("string", ("sql", "statement", "query"), _sql),
    }
)  # fmt: skip
