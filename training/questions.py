"""Simple questions with right answers: facts from tables, sums, words (WordNet), greetings, and chats that remember."""

from __future__ import annotations

import random

from .chat import Document
from .facts import FAMILIES, reword
from .unseen import QUESTIONS
from .values import made_up
from .words import COLORS, NAMES, a, senses

__all__ = ["ask", "single"]

R = random.Random
Turns = list[tuple[str, str]]
# country, capital, continent, language
COUNTRIES = [
    tuple(line.split(","))
    for line in """France,Paris,Europe,French
Spain,Madrid,Europe,Spanish
Italy,Rome,Europe,Italian
Germany,Berlin,Europe,German
Austria,Vienna,Europe,German
Norway,Oslo,Europe,Norwegian
Sweden,Stockholm,Europe,Swedish
Denmark,Copenhagen,Europe,Danish
Finland,Helsinki,Europe,Finnish
Poland,Warsaw,Europe,Polish
Portugal,Lisbon,Europe,Portuguese
Greece,Athens,Europe,Greek
Ireland,Dublin,Europe,English
Hungary,Budapest,Europe,Hungarian
Russia,Moscow,Europe and Asia,Russian
Ukraine,Kyiv,Europe,Ukrainian
Turkey,Ankara,Europe and Asia,Turkish
Egypt,Cairo,Africa,Arabic
Kenya,Nairobi,Africa,Swahili and English
Ghana,Accra,Africa,English
Nigeria,Abuja,Africa,English
Morocco,Rabat,Africa,Arabic
Japan,Tokyo,Asia,Japanese
China,Beijing,Asia,Chinese
South Korea,Seoul,Asia,Korean
India,New Delhi,Asia,Hindi and English
Thailand,Bangkok,Asia,Thai
Vietnam,Hanoi,Asia,Vietnamese
Mexico,Mexico City,North America,Spanish
Canada,Ottawa,North America,English and French
Cuba,Havana,North America,Spanish
Brazil,Brasilia,South America,Portuguese
Peru,Lima,South America,Spanish
Chile,Santiago,South America,Spanish
Argentina,Buenos Aires,South America,Spanish
Colombia,Bogota,South America,Spanish
Australia,Canberra,Australia,English""".splitlines()
]
OPPOSITES = (
    "hot cold,big small,tall short,fast slow,happy sad,day night,up down,left right,open closed,wet dry,old young,new old,hard soft"
    ",light dark,full empty,early late,near far,clean dirty,rich poor,strong weak,high low,loud quiet,good bad,first last,inside outside"
    ",begin end,push pull,win lose,buy sell,give take,front back,thick thin,wide narrow,sweet sour,true false,always never,summer winter"
).split(",")  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
CHAT: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("Hello!", "Hi!", "Hi there!", "Hello", "Hey!", "hi", "hello there"), ("Hello! How can I help you?", "Hi! What can I do for you today?", "Hello! It is nice to meet you.")),
    (("Good morning!", "Good morning."), ("Good morning! I hope you slept well.", "Good morning! What are your plans for today?")),
    (("Good night!", "Good night."), ("Good night! Sleep well.", "Good night, and sweet dreams.")),
    (("How are you?", "How are you today?", "How do you do?"), ("I am fine, thank you. How are you?", "I am well, thanks for asking! And you?")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?", "Are you a human?", "Do you have a name?", "Are you a person?", "Who am I talking to?", "Please say who you are.", "Am I talking to a machine?", "What should I call you?", "Present yourself.", "Who is there?", "Is this a real person?"), ("I am a small language model that comes with expertstream. I can tell short stories and answer simple questions.", "I am expertstream's small built-in model. I am a computer program, not a person.")),
    (("What can you do?", "How can you help me?", "What are you good at?"), ("I can tell a short story, answer simple questions, chat a little, and call functions that you give me.",)),
    (("Who made you?", "Who trained you?", "Where do you come from?"), ("I was trained by the expertstream project.",)),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much.", "thanks"), ("You are welcome!", "You are welcome! I am glad I could help.", "My pleasure!")),
    (("Bye!", "Goodbye!", "See you later.", "I have to go now."), ("Goodbye! Have a nice day.", "Bye! See you soon.", "Goodbye, and take care!")),
    (("I am sad.", "I feel sad today.", "I had a bad day.", "I am not happy today."), ("I am sorry to hear that. Do you want to tell me what happened?", "I am sorry. Sometimes it helps to talk about it or to take a walk.")),
    (("I am happy!", "I feel great today.", "Today was a good day.", "I am so happy today."), ("That is wonderful! What made you so happy?", "I am glad to hear that!")),
    (("I am tired.", "I am so tired.", "I did not sleep well."), ("Then you should rest a little. A short nap can help.", "I am sorry to hear that. Maybe you can go to bed early tonight.")),
    (("I am bored.", "I have nothing to do.", "What should I do?"), ("You could read a book, draw a picture or go for a walk.", "Shall I tell you a story?")),
    (("I am hungry.", "I want something to eat.", "What should I eat?"), ("How about some bread with cheese, or an apple?", "You could make soup. It is warm and easy.")),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh."), ("Why did the book go to the doctor? Because it had too many pages torn out!", "What do you call a sleeping bull? A bulldozer!", "Why was the math book sad? It had too many problems.")),
    (("What do you like?", "What is your favorite thing?", "What do you like to do?"), ("I like short stories with a happy end.",)),
    (("Do you like music?", "Do you like animals?", "Do you like books?"), ("I cannot see or hear, but I like to talk about it. Do you?",)),
    (("It is raining today.", "The weather is bad."), ("Then it is a good day to stay inside with a book and some tea.",)),
    (("The sun is shining.", "It is a beautiful day.", "The weather is nice today."), ("That is nice! It is a good day for a walk.",)),
    (("I am afraid.", "I am scared.", "I am nervous about tomorrow."), ("I understand. Take a deep breath. You can do this.", "It is normal to feel that way. Do you want to tell me more?")),
    (("I have a dog.", "I have a cat.", "I got a new pet."), ("How nice! What is its name?",)),
    (("I like you.", "You are nice.", "Well done!"), ("Thank you! That is kind of you.",)),
]  # fmt: skip


