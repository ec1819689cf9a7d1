"""Simple questions with right answers: facts from tables, sums, words (WordNet), greetings, and chats that remember."""

from __future__ import annotations

import random

from .chat import Document
from .facts import FAMILIES, reword
from .unseen import QUESTIONS
from .words import COLORS, NAMES, a, senses

__all__ = ["ask"]

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
# animal, its sound, its young, legs, where it lives
ANIMALS = [
    tuple(line.split(","))
    for line in """dog,woof,puppy,four,in a house with people
cat,meow,kitten,four,in a house with people
cow,moo,calf,four,on a farm
sheep,baa,lamb,four,on a farm
pig,oink,piglet,four,on a farm
horse,neigh,foal,four,on a farm
duck,quack,duckling,two,on a pond
hen,cluck,chick,two,on a farm
frog,ribbit,tadpole,four,near ponds
owl,hoot,owlet,two,in the forest
lion,roar,cub,four,in the grasslands of Africa
bear,growl,cub,four,in the forest
goat,bleat,kid,four,on a farm
bee,buzz,larva,six,in a hive
goose,honk,gosling,two,near lakes
wolf,howl,pup,four,in the forest""".splitlines()
]
OPPOSITES = (
    "hot cold,big small,tall short,fast slow,happy sad,day night,up down,left right,open closed,wet dry,old young,new old,hard soft"
    ",light dark,full empty,early late,near far,clean dirty,rich poor,strong weak,high low,loud quiet,good bad,first last,inside outside"
    ",begin end,push pull,win lose,buy sell,give take,front back,thick thin,wide narrow,sweet sour,true false,always never,summer winter"
).split(",")  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
# question forms | answer
FACTS = [
    line.split("|")
    for line in """What color is the sky?/What is the color of the sky?/Which color does the sky have on a clear day?|The sky is blue.
What color is grass?/What is the color of grass?|Grass is green.
What color is snow?/What is the color of snow?|Snow is white.
What color is a banana?/Which color do bananas have?|A banana is yellow.
What color is blood?/What is the color of blood?|Blood is red.
What color is a tomato?/Which color does a ripe tomato have?|A ripe tomato is red.
What color is coal?|Coal is black.
What color is an orange?|An orange is orange.
How many days are in a week?/How many days does a week have?|There are seven days in a week.
How many months are in a year?/How many months does a year have?|There are twelve months in a year.
How many hours are in a day?/How many hours does a day have?|There are 24 hours in a day.
How many minutes are in an hour?/How many minutes does an hour have?|There are 60 minutes in an hour.
How many seconds are in a minute?/How many seconds does a minute have?|There are 60 seconds in a minute.
How many days are in a year?/How many days does a year have?|There are 365 days in a year, and 366 in a leap year.
How many legs does a spider have?|A spider has eight legs.
How many legs does an insect have?|An insect has six legs.
How many legs does a bird have?|A bird has two legs.
How many fingers are on one hand?/How many fingers does a hand have?|There are five fingers on one hand.
How many sides does a triangle have?/How many corners does a triangle have?|A triangle has three of them.
How many sides does a square have?/How many corners does a square have?|A square has four of them.
How many wheels does a bicycle have?/How many wheels does a bike have?|A bicycle has two wheels.
How many wheels does a car have?|A car has four wheels.
How many eyes do people have?/How many eyes does a person have?|A person has two eyes.
How many letters are in the alphabet?/How many letters does the English alphabet have?|There are 26 letters in the English alphabet.
How many seasons are in a year?/How many seasons are there?|There are four seasons: spring, summer, autumn and winter.
How many planets are in the solar system?/How many planets go around the sun?|There are eight planets in the solar system.
How many continents are there?|There are seven continents.
What is the largest planet?/Which planet is the largest?|The largest planet is Jupiter.
What is the closest planet to the sun?/Which planet is nearest to the sun?|Mercury is the closest planet to the sun.
Which planet do we live on?/What planet do we live on?|We live on the planet Earth.
Which planet is called the red planet?/What is the red planet?|Mars is called the red planet.
What is the largest ocean?/Which ocean is the largest?|The largest ocean is the Pacific Ocean.
What is the tallest mountain?/Which mountain is the highest in the world?|The tallest mountain is Mount Everest.
What is the longest river?/Which river is the longest?|The Nile is often called the longest river.
What is the largest animal?/Which animal is the biggest?|The largest animal is the blue whale.
What is the tallest animal?/Which animal is the tallest?|The tallest animal is the giraffe.
What is the fastest land animal?/Which animal runs the fastest?|The fastest land animal is the cheetah.
What do cows drink?|Cows drink water.
What do bees make?/What does a bee make?|Bees make honey.
What do hens lay?/What does a hen lay?|Hens lay eggs.
What do cows give us?/What do we get from cows?|Cows give us milk.
What do sheep give us?/What do we get from sheep?|Sheep give us wool.
What do rabbits eat?/What does a rabbit eat?|Rabbits eat grass and carrots.
What do cats eat?|Cats eat meat and fish.
What do pandas eat?|Pandas eat bamboo.
What do plants need to grow?/What does a plant need?|Plants need water, light and air to grow.
What is ice made of?/What is ice?|Ice is frozen water.
What is water made of?|Water is made of hydrogen and oxygen.
What is bread made of?/What is bread made from?|Bread is made from flour, water and yeast.
What is cheese made of?/What is cheese made from?|Cheese is made from milk.
What is paper made of?/What is paper made from?|Paper is made from wood.
What is glass made of?/What is glass made from?|Glass is made from sand.
What is the sun?|The sun is a star. It gives us light and warmth.
What is the moon?|The moon is a ball of rock that goes around the Earth.
What is a star?|A star is a hot ball of gas that gives off light.
What is rain?|Rain is water that falls from the clouds in drops.
What is snow?|Snow is frozen water that falls from the clouds in flakes.
What is a cloud?/What are clouds?|A cloud is made of tiny drops of water in the air.
What is a volcano?|A volcano is a mountain from which hot melted rock can come out.
What is a desert?|A desert is a dry place where it rains very little.
What is an island?|An island is land with water all around it.
What is a river?|A river is a long stream of water that flows to a lake or the sea.
What is gravity?|Gravity is the force that pulls things down to the ground.
What is a library?|A library is a place where you can read and borrow books.
What is a hospital?|A hospital is a place where sick people get help.
What is a museum?|A museum is a place where people can look at old or beautiful things.
What is a computer?|A computer is a machine that works with information.
What is the internet?|The internet is a network that connects computers all over the world.
What do you use to write?/What can I write with?|You can write with a pen or a pencil.
What do you use to cut paper?|You can cut paper with scissors.
What do you wear on your feet?|You wear shoes and socks on your feet.
What do you wear on your head?|You wear a hat on your head.
What do we see with?/What do people see with?|We see with our eyes.
What do we hear with?/What do people hear with?|We hear with our ears.
What do we smell with?/What do people smell with?|We smell with our nose.
What does a doctor do?|A doctor helps people who are sick.
What does a teacher do?|A teacher helps people learn.
What does a baker do?|A baker makes bread and cakes.
What does a farmer do?|A farmer grows food and keeps animals.
What does a pilot do?|A pilot flies a plane.
What does a firefighter do?|A firefighter puts out fires and saves people.
What does a cook do?|A cook makes meals.
Why is the sky blue?|The sky is blue because air scatters blue light more than the other colors.
Why do we sleep?/Why do people sleep?|We sleep so that our body and mind can rest.
Why do birds fly south?|Many birds fly south in winter because it is warmer and there is more food.
Why do leaves fall?|In autumn, many trees drop their leaves to save water and energy for the winter.
Why do we brush our teeth?|We brush our teeth to keep them clean and healthy.
Why is the sea salty?|The sea is salty because rivers carry salt from the rocks into it.
When does the sun rise?/When does the sun come up?|The sun rises in the morning.
When does the sun set?/When does the sun go down?|The sun sets in the evening.
Where does the sun rise?|The sun rises in the east.
Where does the sun set?|The sun sets in the west.
Where do fish live?|Fish live in water.
Where do bees live?|Bees live in a hive.
Where do penguins live?|Many penguins live near the South Pole.
Where do polar bears live?|Polar bears live near the North Pole.
Where do camels live?|Camels live in the desert.
Can fish fly?|Most fish cannot fly. They swim.
Can birds fly?|Most birds can fly, but penguins and ostriches cannot.
Can dogs talk?|Dogs cannot talk, but they bark.
Is fire hot?/Is fire hot or cold?|Fire is hot.
Is ice cold?/Is ice hot or cold?|Ice is cold.
Is the Earth flat?/Is the Earth round or flat?|The Earth is not flat. It is round like a ball.
Who wrote Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.
What comes after Monday?|Tuesday comes after Monday.
What language do people speak in England?|People speak English in England.
What is the capital of England?/What is the capital of the United Kingdom?|The capital of England is London.
What is the capital of the United States?/What is the capital of America?|The capital of the United States is Washington, D.C.
What is frozen water called?|Frozen water is called ice.
What season comes after winter?|Spring comes after winter.
What season comes after summer?|Autumn comes after summer.
What do you call a baby dog?|A baby dog is called a puppy.
What do you call a baby cat?|A baby cat is called a kitten.""".splitlines()
]
CHAT: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("Hello!", "Hi!", "Hi there!", "Hello", "Hey!", "hi", "hello there"), ("Hello! How can I help you?", "Hi! What can I do for you today?", "Hello! It is nice to meet you.")),
    (("Good morning!", "Good morning."), ("Good morning! I hope you slept well.", "Good morning! What are your plans for today?")),
    (("Good night!", "Good night."), ("Good night! Sleep well.", "Good night, and sweet dreams.")),
    (("How are you?", "How are you today?", "How do you do?"), ("I am fine, thank you. How are you?", "I am well, thanks for asking! And you?")),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?", "Are you a human?"), ("I am a small language model that comes with expertstream. I can tell short stories and answer simple questions.", "I am expertstream's small built-in model. I am a computer program, not a person.")),
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
                ),
                "-": (
                    f"{x} less {y}?",
                    f"I have {x} and give away {y}. How many are left?",
                    f"What is left of {x} without {y}?",
                    f"Subtract {y} from {x}.",
                    f"{y} less than {x}?",
                    f"The difference of {x} and {y}?",
                ),
                "*": (
                    f"The product of {x} and {y}?",
                    f"{x} groups of {y}, how many?",
                    f"What is {x} multiplied by {y}?",
                    f"{x} by {y}?",
                    f"How many are {x} times {y}?",
                    f"If {x} people have {y} each, how many is that?",
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
    ])  # fmt: skip


