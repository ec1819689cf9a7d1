"""Simple facts as tables, each asked in many ways: one wording teaches a model the wording, ten teach it the fact."""

from __future__ import annotations

import random

from .values import made_up
from .words import COLORS, NAMES, a

__all__ = ["FAMILIES", "reword"]

R = random.Random
COLORED = "the sky,blue;grass,green;snow,white;a banana,yellow;blood,red;a ripe tomato,red;coal,black;an orange,orange;milk,white;a lemon,yellow;a frog,green;a strawberry,red;the sea,blue;chocolate,brown;a carrot,orange;the night sky,black;a cloud,white;a leaf in summer,green;an elephant,gray;a crow,black"
COUNTED = "a week,days,seven;a year,months,twelve;a day,hours,24;an hour,minutes,60;a minute,seconds,60;a year,days,365;a year,seasons,four;a year,weeks,52;a spider,legs,eight;an insect,legs,six;a bird,legs,two;a dog,legs,four;a cat,legs,four;a horse,legs,four;a person,legs,two;a hand,fingers,five;a person,eyes,two;a person,ears,two;a triangle,sides,three;a square,sides,four;a square,corners,four;a bicycle,wheels,two;a car,wheels,four;a tricycle,wheels,three;the alphabet,letters,26;the solar system,planets,eight;the world,continents,seven;the Earth,moons,one;an octopus,arms,eight;a dozen,pieces,twelve"
GREATEST = "planet,largest/biggest,Jupiter;planet,smallest,Mercury;planet,hottest,Venus;ocean,largest/biggest,the Pacific Ocean;mountain,tallest/highest,Mount Everest;river,longest,the Nile;animal,largest/biggest,the blue whale;animal,tallest,the giraffe;land animal,fastest,the cheetah;land animal,largest/biggest,the elephant;country,largest/biggest,Russia;continent,largest/biggest,Asia;bird,largest/biggest,the ostrich;planet to the sun,closest/nearest,Mercury;month,shortest,February"
MADE = "bread,flour, water and yeast;cheese,milk;butter,milk;paper,wood;glass,sand;ice,frozen water;chocolate,cocoa beans;wine,grapes;a book,paper;a window,glass;a sweater,wool;a table,wood;rain,drops of water;juice,fruit;a tire,rubber;a coin,metal;yogurt,milk;a candle,wax"
WORK = "doctor,helps people who are sick;teacher,helps people learn;baker,makes bread and cakes;farmer,grows food and keeps animals;pilot,flies planes;firefighter,puts out fires and saves people;cook,makes meals;painter,paints walls and pictures;tailor,makes clothes;sailor,works on a ship;dentist,takes care of teeth;gardener,takes care of plants;writer,writes books;singer,sings songs;judge,decides in court;nurse,takes care of sick people;driver,drives a car or a bus;fisherman,catches fish;carpenter,makes things of wood;police officer,keeps people safe"
SENSED = "see,eyes;hear,ears;smell,nose;taste,tongue;touch,hands;walk,legs;think,brain;chew,teeth;breathe,lungs"
GIVEN = "bees,make,honey;hens,lay,eggs;cows,give,milk;sheep,give,wool;spiders,make,webs;goats,give,milk;trees,give,wood and fruit;apple trees,give,apples;the sun,gives,light and warmth"
EATEN = "rabbits,grass and carrots;pandas,bamboo;cats,meat and fish;cows,grass;lions,meat;monkeys,fruit;horses,grass and hay;birds,seeds and insects;bees,nectar;owls,mice;frogs,insects;koalas,leaves"
HOMES = "fish,in water;bees,in a hive;penguins,near the South Pole;polar bears,near the North Pole;camels,in the desert;birds,in a nest;spiders,in a web;dogs,in a house with people;bears,in the forest;frogs,near ponds;rabbits,in a burrow;whales,in the sea;monkeys,in the jungle;lions,in the grasslands of Africa;sharks,in the sea;ants,in a nest under the ground"
WHAT = "the sun,a star. It gives us light and warmth;the moon,a ball of rock that goes around the Earth;a star,a hot ball of gas that gives off light;rain,water that falls from the clouds in drops;snow,frozen water that falls from the clouds in flakes;ice,frozen water;a volcano,a mountain from which hot melted rock can come out;a desert,a dry place where it rains very little;an island,land with water all around it;a river,a long stream of water that flows to a lake or the sea;gravity,the force that pulls things down to the ground;a library,a place where you can read and borrow books;a hospital,a place where sick people get help;a museum,a place where people can look at old or beautiful things;a computer,a machine that works with information;the internet,a network that connects computers all over the world;a school,a place where children learn;a bakery,a place where bread is made and sold;a forest,a large place with many trees;a lake,a large body of water with land around it;an airport,a place where planes start and land;a farm,a place where food is grown and animals are kept;a clock,a thing that shows the time;an umbrella,a thing that keeps you dry in the rain"
USED = "write,a pen or a pencil;cut paper,scissors;eat soup,a spoon;cut bread,a knife;dig a hole,a shovel;sweep the floor,a broom;open a lock,a key;see in the dark,a lamp;tell the time,a clock;brush your hair,a brush;hit a nail,a hammer;draw a line,a ruler;take a photo,a camera;stay dry in the rain,an umbrella"
WORN = "feet,shoes and socks;head,a hat;hands,gloves;neck,a scarf;eyes,glasses"
SOUNDS = "cow,cows,moo,calf;cat,cats,meow,kitten;dog,dogs,woof,puppy;duck,ducks,quack,duckling;sheep,sheep,baa,lamb;pig,pigs,oink,piglet;horse,horses,neigh,foal;hen,hens,cluck,chick;frog,frogs,ribbit,tadpole;owl,owls,hoot,owlet;lion,lions,roar,cub;bear,bears,growl,cub;goat,goats,bleat,kid;goose,geese,honk,gosling;wolf,wolves,howl,pup;bee,bees,buzz,larva"