def _sum(r: R) -> tuple[str, str]:
    x, y = r.randint(0, 20), r.randint(0, 20)
    if r.random() < 0.3:
        x, y = r.randint(0, 99), r.randint(0, 99)
    kind = r.choice("+-*")
    if kind == "*":
        x, y = r.randint(0, 10), r.randint(0, 10)
    if kind == "-" and y > x:
        x, y = y, x
    result = {"+": x + y, "-": x - y, "*": x * y}[kind]
    word = {"+": "plus", "-": "minus", "*": "times"}[kind]
    if x <= 20 and y <= 20 and result <= 20 and r.random() < 0.25:
        a_, b_, c_ = NUMBERS[x], NUMBERS[y], NUMBERS[result]
        return f"What is {a_} {word} {b_}?", f"{a_.capitalize()} {word} {b_} is {c_}."
    question = r.choice(
        [
            f"What is {x} {word} {y}?",
            f"What is {x} {kind} {y}?",
            f"{x} {kind} {y} = ?",
            f"How much is {x} {word} {y}?",
            f"Can you calculate {x} {kind} {y}?",
            f"{x} {word} {y}?",
            *{
                "+": (
                    f"Sum of {x} and {y}?",
                    f"{x} and {y} together?",
                    f"I have {x} and get {y} more. How many do I have?",
                    f"{y} more than {x}?",
                    f"The sum of {x} and {y}, please.",
                    f"Count {x} and {y} together.",
                    f"Put {x} and {y} together, what is it?",
                    f"{x} and {y} make what?",
                    f"What is the sum of {x} and {y}?",
                    f"Increase {x} by {y}.",
                    f"There are {x} birds and {y} more come. How many birds are there?",
                    f"If I add {y} to {x}, what comes out?",
                ),
                "-": (
                    f"{x} less {y}?",
                    f"I have {x} and give away {y}. How many are left?",
                    f"What is left of {x} without {y}?",
                    f"Subtract {y} from {x}.",
                    f"{y} less than {x}?",
                    f"The difference of {x} and {y}?",
                    f"Take {y} from {x}.",
                    f"If you take {y} off {x}, what remains?",
                    f"{x} reduced by {y}?",
                    f"There are {x} birds and {y} fly away. How many stay?",
                    f"{y} taken from {x} leaves what?",
                    f"Remove {y} out of {x}.",
                ),
                "*": (
                    f"The product of {x} and {y}?",
                    f"{x} groups of {y}, how many?",
                    f"What is {x} multiplied by {y}?",
                    f"{x} by {y}?",
                    f"How many are {x} times {y}?",
                    f"If {x} people have {y} each, how many is that?",
                    f"Multiply {x} and {y}.",
                    f"{x} times {y} makes what?",
                    f"{y} taken {x} times is how much?",
                    f"What do you get for {x} times {y}?",
                    f"There are {x} boxes with {y} balls each. How many balls?",
                ),
            }[kind],
        ]
    )
    return question, f"{x} {word} {y} is {result}."