def _animal(r: R) -> tuple[str, str]:
    animal, sound, young, legs, home = r.choice(ANIMALS)
    return r.choice([
        (f"What sound does {a(animal)} make?", f"{a(animal).capitalize()} says \"{sound}\"."),
        (f"What does {a(animal)} say?", f"{a(animal).capitalize()} says \"{sound}\"."),
        (f"What is a baby {animal} called?", f"A baby {animal} is called {a(young)}."),
        (f"What do you call a young {animal}?", f"A young {animal} is called {a(young)}."),
        (f"How many legs does {a(animal)} have?", f"{a(animal).capitalize()} has {legs} legs."),
        (f"Where does {a(animal)} live?", f"{a(animal).capitalize()} lives {home}."),
        (f"Which animal says \"{sound}\"?", f"The {animal} says \"{sound}\"."),
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


def _fact(r: R) -> tuple[str, str]:
    forms, answer = r.choice(FACTS)
    return r.choice(forms.split("/")), answer


def _table(r: R) -> tuple[str, str]:
    return r.choice(FAMILIES)(r)


def _bare(question: str) -> str:
    return question.lower().strip(" ?.!")


_UNSEEN = frozenset(_bare(question) for question, _ in QUESTIONS)  # what the evaluation asks is never made


def _memory(r: R) -> Turns:
    """Something is said, and asked for later."""
    name = (
        r.choice(NAMES)
        if r.random() < 0.5
        else "".join(r.choice("bdfgklmnprst") + r.choice("aeio") for _ in range(3)).capitalize()
    )
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
    between = [_single(r) for _ in range(r.choice([0, 0, 1, 1, 2]))]
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


def _single(r: R) -> tuple[str, str]:
    kind = r.choices(
        [_fact, _table, _sum, _country, _animal, _opposite, _order, _word, _chat, _copy],
        [4, 8, 5, 4, 1, 2, 3, 5, 4, 3],
    )[0]
    question, answer = kind(r)
    if kind not in (_chat, _copy, _word):
        question = reword(r, question)
    return _single(r) if _bare(question) in _UNSEEN else (question, answer)


def ask(r: R) -> Document:
    """One to four questions with their answers."""
    turns = _memory(r) if r.random() < 0.2 else [_single(r) for _ in range(r.choice([1, 1, 1, 1, 2, 2, 3]))]
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
