"""Conversations with function calls, made from templates: functions, schemas, requests and answers, all varied.

A function is a verb and a thing ("book_table"), with up to four parameters. Most things and names of parameters are made of WordNet
nouns, and many values are words that nobody has heard, so that a call can only be written by reading the schema and copying from
the request. Most functions are everyday.py's, whose requests are what people say; others are asked for in other words than their name
and description. `unseen.py` has functions and wordings of its own that are not made here.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from . import questions
from .chat import Document
from .everyday import SCENES, Scene, Slot
from .values import KINDS, SLOTS, code, distinct, price, vocabulary
from .words import CITIES, COLORS, NAMES, examples, senses

__all__ = ["conversation"]

R = random.Random
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


def _pick(values: list[str], r: R) -> str:
    return r.choice(values)


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
    word = r.choice(vocabulary())
    return word if what > 0.75 else r.choice([f"{word}_{usual}", f"{usual}_{word}"])


def _parameter(r: R, taken: set[str], kinds: set[str], required: bool) -> Parameter:
    """taken: names that the function has; kinds: those that a request may mention without naming them, each only once, since who
    reads "in Paris, in Rome" could not say which is which."""
    while True:
        what = r.random()
        if what < 0.15:  # one of a few values
            names, *sets = r.choice(CHOICES)
            values = list(r.choice(sets)) if r.random() < 0.6 else distinct(r, r.randint(2, 4))
            name, schema = _name(r, r.choice(names)), {"type": "string", "enum": values}
            key, value, phrases = values[0], partial(_pick, values), (*GENERIC[:3], "in {}", "{}", "as {}")
        elif what < 0.22:
            name = r.choice(["include_", "use_", "is_", "with_", ""]) + r.choice(vocabulary())
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


def _perhaps_camel(r: R, name: str) -> str:
    if r.random() >= 0.15:
        return name
    first, *rest = name.replace(".", "_").split("_")
    return first + "".join(word.capitalize() for word in rest)


def _function(r: R) -> Function:
    group = r.randrange(len(ACTIONS))
    verbs, requests, described = ACTIONS[group]
    thing = r.choice(THINGS) if r.random() < 0.4 else "_".join(distinct(r, r.choice([1, 1, 2])))
    verb = r.choice(verbs)
    name = r.choice([f"{verb}_{thing}"] * 5 + [f"{thing}_{verb}", thing, f"{thing.split('_')[0]}.{verb}"])
    name = _perhaps_camel(r, name)
    taken, kinds = set[str](), set[str]()
    count = r.choice([0, 1, 1, 1, 2, 2, 2, 3, 3, 4])
    parameters = [_parameter(r, taken, kinds, i == 0 or r.random() < 0.55) for i in range(count)]
    text = thing.replace("_", " ")
    description = r.choice(described) + r.choice([" ", " a ", " the "]) + text
    description += r.choice(["", "", ".", " for the user", f" by {parameters[0].name}" if parameters else " now"])
    if r.random() < 0.4:
        text, name, description = _related(r, verb, r.choice(described))
    return Function(name, text, requests, FRAMES[group], parameters, description)


def _related(r: R, verb: str, described: str) -> tuple[str, str, str]:
    """What a request says, and a function's name and description that say it in other words: a more general one (WordNet's
    hypernym), or what the word means."""
    while True:
        sense = senses()[int(r.random() ** 2 * 12_000) % len(senses())]
        if sense.kind == "noun" and sense.hypernym:
            break
    general = sense.hypernym
    if r.random() < 0.6:
        return sense.word, f"{verb}_{general.replace(' ', '_')}", f"{described} {r.choice(['', 'a ', 'the '])}{general}"
    gloss = " ".join(sense.gloss.split()[:12])
    return (
        sense.word,
        r.choice([f"{verb}_{r.choice(vocabulary())}", f"{general.replace(' ', '_')}_{verb}"]),
        f"{described}: {gloss}",
    )


def _slot(r: R, slot: Slot, taken: set[str]) -> Parameter:
    schema: dict[str, Any]
    described = r.choice([slot.description] * 4 + [slot.description.lower(), f"The {slot.name}", ""])
    if "/" in slot.kind:
        values = slot.kind.split("/")
        if r.random() < 0.2:
            values = distinct(r, len(values))
        elif len(values) > 2 and r.random() < 0.4:
            values = r.sample(values, r.randint(2, len(values)))
        schema = {"type": "string", "enum": values}
        usual: tuple[str, ...] = (slot.name, "choice", "which")
        value: Callable[[R], Any] = partial(_pick, values)
    elif slot.kind == "bool":
        schema, usual, value = {"type": "boolean"}, (slot.name,), lambda r: r.random() < 0.5
    else:
        kind, usual, value = SLOTS[slot.kind]
        schema = {"type": kind}
    what = r.random()
    if described.lower() != slot.description.lower():
        name = slot.name  # or nothing would say what it is for
    else:
        name = slot.name if what < 0.25 else r.choice(usual) if what < 0.45 else _name(r, r.choice([slot.name, *usual]))
    while name in taken:
        name = _name(r, slot.name)
    taken.add(name)
    schema = {"type": schema.pop("type"), **({"description": described} if described else {}), **schema}
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
                f"{name}_{r.choice(vocabulary())}",
                f"{r.choice(vocabulary())}_{name}",
                f"{r.choice(vocabulary())}.{name}",
                "_".join(distinct(r, 2)),
            ]
        )
    name = _perhaps_camel(r, name)
    return Function(
        name, name.replace("_", " "), (), (), parameters, scene.description + r.choice(["", "", "."]), scene
    )


def _say(r: R, f: Function) -> tuple[str, dict[str, Any]]:
    """A request to a scene's function, and the arguments of the call."""
    assert f.scene is not None
    names = {p.slot: p for p in f.parameters}
    wording = r.choice([w for w in f.scene.wordings if set(re.findall(r"\{(\w+)\}", w.text)) <= names.keys()])
    values = {slot: p.value(r) for slot, p in names.items() if "{" + slot + "}" in wording.text}
    text = wording.text.format(**{slot: _spoken(value) for slot, value in values.items()})
    if r.random() < 0.2:
        text = r.choice(OPENERS) + text
    if r.random() < 0.15:
        text = text.rstrip("?.!")
    if not wording.text.startswith("{") and r.random() < 0.15:
        text = text[0].lower() + text[1:]
    if r.random() < 0.08:  # something else is said too
        aside = r.choice(examples())
        text = f"{aside[0].upper()}{aside[1:].rstrip('.')}. {text}"
    values |= wording.implied
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
        key = r.choice(["result", "value", f.thing.replace(" ", "_"), r.choice(vocabulary())])
        value = r.choice([r.randint(1, 5000), price(r), r.choice(vocabulary()), r.choice(CITIES)])
        return json.dumps({key: value}), r.choice(
            ["The {k} is {v}.", "It is {v}.", "I found it: {k} {v}.", "{k}: {v}."]
        ).format(k=key.replace("_", " "), v=value)
    if what < 0.5:
        keys = distinct(r, 2)
        values = [r.choice([r.randint(1, 99), r.choice(vocabulary()), r.choice(COLORS)]) for _ in keys]
        return json.dumps(
            dict(zip(keys, values, strict=True))
        ), f"The {keys[0]} is {values[0]} and the {keys[1]} is {values[1]}."
    if what < 0.7:
        return json.dumps({"status": "ok"}), r.choice(["Done.", "It is done.", f"The {f.thing} is done.", "All set."])
    if what < 0.85:
        given = code(r)
        return json.dumps({"status": "ok", "id": given}), r.choice(
            ["Done. The id is {}.", "It worked. The id is {}."]
        ).format(given)
    reason = r.choice(["not found", "not available", "no permission", "the service is closed", "try again later"])
    return json.dumps({"error": reason}), f"Sorry, that did not work: {reason}."