def _country(r: R) -> tuple[str, str]:
    country, capital, continent, language = r.choice(COUNTRIES)
    other = r.choice([c[0] for c in COUNTRIES if c[0] != country])
    return r.choice([
        (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
        (f"Which city is the capital of {country}?", f"The capital of {country} is {capital}."),
        (f"Do you know the capital of {country}?", f"Yes, the capital of {country} is {capital}."),
        (f"Tell me the capital of {country}.", f"The capital of {country} is {capital}."),
        (f"{capital} is the capital of which country?", f"{capital} is the capital of {country}."),
        (f"Where is {country}?", f"{country} is in {continent}."),
        (f"On which continent is {country}?", f"{country} is in {continent}."),
        (f"What language do people speak in {country}?", f"In {country}, people speak {language}."),
        (f"Which language is spoken in {country}?", f"In {country}, people speak {language}."),
        (f"{country} has which capital?", f"The capital of {country} is {capital}."),
        (f"I forgot the capital of {country}.", f"The capital of {country} is {capital}."),
        (f"Give me the capital of {country}.", f"The capital of {country} is {capital}."),
        (f"{country}, what is its capital?", f"The capital of {country} is {capital}."),
        (f"The capital of {country}, please.", f"The capital of {country} is {capital}."),
        (f"Which city do they call the capital of {country}?", f"The capital of {country} is {capital}."),
        (f"In which country is {capital}?", f"{capital} is in {country}."),
        (f"Where is {capital}?", f"{capital} is in {country}."),
        (f"Is {capital} in {country} or in {other}?", f"{capital} is in {country}."),
        (f"Is {capital} in {other} or in {country}?", f"{capital} is in {country}."),
        (f"{country} is on which continent?", f"{country} is in {continent}."),
        (f"In what part of the world is {country}?", f"{country} is in {continent}."),
        (f"Which continent has {country}?", f"{country} is in {continent}."),
        (f"Where in the world do I find {country}?", f"{country} is in {continent}."),
        (f"What is spoken in {country}?", f"In {country}, people speak {language}."),
        (f"How do people talk in {country}?", f"In {country}, people speak {language}."),
        (f"Which language should I learn for {country}?", f"In {country}, people speak {language}."),
        (f"The language of {country}?", f"In {country}, people speak {language}."),
        (f"Which language do I need in {country}?", f"In {country}, people speak {language}."),
        (f"I travel to {country}. What will I hear people speak?", f"In {country}, people speak {language}."),
        (f"{country}'s language?", f"In {country}, people speak {language}."),
        (f"{country}'s capital?", f"The capital of {country} is {capital}."),
        (f"Which is {country}'s capital city?", f"The capital of {country} is {capital}."),
        (f"How is the capital of {country} called?", f"The capital of {country} is {capital}."),
        (f"Capital city of {country}, what is it?", f"The capital of {country} is {capital}."),
        (f"{country} and its capital?", f"The capital of {country} is {capital}."),
        (f"From which city is {country} governed?", f"The capital of {country} is {capital}."),
        (f"Say {country}'s capital.", f"The capital of {country} is {capital}."),
        (f"The government of {country} sits in which city?", f"The capital of {country} is {capital}."),
        (f"To which continent does {country} belong?", f"{country} is in {continent}."),
        (f"{country}'s continent?", f"{country} is in {continent}."),
        (f"{capital} belongs to which country?", f"{capital} is in {country}."),
        (f"Does {capital} lie in {other} or {country}?", f"{capital} is in {country}."),
    ])  # fmt: skip


def _opposite(r: R) -> tuple[str, str]:
    x, y = r.choice(OPPOSITES).split()
    if r.random() < 0.5 and x != "new":
        x, y = y, x
    if x == "old":
        y = "young"
    return r.choice(
        [
            f"What is the opposite of {x}?",
            f'What is the opposite of "{x}"?',
            f"Which word is the opposite of {x}?",
            f"It is not {x}. What is it then?",
            f"Name the opposite of {x}.",
            f"{x} and its opposite?",
            f"I need a word that means the opposite of {x}.",
            f"{x} is the opposite of which word?",
            f"What is not {x}?",
            f"The opposite of {x}, please.",
            f"Do you know the opposite of {x}?",
            f"What is the contrary of {x}?",
            f"{x.capitalize()} against what?",
            f"What would be the opposite of {x}?",
            f"Say the opposite of {x}.",
            f"If something is not {x}, it is ...",
            f"{x.capitalize()}: opposite?",
            f"Find the opposite of {x}.",
        ]
    ), f"The opposite of {x} is {y}."


def _order(r: R) -> tuple[str, str]:
    words, what = r.choice([(DAYS, "day"), (MONTHS, "month")])
    i = r.randrange(len(words))
    now, after, before = words[i], words[(i + 1) % len(words)], words[i - 1]
    n = r.randint(0, 98)
    return r.choice([
        (f"Which {what} comes after {now}?", f"{after} comes after {now}."),
        (f"What {what} comes before {now}?", f"{before} comes before {now}."),
        (f"What comes after {now}?", f"{after} comes after {now}."),
        (f"What number comes after {n}?", f"{n + 1} comes after {n}."),
        (f"What number comes before {n + 1}?", f"{n} comes before {n + 1}."),
        (f"After {now} comes which {what}?", f"{after} comes after {now}."),
        (f"The {what} after {now}?", f"{after} comes after {now}."),
        (f"The {what} before {now}?", f"{before} comes before {now}."),
        (f"Before {now} there is which {what}?", f"{before} comes before {now}."),
        (f"It is {now}. Which {what} is next?", f"{after} comes after {now}."),
        (f"It is {now}. Which {what} was the last one?", f"{before} comes before {now}."),
        (f"Next {what} after {now}?", f"{after} comes after {now}."),
        (f"Which {what} is before {now}?", f"{before} comes before {now}."),
        (f"What is one more than {n}?", f"{n + 1} comes after {n}."),
        (f"Count on from {n}.", f"{n + 1} comes after {n}."),
        (f"After {n} comes which number?", f"{n + 1} comes after {n}."),
        (f"Before {n + 1} comes which number?", f"{n} comes before {n + 1}."),
        (f"What is just below {n + 1}?", f"{n} comes before {n + 1}."),
        (f"What {what} do we have after {now}?", f"{after} comes after {now}."),
        (f"What {what} did we have before {now}?", f"{before} comes before {now}."),
        (f"{now} is over. What {what} is it now?", f"{after} comes after {now}."),
        (f"Tomorrow, after {now}, what {what} will it be?" if what == "day" else f"What month will it be when {now} ends?", f"{after} comes after {now}."),
        (f"Which {what} is between {before} and {after}?", f"{now} is between {before} and {after}."),
        (f"Which {what} came right before {now}?", f"{before} comes before {now}."),
        (f"The number after {n}?", f"{n + 1} comes after {n}."),
        (f"The number before {n + 1}?", f"{n} comes before {n + 1}."),
        (f"What is {n + 1} less one?", f"{n} comes before {n + 1}."),
        (f"One less than {n + 1}, what is that?", f"{n} comes before {n + 1}."),
        (f"Which number is one more than {n}?", f"{n + 1} comes after {n}."),
        (f"Which is bigger, {n} or {n + i + 1}?", f"{n + i + 1} is bigger than {n}."),
    ])  # fmt: skip


def _word(r: R) -> tuple[str, str]:
    """What a word means. Words that are used more are asked for more."""
    sense = senses()[min(int(r.expovariate(1 / 2500)), 9000)]
    name = f'"{sense.word}"'
    forms = (f"What does {name} mean?", f"What does the word {name} mean?", f"Define {name}.", f"What is the meaning of {sense.word}?", f"Explain the word {name}.")  # fmt: skip
    kind = {"noun": "a noun", "verb": "a verb", "adj": "an adjective", "adv": "an adverb"}[sense.kind]
    answer = r.choice(
        [
            f"{sense.word.capitalize()} is {kind}. It means: {sense.gloss}.",
            f"{sense.word.capitalize()} means {sense.gloss}.",
        ]
    )
    what = r.random()
    if sense.examples and what < 0.35:
        example = sense.examples[0]
        return r.choice(
            [f"Use {name} in a sentence.", f"Give me an example with {name}.", f"Write a sentence with {name}."]
        ), example[0].upper() + example[1:] + "."
    if sense.examples and what < 0.5:
        answer += f' For example: "{sense.examples[0]}".'
    if sense.kind == "noun" and sense.hypernym and 0.5 < what < 0.6:
        return r.choice(
            [f"What kind of thing is {a(sense.word)}?", f"Is {a(sense.word)} a kind of {sense.hypernym}?"]
        ), f"{a(sense.word).capitalize()} is a kind of {sense.hypernym}."
    return r.choice(forms), answer


def _table(r: R) -> tuple[str, str]:
    return r.choice(FAMILIES)(r)


def _bare(question: str) -> str:
    return question.lower().strip(" ?.!")


_UNSEEN = frozenset(_bare(question) for question, _ in QUESTIONS)  # what the evaluation asks is never made


def _memory(r: R) -> Turns:
    """Something is said, and asked for later."""
    name = r.choice(NAMES) if r.random() < 0.5 else made_up(r)
    color, number = r.choice(COLORS), r.randint(2, 90)
    word = r.choice(senses()[:3000]).word
    said = r.choice([
        (f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."),
        (f"Hi, I am {name}.", f"Hello {name}! How are you?", "Do you remember my name?", f"Yes, your name is {name}."),
        (f"My favorite color is {color}.", f"{color.capitalize()} is a nice color!", "Which color do I like best?", f"Your favorite color is {color}."),
        (f"I am {number} years old.", "Thank you for telling me.", "How old am I?", f"You are {number} years old."),
        (f"My dog is called {name}.", f"{name} is a good name for a dog.", "What is the name of my dog?", f"Your dog is called {name}."),
        (f"Please remember the word {word}.", f"I will remember the word {word}.", "Which word should you remember?", f"The word is {word}."),
        (f"My cat {name} is {color}.", f"{name} sounds lovely!", "What color is my cat?", f"Your cat {name} is {color}."),
        (f"I bought {number} {r.choice(['apples', 'eggs', 'books', 'pens'])}.", "That is a lot!", "How many did I buy?", f"You bought {number}."),
    ])  # fmt: skip
    between = [single(r) for _ in range(r.choice([0, 0, 1, 1, 2]))]
    return [(said[0], said[1]), *between, (said[2], said[3])]


def _copy(r: R) -> tuple[str, str]:
    """Something to say again, which a name that it has not seen needs."""
    letters = "".join(r.choice("bcdfghjklmnprstvw") + r.choice("aeiou") for _ in range(r.randint(2, 4)))
    word = r.choice([letters, letters.capitalize(), r.choice(senses()[:6000]).word, f"{letters} {r.randint(1, 999)}"])
    return r.choice([
        (f"Say {word}.", f"{word}"), (f"Repeat after me: {word}", f"{word}"), (f'Write "{word}" twice.', f"{word} {word}"),
        (f"My friend is called {word.capitalize()}.", f"{word.capitalize()} is a nice name!"), (f"Spell {word}.", "-".join(word)),
        (f"I live in {word.capitalize()}.", f"I hope that it is nice in {word.capitalize()}."), (f"Hello, I am {word.capitalize()}!", f"Hello, {word.capitalize()}! Nice to meet you."),
    ])  # fmt: skip


def _chat(r: R) -> tuple[str, str]:
    asked, answers = r.choice(CHAT)
    return r.choice(asked), r.choice(answers)


def single(r: R) -> tuple[str, str]:
    kind = r.choices(
        [_table, _sum, _country, _opposite, _order, _word, _chat, _copy],
        [13, 6, 5, 3, 4, 4, 4, 2],
    )[0]
    question, answer = kind(r)
    if kind not in (_chat, _copy, _word):
        question = reword(r, question)
    return single(r) if _bare(question) in _UNSEEN else (question, answer)


def ask(r: R) -> Document:
    """One to four questions with their answers."""
    turns = _memory(r) if r.random() < 0.2 else [single(r) for _ in range(r.choice([1, 1, 1, 1, 2, 2, 3]))]
    if r.random() < 0.1:
        turns.insert(0, _chat(r))
    messages = []
    if r.random() < 0.1:
        messages.append(
            {
                "role": "system",
                "content": r.choice(
                    ["You are a helpful assistant.", "Answer in short, simple sentences.", "You are a kind helper."]
                ),
            }
        )
    for asked, answer in turns:
        question = asked[0].lower() + asked[1:] if r.random() < 0.08 else asked
        question = question.rstrip("?.!") if r.random() < 0.05 else question
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"c": "questions", "m": messages, "think": r.random() < 0.1}