# Questions that no table has: wordings | answer.
OTHER = [
    (tuple(line.split("|")[0].split("/")), line.split("|")[1])
    for line in """Why is the sky blue?/What makes the sky blue?/Tell me why the sky is blue./How come that the sky is blue?/The sky is blue, why?|The sky is blue because air scatters blue light more than the other colors.
Why do we sleep?/Why do people sleep?/What is sleep good for?/Why must I sleep?/Why do we go to bed?|We sleep so that our body and mind can rest.
Why do birds fly south?/Why do birds leave in winter?/Where do birds go in winter, and why?|Many birds fly south in winter because it is warmer and there is more food.
Why do leaves fall?/Why do trees lose their leaves?/What makes leaves fall in autumn?|In autumn, many trees drop their leaves to save water and energy for the winter.
Why do we brush our teeth?/Why should I brush my teeth?/What is it good for to brush teeth?|We brush our teeth to keep them clean and healthy.
Why is the sea salty?/What makes the sea salty?/Why is there salt in the sea?|The sea is salty because rivers carry salt from the rocks into it.
When does the sun rise?/When does the sun come up?/When do we see the sun rise?/The sun rises when?/At which time of the day does the sun rise?|The sun rises in the morning.
When does the sun set?/When does the sun go down?/The sun sets when?/At which time of the day does the sun set?|The sun sets in the evening.
Where does the sun rise?/The sun rises where?/In which direction does the sun rise?/Does the sun rise in the east or in the west?/From where does the sun come in the morning?/On which side do we see the sun rise?/In the morning, where is the sun?/Which direction shows the rising sun?|The sun rises in the east.
Where does the sun set?/The sun sets where?/In which direction does the sun set?/Does the sun set in the east or in the west?/Where is the sun in the evening?/On which side does the sun go down?/Which direction shows the setting sun?|The sun sets in the west.
Can fish fly?/Do fish fly?/Are there fish that fly?/Is a fish able to fly?|Most fish cannot fly. They swim.
Can birds fly?/Do all birds fly?/Is every bird able to fly?/Which birds cannot fly?|Most birds can fly, but penguins and ostriches cannot.
Do penguins fly?/Are penguins able to fly?/Is a penguin a bird that flies?/Have penguins ever flown?|Penguins cannot fly, but they swim very well.
Can an ostrich fly?/Do ostriches fly?/Are ostriches able to fly?|Ostriches cannot fly, but they run very fast.
Can dogs talk?/Do dogs talk?/Is a dog able to talk?|Dogs cannot talk, but they bark.
Can a cat swim?/Do cats swim?/Can cats swim?|Cats can swim, but most of them do not like water.
Is fire hot?/Is fire cold?/Is fire hot or cold?/Is fire cold or hot?/Is a fire warm?/How does fire feel?/What happens if I touch fire?|Fire is hot.
Is ice cold?/Is ice hot?/Is ice hot or cold?/Is ice cold or hot?/How does ice feel?/What happens if I touch ice?|Ice is cold.
Is the sun hot?/Is the sun cold or hot?/How hot is the sun?|The sun is very hot.
Is the Earth flat?/Is the Earth round?/Is the Earth round or flat?/Is the Earth flat or round?/What is the shape of the Earth?/What does the Earth look like from space?/How is the Earth shaped?|The Earth is not flat. It is round like a ball.
Who wrote Romeo and Juliet?/Romeo and Juliet was written by whom?/Who is the author of Romeo and Juliet?/By whom is Romeo and Juliet?/Which writer made Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.
Who wrote Hamlet?/Hamlet was written by whom?/Who is the author of Hamlet?/Hamlet: who wrote it?|William Shakespeare wrote Hamlet.
What language do people speak in England?/Which language is spoken in England?/What do people speak in England?/The language of England?|People speak English in England.
What is the capital of England?/What is the capital of the United Kingdom?/England's capital?/London is the capital of what?|The capital of England is London.
What is the capital of the United States?/What is the capital of America?/Which city is the capital of the United States?|The capital of the United States is Washington, D.C.
What is frozen water called?/How is frozen water called?/Water that is frozen is called what?/What does water turn into when it freezes?/Frozen water is what?|Frozen water is called ice.
What season comes after winter?/Which season follows winter?/The season after winter?/Winter is over. Which season is it?/When winter ends, what begins?/Winter comes before which season?/What comes after winter?|Spring comes after winter.
What season comes after spring?/Which season follows spring?/The season after spring?/Spring is over. Which season is it?/When spring ends, what begins?/Spring comes before which season?/What comes after spring?|Summer comes after spring.
What season comes after summer?/Which season follows summer?/The season after summer?/Summer is over. Which season is it?/When summer ends, what begins?/Summer comes before which season?/What comes after summer?|Autumn comes after summer.
What season comes after autumn?/Which season follows autumn?/The season after autumn?/Autumn is over. Which season is it?/When autumn ends, what begins?/Autumn comes before which season?/What comes after autumn?|Winter comes after autumn.
Which planet do we live on?/What planet do we live on?/On which planet are we?/The name of our planet?/What is our planet called?/Where in the solar system do people live?|We live on the planet Earth.
Which planet is called the red planet?/What is the red planet?/Which planet looks red?/The red planet, which one is it?|Mars is called the red planet.
What do cows drink?/What does a cow drink?/What should I give a cow to drink?|Cows drink water.
What do plants need to grow?/What does a plant need?/What should I give a plant?/How does a plant grow?/My plant is sick, what does it need?|Plants need water, light and air to grow.
How many legs does a bee have?/A bee has how many legs?/Number of legs of a bee?|A bee has six legs.
How many legs does a cow have?/A cow has how many legs?/Number of legs of a cow?|A cow has four legs.
How many legs does a duck have?/A duck has how many legs?/Number of legs of a duck?|A duck has two legs.
How many legs does a fish have?/A fish has how many legs?|A fish has no legs. It has fins.
What is water made of?/Of what is water made?/What is in water?|Water is made of hydrogen and oxygen.
What do you do with a book?/What is a book for?/Why do people have books?|You read a book.
What do you do with a bed?/What is a bed for?/Why do people have beds?|You sleep in a bed.""".splitlines()
]


