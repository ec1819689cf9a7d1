"""Conversations with function calls, made from templates: functions, schemas, requests and answers, all varied.

A function is a verb and a thing ("book_table"), with up to four parameters. Most things and names of parameters are made of WordNet
nouns, and many values are words that nobody has heard, so that a call can only be written by reading the schema and copying from
the request. Half of the functions are everyday.py's, whose requests are what people say. `unseen.py` has functions and wordings of
its own that are not made here.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .chat import Document
from .everyday import SCENES, Scene, Slot
from .words import CITIES, COLORS, COUNTRIES, NAMES, examples, nouns, senses

__all__ = ["conversation"]

R = random.Random


class Kind(NamedTuple):
    """A kind of parameter: names and descriptions it may have, a value, and how a request may mention it."""

    names: tuple[str, ...]
    type: str
    descriptions: tuple[str, ...]
    value: Callable[[R], Any]
    phrases: tuple[str, ...]


def _date(r: R) -> str:
    return f"20{r.randint(20, 35)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def _code(r: R) -> str:
    letters = "".join(r.choices(string.ascii_uppercase, k=r.randint(1, 4)))
    return r.choice(["{}-{}", "{}{}", "{}_{}", "#{}{}"]).format(letters, r.randint(1, 99999))


def _email(r: R) -> str:
    return f"{r.choice(NAMES).lower()}{r.choice(['', '.', '_'])}{r.choice(nouns())}@{r.choice(nouns())}.{r.choice(['com', 'org', 'net', 'io'])}"


def _made_up(r: R) -> str:
    """A name that nobody has heard, to be copied letter by letter."""
    syllables = (
        "".join((r.choice("bcdfghjklmnprstvwz"), r.choice("aeiou"), r.choice(["", "", "n", "r", "s", "l", "k"])))
        for _ in range(r.randint(2, 4))
    )
    return "".join(syllables).capitalize()


def _or_made_up(known: list[str], r: R) -> str:
    return r.choice(known) if r.random() < 0.6 else _made_up(r)


def _title(r: R) -> str:
    words = [r.choice(nouns()).capitalize() if r.random() < 0.7 else _made_up(r) for _ in range(r.randint(1, 3))]
    return r.choice(["", "", "The "]) + " ".join(words)


def _words(r: R) -> str:
    return " ".join(r.choices(nouns(), k=r.randint(1, 3)))


def _sentence(r: R) -> str:
    return r.choice(examples())


def _file(r: R) -> str:
    return f"{r.choice(['', '/home/', '/tmp/', 'docs/', 'data/'])}{r.choice(nouns())}.{r.choice(['txt', 'csv', 'json', 'pdf', 'md', 'png'])}"


def _list(r: R) -> list[str]:
    return r.sample(nouns(), r.randint(2, 4))


def _pick(values: list[str], r: R) -> str:
    return r.choice(values)


def _whole(low: int, high: int) -> Callable[[R], int]:
    return lambda r: r.randint(low, high)


def _price(r: R) -> float:
    return round(r.uniform(0.5, 900), r.choice([1, 2]))


def _amount(r: R) -> float:
    return r.choice([r.randint(1, 5000), r.randint(1, 50) * 10, _price(r)])


def _phrase(r: R) -> str:
    """Some words out of a sentence, or all of a short one."""
    words = r.choice(examples()).rstrip(".").split()
    return " ".join(words[: r.randint(2, 7)]).rstrip(",;:")


def _spot(r: R) -> str:
    return r.choice(
        [
            _or_made_up(CITIES, r),
            f"the {r.choice(nouns())}",
            f"{_made_up(r)} {r.choice(['Street', 'Square', 'Station', 'Road', 'Bridge'])}",
            _title(r),
        ]
    )


def _command(r: R) -> str:
    return r.choice(
        [
            "ls -l {}",
            "cat {}",
            "wc -l {}",
            "rm {}",
            "head -n 3 {}",
            "du -h {}",
            "echo {}",
            "python3 {}",
            "date",
            "pwd",
            "uptime",
            "git status",
            "mkdir {}",
            "touch {}",
        ]
    ).replace("{}", _file(r))


def _goods(r: R) -> str:
    things = r.choice(nouns())
    return r.choice(
        [
            things,
            f"{things}s",
            f"{r.choice(COLORS)} {things}s",
            f"{r.choice(nouns())} {things}s",
            f"{_code(r)} {things}s",
        ]
    )


def _tracking(r: R) -> str:
    return r.choice([_code(r), "".join(r.choices(string.ascii_uppercase + string.digits, k=r.randint(5, 9)))])


KINDS = [
    Kind(("city", "location", "place", "town", "destination", "origin"), "string", ("The city", "Name of the city", "City to use", "Where"), partial(_or_made_up, CITIES), ("in {}", "for {}", "near {}", "in the city of {}")),
    Kind(("country", "region", "nation"), "string", ("The country", "Country name"), partial(_or_made_up, COUNTRIES), ("in {}", "for {}", "from {}")),
    Kind(("name", "person", "user", "contact", "recipient", "guest", "owner", "author"), "string", ("Name of the person", "Who", "The person's name"), partial(_or_made_up, NAMES), ("for {}", "with {}", "under the name {}")),
    Kind(("date", "day", "start_date", "deadline", "due_date"), "string", ("Date as YYYY-MM-DD", "The day, YYYY-MM-DD", "When, as YYYY-MM-DD"), _date, ("on {}", "for {}", "by {}")),
    Kind(("time", "start_time", "hour"), "string", ("Time as HH:MM", "Time of day, 24 hours"), lambda r: f"{r.randint(0, 23):02}:{r.choice(['00', '15', '30', '45'])}", ("at {}", "for {}")),
    Kind(("email", "to", "address"), "string", ("Email address", "Address to send to"), _email, ("to {}", "with the email {}", "for {}")),
    Kind(("id", "order_id", "code", "reference", "ticket_id", "account"), "string", ("The id", "Reference code", "Number of the order"), _code, ("with id {}", "with the code {}", "number {}", "for {}")),
    Kind(("query", "keyword", "topic", "term", "subject", "search"), "string", ("What to look for", "Search words", "The topic"), _words, ("about {}", "on {}", "for {}", 'for "{}"')),
    Kind(("message", "text", "note", "body", "content", "comment", "title"), "string", ("The text", "Text to use", "What it says"), _sentence, ('saying "{}"', 'with the text "{}"', "that says: {}", 'with the words "{}"')),
    Kind(("title", "show", "song", "restaurant", "company", "brand", "event"), "string", ("The title", "What it is called", "Its name"), _title, ("called {}", "named {}", "with the title {}", 'called "{}"')),
    Kind(("phone", "number", "phone_number", "mobile"), "string", ("Phone number", "Number to call"), lambda r: f"{r.randint(100, 999)}-{r.randint(1000, 9999)}", ("on {}", "at {}", "with the number {}")),
    Kind(("room", "device", "object", "item", "place", "part"), "string", ("Which one", "The thing to use", "What it is about"), lambda r: r.choice(nouns()), ("in the {}", "for the {}", "of the {}", "on the {}")),
    Kind(("file", "path", "filename"), "string", ("Path of the file", "File to use"), _file, ("in {}", "from {}", "called {}", "at {}")),
    Kind(("language", "target_language", "lang"), "string", ("The language", "Language to use"), lambda r: r.choice("English French Spanish German Italian Polish Greek Japanese Chinese Arabic Hindi Turkish Dutch".split()), ("in {}", "into {}", "to {}")),
    Kind(("color", "colour", "shade"), "string", ("The color", "Color to use"), lambda r: r.choice(COLORS), ("in {}", "with the color {}", "that is {}")),
    Kind(("count", "limit", "quantity", "number", "people", "guests", "copies", "max_results", "rooms"), "integer", ("How many", "Number of items", "The count"), _whole(1, 60), ("with {n} of {}", "and make it {}", "with {n} set to {}", "{n} {}")),
    Kind(("minutes", "duration", "days", "seconds", "length", "weeks", "nights"), "integer", ("How long", "Duration", "Length of time"), _whole(1, 120), ("for {} {n}", "with {n} {}", "lasting {}")),
    Kind(("amount", "price", "budget", "max_price", "weight", "distance", "value"), "number", ("The amount", "The number to use", "How much"), _price, ("with {n} {}", "of {}", "for {}", "up to {}")),
    Kind(("year",), "integer", ("The year",), _whole(1900, 2035), ("from {}", "in {}", "for the year {}")),
    Kind(("level", "volume", "percent", "brightness", "temperature", "speed", "score"), "integer", ("The level", "Value from 0 to 100"), _whole(0, 100), ("to {}", "at {}", "with {n} {}")),
    Kind(("items", "tags", "names", "words", "list", "ingredients", "products"), "array", ("The items", "List of words"), _list, ("with {}", "for {}", "containing {}")),
]  # fmt: skip
CHOICES = [
    (("unit", "units"), ("celsius", "fahrenheit"), ("kilometers", "miles"), ("grams", "ounces"), ("meters", "feet")),
    (("priority", "urgency"), ("low", "medium", "high"), ("normal", "urgent")),
    (("size",), ("small", "medium", "large"), ("tiny", "huge")),
    (("format", "type", "kind", "mode"), ("pdf", "html", "text"), ("short", "long"), ("fast", "slow", "eco"), ("json", "csv")),
    (("currency",), ("USD", "EUR", "GBP", "JPY")),
    (("sort", "order", "sort_by"), ("newest", "oldest"), ("price", "rating", "name"), ("asc", "desc")),
    (("status", "state"), ("open", "closed"), ("on", "off"), ("active", "paused", "done")),
]  # fmt: skip
# Each group: verbs in function names, verbs in requests, verbs in descriptions.
ACTIONS = [
    ("get find search lookup fetch list show check read".split(), ("find", "look up", "show me", "get me", "I need", "check", "give me", "can you find", "I am looking for", "search for", "what is"), ("Find", "Get", "Look up", "Return", "Search for")),
    ("create add make new register save write record".split(), ("create", "add", "make", "set up", "I want to add", "please make", "save", "write down"), ("Create", "Add", "Make", "Save")),
    ("book order buy reserve schedule plan request".split(), ("book", "order", "reserve", "I would like to book", "schedule", "plan", "please order", "get me"), ("Book", "Order", "Reserve", "Schedule")),
    ("set update change adjust edit rename".split(), ("set", "change", "update", "adjust", "please change", "edit"), ("Set", "Change", "Update")),
    ("delete remove cancel clear stop close".split(), ("delete", "remove", "cancel", "get rid of", "please delete", "I no longer need", "stop"), ("Delete", "Remove", "Cancel")),
    ("send post share publish email forward".split(), ("send", "share", "post", "please send", "I want to send", "forward"), ("Send", "Share", "Post")),
    ("convert calculate compute translate count measure estimate".split(), ("convert", "work out", "calculate", "compute", "I need to know", "how much is"), ("Convert", "Calculate", "Compute")),
    ("play start open run turn_on launch".split(), ("play", "start", "open", "run", "turn on", "launch"), ("Start", "Play", "Open", "Run")),
]  # fmt: skip
# What people say who do not speak like a schema, by the group above; {t} the thing, {m} the details.
FRAMES = (
    ("What is the {t}{m}?", "Is there a {t}{m}?", "Any {t}{m}?", "How is the {t}{m}?", "I want to know the {t}{m}.", "Do you know the {t}{m}?", "Where is my {t}{m}?", "Can I see the {t}{m}?", "Tell me about the {t}{m}.", "Which {t} is there{m}?", "News of the {t}{m}?", "What about the {t}{m}?"),
    ("I want a {t}{m}.", "We need a new {t}{m}.", "Put a {t}{m}.", "Let there be a {t}{m}.", "Note a {t}{m}.", "There is a {t}{m}, keep it."),
    ("We would like a {t}{m}.", "Get us a {t}{m}.", "I need a {t}{m}.", "I will take a {t}{m}.", "Can I have a {t}{m}?", "A {t}{m}, if you can."),
    ("The {t} should be{m}.", "Make the {t}{m}.", "I want the {t}{m}.", "Put the {t}{m}.", "From now on the {t} is{m}.", "I would like the {t}{m}."),
    ("The {t}{m} can go.", "Throw away the {t}{m}.", "I do not want the {t}{m} any more.", "Take the {t}{m} away.", "No {t}{m} any more."),
    ("Let them have the {t}{m}.", "Pass the {t} on{m}.", "They should get the {t}{m}.", "Tell them the {t}{m}.", "The {t} must go out{m}."),
    ("How much is the {t}{m}?", "How many {t}{m}?", "What does the {t}{m} come to?", "What would the {t} be{m}?", "What is the {t}{m} in numbers?"),
    ("Let us have the {t}{m}.", "I feel like the {t}{m}.", "Go ahead with the {t}{m}.", "Time for the {t}{m}.", "On with the {t}{m}."),
)  # fmt: skip
# Where one function is offered, a request may not name it at all.
BARE = ("Please do it{m}.", "Go ahead{m}.", "I need this{m}.", "Can you help{m}?", "Do what you can{m}.", "It is needed{m}.", "Same as always{m}.")  # fmt: skip
THINGS = (
    "weather forecast flight hotel recipe reminder alarm playlist song email invoice ticket meeting event task order parcel"
    " report photo video restaurant table taxi train bus route map contact calendar timer light door window heater fan"
    " account payment refund review course book article movie product stock rate account_balance shopping_list to_do_list"
    " phone_number appointment doctor_visit gym_class bike_ride museum_tour dinner lunch garden_plan water_level"
    " temperature battery backup folder document message channel profile password_hint subscription delivery"
).split()
OPENERS = (
    "",
    "",
    "",
    "",
    "Hi! ",
    "Please ",
    "Could you ",
    "Hey, ",
    "Can you help? ",
    "Hello, ",
    "Now ",
    "I have a job for you: ",
    "Quick one: ",
)
CLOSERS = ("", "", "", ".", ".", " please.", ", thanks.", ". Thank you!", "!", " for me.")  # fmt: skip
ORDINARY = (
    ("How are you today?", "I am fine, thank you. What can I do for you?"),
    ("Hello!", "Hello! What can I do for you?"), ("Thank you, that is all.", "You are welcome!"),
    ("Good morning.", "Good morning! How can I help?"), ("What is two plus two?", "Two plus two is four."),
    ("What can you do?", "I can answer simple questions, tell short stories and call the functions that I am given."),
    ("What color is the sky?", "The sky is blue."), ("Goodbye!", "Goodbye! Have a nice day."),
    ("Are you there?", "Yes, I am here. What do you need?"), ("Say something nice.", "You are doing well, and today is a good day."),
)  # fmt: skip


class Parameter(NamedTuple):
    name: str
    schema: dict[str, Any]
    required: bool
    value: Callable[[R], Any]
    phrases: tuple[str, ...] = ()
    slot: str = ""  # of a scene


class Function(NamedTuple):
    name: str
    thing: str
    verbs: tuple[str, ...]
    frames: tuple[str, ...]
    parameters: list[Parameter]
    description: str
    scene: Scene | None = None

    def schema(self) -> dict[str, Any]:
        properties = {p.name: p.schema for p in self.parameters}
        required = [p.name for p in self.parameters if p.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


GENERIC = (
    "{n} {}",
    "with {n} {}",
    "and the {n} is {}",
    "use {} as the {n}",
    "with the {n} set to {}",
    "{n}: {}",
    "where {n} is {}",
)
PREFIXES = "new old first last main max min from to home target source start end".split()


def _name(r: R, usual: str) -> str:
    """A name for a parameter: the usual one in a third of all cases, so that names have to be read."""
    what = r.random()
    if what < 0.3:
        return usual
    if what < 0.5:
        return f"{r.choice(PREFIXES)}_{usual}"
    word = r.choice(nouns())
    return word if what > 0.75 else r.choice([f"{word}_{usual}", f"{usual}_{word}"])


def _parameter(r: R, taken: set[str], kinds: set[str], required: bool) -> Parameter:
    """taken: names that the function has; kinds: those that a request may mention without naming them, each only once, since who
    reads "in Paris, in Rome" could not say which is which."""
    while True:
        what = r.random()
        if what < 0.15:  # one of a few values
            names, *sets = r.choice(CHOICES)
            values = list(r.choice(sets)) if r.random() < 0.6 else r.sample(nouns(), r.randint(2, 4))
            name, schema = _name(r, r.choice(names)), {"type": "string", "enum": values}
            key, value, phrases = values[0], partial(_pick, values), (*GENERIC[:3], "in {}", "{}", "as {}")
        elif what < 0.22:
            name = r.choice(["include_", "use_", "is_", "with_", ""]) + r.choice(nouns(800))
            schema = {"type": "boolean", "description": f"Whether to use the {name.split('_')[-1]}"}
            key, value, phrases = name, (lambda r: r.random() < 0.6), ()
        else:
            kind = r.choice(KINDS)
            usual = r.choice(kind.names)
            name, key, value, phrases = _name(r, usual), kind.names[0], kind.value, kind.phrases
            words = name.replace("_", " ")
            schema = {
                "type": kind.type,
                "description": r.choice([*kind.descriptions, f"The {words}", f"{words.capitalize()} to use"]),
            }
            if r.random() < 0.3 or words in schema["description"].lower():
                phrases = GENERIC
        if name not in taken:
            break
    if key in kinds:
        phrases = GENERIC
    if schema["type"] == "array":
        schema["items"] = {"type": "string"}
    if "description" not in schema and r.random() < 0.5:
        schema = {"type": "string", "description": f"The {name.replace('_', ' ')}", "enum": schema["enum"]}
    taken.add(name)
    kinds.add(key)
    return Parameter(name, schema, required, value, phrases)


def _function(r: R) -> Function:
    group = r.randrange(len(ACTIONS))
    verbs, requests, described = ACTIONS[group]
    thing = r.choice(THINGS) if r.random() < 0.4 else "_".join(r.sample(nouns(), r.choice([1, 1, 2])))
    verb = r.choice(verbs)
    name = r.choice([f"{verb}_{thing}"] * 5 + [f"{thing}_{verb}", thing, f"{thing.split('_')[0]}.{verb}"])
    if r.random() < 0.15:
        first, *rest = name.replace(".", "_").split("_")
        name = first + "".join(word.capitalize() for word in rest)
    taken, kinds = set[str](), set[str]()
    count = r.choice([0, 1, 1, 1, 2, 2, 2, 3, 3, 4])
    parameters = [_parameter(r, taken, kinds, i == 0 or r.random() < 0.55) for i in range(count)]
    text = thing.replace("_", " ")
    description = r.choice(described) + r.choice([" ", " a ", " the "]) + text
    description += r.choice(["", "", ".", " for the user", f" by {parameters[0].name}" if parameters else " now"])
    return Function(name, text, requests, FRAMES[group], parameters, description)


# What a slot of everyday.py may hold: type in the schema, usual names of such a parameter, value.
SLOTS: dict[str, tuple[str, tuple[str, ...], Callable[[R], Any]]] = {
    kind.names[0]: (kind.type, kind.names, kind.value) for kind in KINDS
} | {
    "currency": ("string", ("currency", "code"), lambda r: r.choice("USD EUR GBP JPY CHF INR CNY SEK NOK PLN BRL CAD AUD TRY MXN ZAR".split())),
    "degrees": ("number", ("degrees", "temperature", "target"), lambda r: r.choice([r.randint(5, 30), r.randint(10, 59) / 2])),
    "phrase": ("string", ("text", "words", "message", "phrase"), _phrase),
    "ticker": ("string", ("symbol", "ticker", "share"), lambda r: "".join(r.choices(string.ascii_uppercase, k=r.randint(2, 5)))),
    "food": ("string", ("ingredient", "food"), lambda r: " ".join(r.sample(nouns(), r.choice([1, 1, 2])))),
    "spot": ("string", ("place", "from", "to", "stop"), _spot),
    "goods": ("string", ("product", "item", "article"), _goods),
    "rare": ("string", ("word", "term"), lambda r: r.choice(senses()).word if r.random() < 0.7 else _made_up(r).lower()),
    "stars": ("integer", ("stars", "rating"), lambda r: r.randint(1, 5)),
    "command": ("string", ("command", "cmd", "line"), _command),
    "amount": ("number", ("amount", "sum", "money", "value"), _amount),
    "id": ("string", ("id", "code", "number", "reference"), _tracking),
    "room": ("string", ("room", "device", "thing", "object", "part"), lambda r: r.choice([r.choice(nouns()), f"{r.choice(nouns())} {r.choice(nouns())}"])),
}  # fmt: skip


def _slot(r: R, slot: Slot, taken: set[str]) -> Parameter:
    schema: dict[str, Any]
    if slot.kind.startswith("one of: "):
        values = slot.kind[8:].split(", ")
        if r.random() < 0.3:
            values = r.sample(nouns(), len(values))
        elif len(values) > 2 and r.random() < 0.5:
            values = r.sample(values, r.randint(2, len(values)))
        schema, usual, value = (
            {"type": "string", "enum": values},
            (slot.name, "choice", "which"),
            partial(_pick, values),
        )
    elif slot.kind == "bool":
        schema, usual, value = {"type": "boolean"}, (slot.name,), lambda r: r.random() < 0.5
    else:
        kind, usual, value = SLOTS[slot.kind]
        schema = {"type": kind}
    what = r.random()
    name = slot.name if what < 0.25 else r.choice(usual) if what < 0.4 else _name(r, r.choice([slot.name, *usual]))
    while name in taken:
        name = _name(r, slot.name)
    taken.add(name)
    described = r.choice(
        [slot.description] * 3 + [slot.description.lower(), f"The {slot.name}", slot.name.capitalize()]
    )
    schema = {"type": schema.pop("type"), "description": described, **schema}
    if schema["type"] == "array":
        schema["items"] = {"type": "string"}
    return Parameter(name, schema, slot.required, value, slot=slot.name)


def _everyday(r: R) -> Function:
    scene, taken = r.choice(SCENES), set[str]()
    slots = [s for s in scene.slots if s.required or r.random() < 0.7]
    if r.random() < 0.3:
        r.shuffle(slots)
    parameters = [_slot(r, slot, taken) for slot in slots]
    name = r.choice(scene.names)
    if r.random() < 0.4:
        name = r.choice(
            [
                f"{name}_{r.choice(nouns())}",
                f"{r.choice(nouns())}_{name}",
                f"{r.choice(nouns())}.{name}",
                "_".join(r.sample(nouns(), 2)),
            ]
        )
    if r.random() < 0.15:
        first, *rest = name.replace(".", "_").split("_")
        name = first + "".join(word.capitalize() for word in rest)
    return Function(
        name, name.replace("_", " "), (), (), parameters, scene.description + r.choice(["", "", "."]), scene
    )


def _say(r: R, f: Function) -> tuple[str, dict[str, Any]]:
    """A request to a scene's function, and the arguments of the call."""
    assert f.scene is not None
    names = {p.slot: p for p in f.parameters}
    said = [(w, {}) if isinstance(w, str) else w for w in f.scene.wordings]
    wording, implied = r.choice([w for w in said if set(re.findall(r"\{(\w+)\}", w[0])) <= names.keys()])
    values = {slot: p.value(r) for slot, p in names.items() if "{" + slot + "}" in wording}
    text = wording.format(**{slot: _spoken(value) for slot, value in values.items()})
    if r.random() < 0.2:
        text = r.choice(OPENERS) + text
    if r.random() < 0.15:
        text = text.rstrip("?.!")
    text = text[0].upper() + text[1:] if r.random() < 0.85 else text[0].lower() + text[1:]
    values |= implied
    return text, {p.name: values[p.slot] for p in f.parameters if p.slot in values}