def _ask_and_call(r: R, f: Function, alone: bool) -> list[Document]:
    """A request, the call or calls that it leads to, and perhaps a question back in between.

    alone: no other function is offered."""
    if f.scene:
        request, arguments = _say(r, f)
    else:
        arguments = _arguments(r, f)
        request = _request(r, f, arguments, alone)
    needed = [p for p in f.parameters if p.required and p.name in arguments and p.phrases]
    said: Document = {"role": "assistant", "content": "", "tool_calls": [{"name": f.name, "arguments": arguments}]}
    if r.random() < 0.06:
        said["content"] = r.choice(["I will do that now.", f"Let me see to the {f.thing}.", "One moment."])
    if needed and r.random() < 0.06:  # the request lacks something: ask
        missing = r.choice(needed)
        given = {k: v for k, v in arguments.items() if k != missing.name}
        name = missing.name.replace("_", " ")
        reply = r.choice(["{}", "{}.", "It is {}.", "Use {}.", "{} please."]).format(_spoken(arguments[missing.name]))
        return [
            {"role": "user", "content": _request(r, f, given, alone)},
            {"role": "assistant", "content": r.choice([f"Which {name} should I use?", f"What is the {name}?"])},
            {"role": "user", "content": reply},
            said,
        ]
    if f.parameters and not f.scene and r.random() < 0.1:  # the same for two
        first = f.parameters[0]
        other = arguments | {first.name: first.value(r)}
        if other != arguments and first.phrases:
            also = r.choice([", and the same for {}.", " and also for {}.", ". Then again for {}."])
            request = request.rstrip(".! ") + also.format(_spoken(other[first.name]))
            said["tool_calls"].append({"name": f.name, "arguments": other})
    return [{"role": "user", "content": request}, said]


SYSTEMS = ("You are a helpful assistant.", "Use the functions when they help.", "You help people with simple jobs.", "You are {}, a friendly helper.")  # fmt: skip


def conversation(r: R) -> Document:
    """One conversation: calls, several of one or more functions, questions back, and answers that need no function."""
    functions: list[Function] = []
    for _ in range(r.choice([1, 2, 2, 2, 3, 3, 4])):
        f = _everyday(r) if r.random() < 0.6 else _function(r)
        if all(f.name != other.name and f.thing != other.thing for other in functions):
            functions.append(f)
    doc: Document = {"c": "tools", "tools": [f.schema() for f in functions], "m": []}
    messages = doc["m"]
    if r.random() < 0.2:
        messages.append({"role": "system", "content": r.choice(SYSTEMS).format(r.choice(NAMES))})
    requests = r.choice([1, 1, 1, 2, 2, 3])
    for i in range(requests):
        if r.random() < 0.12:
            question, answer = r.choice(ORDINARY) if r.random() < 0.5 else questions.single(r)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            continue
        f = r.choice(functions)
        messages += _ask_and_call(r, f, len(functions) == 1)
        if i < requests - 1 or r.random() < 0.3:
            results = [_result(r, f) for _ in messages[-1]["tool_calls"]]
            messages += [{"role": "tool", "content": response} for response, _ in results]
            messages.append({"role": "assistant", "content": " ".join(dict.fromkeys(answer for _, answer in results))})
        elif r.random() < 0.15:
            doc["think"] = True
            messages[-1]["reasoning_content"] = f"The user asks for {f.thing}. I call {f.name}."
    return doc