def _rows(table: str, columns: int) -> list[list[str]]:
    return [row.split(",", columns - 1) for row in table.split(";")]


_TABLES = {name: _rows(table, columns) for name, table, columns in (
    ("colored", COLORED, 2), ("counted", COUNTED, 3), ("greatest", GREATEST, 3), ("made", MADE, 2), ("work", WORK, 2), ("sensed", SENSED, 2),
    ("given", GIVEN, 3), ("eaten", EATEN, 2), ("homes", HOMES, 2), ("what", WHAT, 2), ("used", USED, 2), ("worn", WORN, 2), ("sounds", SOUNDS, 4),
)}  # fmt: skip


def _up(text: str) -> str:
    return text[0].upper() + text[1:]


def _colored(r: R) -> tuple[str, str]:
    thing, color = r.choice(_TABLES["colored"])
    other = r.choice([c for c in COLORS if c != color])
    first, second = r.sample([color, other], 2)
    question = r.choice([
        f"What color is {thing}?", f"What is the color of {thing}?", f"Which color does {thing} have?", f"{_up(thing)} is of which color?", f"{_up(thing)}: what color?",
        f"The color of {thing}, please.", f"Do you know the color of {thing}?", f"Is {thing} {first} or {second}?", f"What color would you paint {thing}?", f"If I look at {thing}, which color do I see?", f"Describe the color of {thing}.", f"What color does {thing} have?",
    ])  # fmt: skip
    return question, f"{_up(thing)} is {color}."