def _spoken(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value[:-1]) + " and " + value[-1]
    return str(value)


def _mention(r: R, p: Parameter, value: Any) -> str:
    name = p.name.replace("_", " ")
    if isinstance(value, bool):
        word = name.split(" ")[-1]
        yes = (f"with {word}", f"including the {word}", f"{name}: yes", f"and {name} should be true", f"with {name} on")
        no = (f"without {word}", f"but no {word}", f"{name}: no", f"and {name} should be false", f"with {name} off")
        return r.choice(yes if value else no)
    return r.choice(p.phrases).replace("{n}", name).replace("{}", _spoken(value))


def _request(r: R, f: Function, arguments: dict[str, Any], alone: bool) -> str:
    """alone: no other function is offered."""
    mentions = [_mention(r, p, arguments[p.name]) for p in f.parameters if p.name in arguments]
    r.shuffle(mentions)
    details = "".join((r.choice([" ", " ", ", "]) if i else " ") + mention for i, mention in enumerate(mentions))
    what = r.random()
    if alone and mentions and what < 0.15:
        text = r.choice(BARE).replace("{m}", details)
    elif what < 0.55:
        text = r.choice(f.frames).replace("{t}", f.thing).replace("{m}", details)
    else:
        verb = r.choice(f.verbs)
        text = r.choice(OPENERS) + verb + r.choice([" ", " a ", " the ", " my ", " the "]) + f.thing + details
        if r.random() < 0.12 and mentions:  # the details first
            text = f"{mentions[0]}, {verb} the {f.thing}" + "".join(f" {m}" for m in mentions[1:])
        text += r.choice(CLOSERS)
    return text[0].upper() + text[1:] if r.random() < 0.8 else text