def _counted(r: R) -> tuple[str, str]:
    whole, part, number = r.choice(_TABLES["counted"])
    one = part[:-1] if number == "one" else part
    return r.choice([
        f"How many {part} does {whole} have?", f"How many {part} are in {whole}?", f"{_up(whole)} has how many {part}?", f"What is the number of {part} in {whole}?", f"Number of {part} of {whole}?",
        f"Count the {part} of {whole}.", f"Do you know how many {part} {whole} has?", f"How many {part} are there in {whole}?", f"How many {part} can {whole} have?", f"{_up(whole)}, how many {part}?", f"Tell me how many {part} {whole} has.", f"How many {part} do you count in {whole}?",
    ]), f"{_up(whole)} has {number} {one}."  # fmt: skip


def _greatest(r: R) -> tuple[str, str]:
    kind, words, answer = r.choice(_TABLES["greatest"])
    word = r.choice(words.split("/"))
    return r.choice([
        f"What is the {word} {kind}?", f"Which {kind} is the {word}?", f"The {word} {kind}?", f"Do you know the {word} {kind}?", f"I am looking for the {word} {kind}.", f"Which is the {word} {kind}?",
        f"What do we call the {word} {kind}?", f"Can you name the {word} {kind}?", f"What {kind} is the {word} one?", f"Of every {kind}, which is the {word}?", f"Among all of them, which {kind} is {word}?", f"No {kind} is more so than the {word} one. Which is it?", f"Tell me the {word} {kind}.", f"The {kind} that is {word}, please.", f"Who is the {word} {kind}?" if "animal" in kind or kind == "bird" else f"How do they call the {word} {kind}?", f"Say which {kind} is {word}.", f"What {kind} is {word}?",
    ]), r.choice([f"The {word} {kind} is {answer}.", f"{_up(answer)} is the {word} {kind}."])  # fmt: skip


def _made(r: R) -> tuple[str, str]:
    thing, of = r.choice(_TABLES["made"])
    return r.choice([
        f"What is {thing} made of?", f"What is {thing} made from?", f"{_up(thing)} is made of what?", f"Of what is {thing} made?", f"Do you know what {thing} is made of?", f"How do we get {thing}?",
        f"What do you need to make {thing}?", f"Out of what do people make {thing}?", f"What is in {thing}?", f"What can one make {thing} from?", f"Where does {thing} come from?",
    ]), f"{_up(thing)} is made of {of}."  # fmt: skip


def _work(r: R) -> tuple[str, str]:
    job, does = r.choice(_TABLES["work"])
    return r.choice([
        f"What does {a(job)} do?", f"What is the job of {a(job)}?", f"Why do we need {a(job)}?", f"Who {does}?", f"Which person {does}?", f"What is {a(job)}?", f"How does {a(job)} spend the day?", f"Tell me about the work of {a(job)}.",
        f"What can {a(job)} do for me?", f"Someone who {does}: who is that?", f"What do you call a person who {does}?", f"What do {job}s do?" if not job.endswith("man") else f"What does {a(job)} do all day?",
    ]), f"{_up(a(job))} {does}."  # fmt: skip


def _sensed(r: R) -> tuple[str, str]:
    verb, part = r.choice(_TABLES["sensed"])
    return r.choice([
        f"What do we {verb} with?", f"What do people {verb} with?", f"With what do we {verb}?", f"How do people {verb}?", f"What part of the body do we {verb} with?", f"Which part of us is there to {verb}?", f"What is needed to {verb}?", f"What do I use to {verb}?",
        f"What does the body {verb} with?", f"The part of the body that can {verb}?", f"What part of you can {verb}?", f"By which part do people {verb}?", f"Which part of my body lets me {verb}?", f"What do we do with our {part}?", f"What is {'' if part.endswith('s') else 'the '}{part} for?" if not part.endswith("s") else f"What are {part} for?",
    ]), f"We {verb} with our {part}."  # fmt: skip


def _given(r: R) -> tuple[str, str]:
    who, verb, what = r.choice(_TABLES["given"])
    does = "does" if who.startswith("the ") else "do"
    return r.choice([
        f"What {does} {who} {verb.rstrip('s') if does == 'does' else verb}?", f"What {does} {who} give us?", f"What do people get from {who}?", f"Where does {what} come from?", f"Who makes {what}?", f"From whom do we have {what}?", f"What are {who} good for?" if does == "do" else f"What is {who} good for?",
        f"What can I take from {who}?", f"{_up(what)} comes from whom?", f"What good thing do we have from {who}?", f"Thanks to {who} we have what?", f"Which thing comes from {who}?", f"What do {who} have for us?" if does == "do" else f"What does {who} have for us?",
    ]), f"{_up(who)} {verb} {what}."  # fmt: skip


def _eaten(r: R) -> tuple[str, str]:
    who, food = r.choice(_TABLES["eaten"])
    return r.choice([
        f"What do {who} eat?", f"What do {who} like to eat?", f"What is the food of {who}?", f"What should I give {who} to eat?", f"{_up(who)} eat what?", f"What do you feed {who}?", f"On what do {who} live?", f"Are {who} hungry for something special?", f"Tell me what {who} eat.", f"Which food do {who} like?", f"{_up(who)}, what is their food?", f"What is good food for {who}?", f"With what can I feed {who}?",
    ]), f"{_up(who)} eat {food}."  # fmt: skip


def _homes(r: R) -> tuple[str, str]:
    who, where = r.choice(_TABLES["homes"])
    return r.choice([
        f"Where do {who} live?", f"Where can I find {who}?", f"What is the home of {who}?", f"Where are {who} at home?", f"{_up(who)} live where?", f"In which place do {who} live?", f"Where should I look for {who}?", f"Where do you see {who}?", f"Where is the home of {who}?", f"In what do {who} live?", f"What place do {who} call home?", f"{_up(who)} have their home in which place?", f"Tell me where {who} live.", f"What do {who} live in?", f"Where do {who} sleep?",
    ]), f"{_up(who)} live {where}."  # fmt: skip


def _what(r: R) -> tuple[str, str]:
    thing, is_ = r.choice(_TABLES["what"])
    return r.choice([
        f"What is {thing}?", f"Explain to me what {thing} is.", f"Do you know what {thing} is?", f"Can you say what {thing} is?", f"{_up(thing)}, what is that?", f"What do people mean by {thing}?", f"Describe {thing}.", f"How would you explain {thing}?", f"What would I find if I saw {thing}?", f"I do not know what {thing} is.",
    ]), f"{_up(thing)} is {is_}."  # fmt: skip


def _used(r: R) -> tuple[str, str]:
    job, tool = r.choice(_TABLES["used"])
    return r.choice([
        f"What do you use to {job}?", f"What can I {job} with?", f"I want to {job}. What do I need?", f"What helps me to {job}?", f"Which thing do people use to {job}?", f"Name a thing to {job} with.", f"What does one take to {job}?", f"I must {job}, but with what?", f"Give me a tool to {job} with.", f"How can I {job}?", f"What is {tool} for?", f"With what do you {job}?",
    ]), f"You can {job} with {tool}."  # fmt: skip