def _arguments(r: R, f: Function) -> dict[str, Any]:
    return {p.name: p.value(r) for p in f.parameters if p.required or r.random() < 0.5}


def _result(r: R, f: Function) -> tuple[str, str]:
    """A function's response and what the assistant says of it."""
    what = r.random()
    if what < 0.3:
        key = r.choice(["result", "value", f.thing.replace(" ", "_"), r.choice(nouns())])
        value = r.choice([r.randint(1, 5000), _price(r), r.choice(nouns()), r.choice(CITIES)])
        return json.dumps({key: value}), r.choice(
            ["The {k} is {v}.", "It is {v}.", "I found it: {k} {v}.", "{k}: {v}."]
        ).format(k=key.replace("_", " "), v=value)
    if what < 0.5:
        keys = r.sample(nouns(), 2)
        values = [r.choice([r.randint(1, 99), r.choice(nouns()), r.choice(COLORS)]) for _ in keys]
        return json.dumps(
            dict(zip(keys, values, strict=True))
        ), f"The {keys[0]} is {values[0]} and the {keys[1]} is {values[1]}."
    if what < 0.7:
        return json.dumps({"status": "ok"}), r.choice(["Done.", "It is done.", f"The {f.thing} is done.", "All set."])
    if what < 0.85:
        code = _code(r)
        return json.dumps({"status": "ok", "id": code}), r.choice(
            ["Done. The id is {}.", "It worked. The id is {}."]
        ).format(code)
    reason = r.choice(["not found", "not available", "no permission", "the service is closed", "try again later"])
    return json.dumps({"error": reason}), f"Sorry, that did not work: {reason}."