def _worn(r: R) -> tuple[str, str]:
    where, what = r.choice(_TABLES["worn"])
    return r.choice([
        f"What do you wear on your {where}?", f"What do people put on their {where}?", f"My {where} are cold, what can I wear?" if where.endswith("s") or where == "feet" else f"My {where} is cold, what can I wear?", f"What is there to wear for the {where}?", f"What keeps my {where} warm?", f"Tell me what to wear on the {where}.", f"What goes on the {where}?", f"Clothes for the {where}?", f"Give me something to wear on my {where}.", f"What should I put on my {where} in winter?", f"Where do I wear {what}?",
    ]), f"You wear {what} on your {where}."  # fmt: skip


def _sounds(r: R) -> tuple[str, str]:
    one, many, sound, young = r.choice(_TABLES["sounds"])
    if r.random() < 0.5:
        return r.choice([
            f"What do {many} say?", f"What is the sound of {a(one)}?", f"Which sound do you hear from {many}?", f"{_up(a(one))} makes which sound?", f"How do {many} go?", f"Make the sound of {a(one)}.", f"What sound does {a(one)} make?", f"What do you hear when {a(one)} speaks?", f"What kind of noise do {many} make?",
        ]), f"{_up(a(one))} says \"{sound}\"."  # fmt: skip
    return r.choice([
        f"What is a baby {one} called?", f"What do you call a baby {one}?", f"How do we call young {many}?", f"The young of {many}?", f"What is the child of {a(one)}?", f"Which word is there for a little {one}?", f"A baby {one} has which name?", f"What are young {many} called?", f"The baby of {a(one)} is called what?",
    ]), f"A young {one} is called {a(young)}."  # fmt: skip


def _told(r: R) -> tuple[str, str]:
    """What is told and asked for in one breath."""
    name = r.choice(NAMES) if r.random() < 0.5 else made_up(r)
    number, thing = (
        r.randint(2, 60),
        r.choice("apples books eggs pens dogs chairs stones coins friends cups balls boxes".split()),
    )
    color = r.choice(COLORS)
    who = r.choice("brother sister friend teacher cat dog neighbor mother".split())
    return r.choice([
        (f"I am {name}. Who am I?", f"You are {name}."), (f"They call me {name}. What do they call me?", f"They call you {name}."), (f"My {who} is called {name}. What is my {who} called?", f"Your {who} is called {name}."),
        (f"There are {number} {thing} on the table. How many {thing} are there?", f"There are {number} {thing}."), (f"I bought {number} {thing}. How many {thing} did I buy?", f"You bought {number} {thing}."), (f"We see {number} {thing}. Count the {thing}.", f"You see {number} {thing}."),
        (f"The name of my {who} is {name}. Say the name of my {who}.", f"The name of your {who} is {name}."), (f"My hat is {color}. What color is my hat?", f"Your hat is {color}."), (f"{name} has {number} {thing}. Who has {number} {thing}?", f"{name} has {number} {thing}."), (f"Hi, my name is {name}! Can you say my name?", f"Your name is {name}."),
    ])  # fmt: skip


def _other(r: R) -> tuple[str, str]:
    wordings, answer = r.choice(OTHER)
    return r.choice(wordings), answer


FAMILIES = (
    _other,
    _other,
    _other,
    _colored,
    _counted,
    _greatest,
    _made,
    _work,
    _sensed,
    _given,
    _eaten,
    _homes,
    _what,
    _used,
    _worn,
    _sounds,
    _told,
)
_BEFORE = (
    "Quick question: ",
    "Please tell me: ",
    "I would like to know: ",
    "One question: ",
    "Hey, ",
    "Hi! ",
    "My friend asks: ",
    "Do you know? ",
    "Help me: ",
    "Okay. ",
    "I forgot: ",
)


def reword(r: R, question: str) -> str:
    """The same question, a little different."""
    what = r.random()
    if what < 0.2 and "hat is" in question:
        question = question.replace("hat is", "hat's", 1)
    if r.random() < 0.1:
        question = question.replace("color", "colour")
    if r.random() < 0.1:
        question = (
            r.choice(["Which", "What"]) + question.removeprefix("What").removeprefix("Which")
            if question.startswith(
                ("What color", "Which color", "What planet", "Which planet", "What animal", "Which animal")
            )
            else question
        )
    if what > 0.85:
        first = question if question.startswith("I ") else question[0].lower() + question[1:]
        question = r.choice(_BEFORE) + (first if r.random() < 0.5 else question)
    return question