def conversation(r: R) -> Document:
    """One conversation: a call, several calls, a question back, or an answer that needs no function."""
    functions: list[Function] = []
    for _ in range(r.choice([1, 1, 2, 2, 3])):
        f = _everyday(r) if r.random() < 0.5 else _function(r)
        if all(f.name != other.name and f.thing != other.thing for other in functions):
            functions.append(f)
    doc: Document = {"c": "tools", "tools": [f.schema() for f in functions], "m": []}
    messages = doc["m"]
    if r.random() < 0.25:
        messages.append(
            {
                "role": "system",
                "content": r.choice(
                    [
                        "You are a helpful assistant.",
                        "Use the functions when they help.",
                        "You help people with simple jobs.",
                        f"You are {r.choice(NAMES)}, a friendly helper.",
                    ]
                ),
            }
        )
    if r.random() < 0.2:
        question, answer = r.choice(ORDINARY)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if r.random() < 0.6:
            return doc
    f = r.choice(functions)
    request, arguments = _say(r, f) if f.scene else ("", _arguments(r, f))
    needed = [p for p in f.parameters if p.required and p.name in arguments and p.phrases]
    if needed and r.random() < 0.07:  # the request lacks something: ask
        missing = r.choice(needed)
        given = {k: v for k, v in arguments.items() if k != missing.name}
        name = missing.name.replace("_", " ")
        messages.append({"role": "user", "content": _request(r, f, given, len(functions) == 1)})
        messages.append(
            {"role": "assistant", "content": r.choice([f"Which {name} should I use?", f"What is the {name}?"])}
        )
        reply = r.choice(["{}", "{}.", "It is {}.", "Use {}.", "{} please."]).format(_spoken(arguments[missing.name]))
        messages.append({"role": "user", "content": reply})
        calls = [{"name": f.name, "arguments": arguments}]
    elif f.parameters and not f.scene and r.random() < 0.1:  # the same for two
        other = dict(arguments)
        first = f.parameters[0]
        other[first.name] = first.value(r)
        if other == arguments or not first.phrases:
            other = arguments
        text = _request(r, f, arguments, len(functions) == 1)
        calls = [{"name": f.name, "arguments": arguments}]
        if other is not arguments:
            text = text.rstrip(".! ") + r.choice(
                [", and the same for {}.", " and also for {}.", ". Then again for {}."]
            ).format(_spoken(other[first.name]))
            calls.append({"name": f.name, "arguments": other})
        messages.append({"role": "user", "content": text})
    else:
        request = request or _request(r, f, arguments, len(functions) == 1)
        messages.append({"role": "user", "content": request})
        calls = [{"name": f.name, "arguments": arguments}]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    if r.random() < 0.06:
        said["content"] = r.choice(["I will do that now.", f"Let me see to the {f.thing}.", "One moment."])
    messages.append(said)
    if r.random() < 0.15:
        doc["think"] = True
        said["reasoning_content"] = f"The user asks for {f.thing}. I call {f.name}."
    if r.random() < 0.45:
        results = [_result(r, f) for _ in calls]
        messages += [{"role": "tool", "content": response} for response, _ in results]
        messages.append({"role": "assistant", "content": " ".join(dict.fromkeys(answer for _, answer in results))})
    return doc
