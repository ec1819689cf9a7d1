"""What evaluate.py asks: functions, wordings and values that training/tools.py never makes, and simple questions.

Written by hand after the usual schemas of assistants; none of these function names, and none of the wordings, come from the
templates. {x} in a wording is a value, which the call must hold as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["QUESTIONS", "STORY_OPENINGS", "STORY_THEMES", "TOOLS", "Tool"]


class Tool(NamedTuple):
    name: str
    description: str
    properties: dict[str, dict[str, Any]]
    required: tuple[str, ...]
    wordings: tuple[str, ...]
    values: tuple[dict[str, Any], ...]

    def schema(self) -> dict[str, Any]:
        parameters = {"type": "object", "properties": self.properties, "required": list(self.required)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _whole(description: str) -> dict[str, Any]:
    return {"type": "integer", "description": description}


def _number(description: str) -> dict[str, Any]:
    return {"type": "number", "description": description}


def _one_of(description: str, *values: str) -> dict[str, Any]:
    return {"type": "string", "description": description, "enum": list(values)}


TOOLS = (
    Tool("get_current_weather", "Current weather conditions at a location", {"location": _text("Town or region"), "units": _one_of("System of units", "metric", "imperial")}, ("location",),
         ("How warm is it in {location} right now?", "Will I need an umbrella in {location}? Tell me in {units} units.", "Tell me what the sky looks like over {location}."),
         ({"location": "Bergen", "units": "metric"}, {"location": "Kyoto", "units": "imperial"}, {"location": "Leeds", "units": "metric"})),
    Tool("ask_the_web", "Searches the web and returns the best pages", {"query": _text("The search query")}, ("query",),
         ("Google {query} for me.", "What does the web say about {query}?", "Look online for {query}, would you?"),
         ({"query": "cheap telescopes"}, {"query": "solar eclipse dates"}, {"query": "how to knit socks"})),
    Tool("currency_exchange", "Converts money between two currencies", {"sum": _number("How much money"), "source": _text("ISO code to convert from"), "target": _text("ISO code to convert to")}, ("sum", "source", "target"),
         ("How many {target} do I get for {sum} {source}?", "Turn {sum} {source} into {target}.", "I have {sum} {source} and want {target}."),
         ({"sum": 250, "source": "CHF", "target": "SEK"}, {"sum": 19.5, "source": "USD", "target": "INR"}, {"sum": 4000, "source": "JPY", "target": "EUR"})),
    Tool("heat_room", "Changes the target temperature of a room", {"room": _text("Room of the house"), "degrees": _number("Target in Celsius")}, ("room", "degrees"),
         ("Make the {room} {degrees} degrees.", "It is cold in the {room}, put the heating at {degrees}.", "I want {degrees} degrees in the {room}."),
         ({"room": "bathroom", "degrees": 23}, {"room": "study", "degrees": 19.5}, {"room": "hallway", "degrees": 17})),
    Tool("start_countdown", "Starts a kitchen countdown", {"minutes": _whole("Length in minutes"), "label": _text("What it is for")}, ("minutes",),
         ("Wake me in {minutes} minutes.", "Count down {minutes} minutes for the {label}.", "Ring a bell after {minutes} minutes, it is for the {label}."),
         ({"minutes": 12, "label": "pasta"}, {"minutes": 45, "label": "laundry"}, {"minutes": 7, "label": "eggs"})),
    Tool("create_calendar_event", "Puts an event into the calendar", {"title": _text("Name of the event"), "date": _text("Day, YYYY-MM-DD"), "start": _text("Start, HH:MM")}, ("title", "date"),
         ("Put {title} into my calendar on {date}.", "I have {title} on {date} at {start}, note it.", "Block {date} from {start} for {title}."),
         ({"title": "dentist", "date": "2027-03-14", "start": "09:30"}, {"title": "piano lesson", "date": "2026-12-01", "start": "16:00"}, {"title": "team retreat", "date": "2027-06-22", "start": "08:15"})),
    Tool("translator", "Translates a text", {"text": _text("What to translate"), "into": _text("Language to translate into")}, ("text", "into"),
         ('How do you say "{text}" in {into}?', 'Put "{text}" into {into}.', 'I need "{text}" in {into} for a letter.'),
         ({"text": "good luck", "into": "Swedish"}, {"text": "where is the station", "into": "Korean"}, {"text": "we are closed", "into": "Latin"})),
    Tool("stock_quote", "Latest price of a share", {"ticker": _text("Symbol of the share")}, ("ticker",),
         ("What is {ticker} trading at?", "Price of {ticker}?", "How are {ticker} shares doing today?"),
         ({"ticker": "ZRX"}, {"ticker": "QLMN"}, {"ticker": "BTRF"})),
    Tool("control_lamp", "Switches or dims a lamp", {"lamp": _text("Which lamp"), "action": _one_of("What to do", "on", "off", "dim")}, ("lamp", "action"),
         ("Switch {action} the {lamp}.", "{lamp} {action}, please.", "I would like the {lamp} {action}."),
         ({"lamp": "porch light", "action": "off"}, {"lamp": "desk lamp", "action": "on"}, {"lamp": "ceiling spots", "action": "dim"})),
    Tool("dishes_with", "Finds recipes by what is in the kitchen", {"ingredient": _text("Main ingredient"), "max_minutes": _whole("Longest cooking time")}, ("ingredient",),
         ("What can I cook with {ingredient}?", "I have {ingredient} and only {max_minutes} minutes.", "Dinner ideas with {ingredient}, under {max_minutes} minutes."),
         ({"ingredient": "lentils", "max_minutes": 25}, {"ingredient": "aubergine", "max_minutes": 40}, {"ingredient": "leftover rice", "max_minutes": 15})),
    Tool("track_package", "Where a package is", {"tracking_number": _text("Number on the label")}, ("tracking_number",),
         ("Where is my package {tracking_number}?", "Has {tracking_number} arrived yet?", "Any news of shipment {tracking_number}?"),
         ({"tracking_number": "9Z44817"}, {"tracking_number": "PK-20931"}, {"tracking_number": "TT7781X"})),
    Tool("get_directions", "Route between two places", {"from_place": _text("Start of the route"), "to_place": _text("End of the route"), "by": _one_of("Means of transport", "car", "foot", "bike")}, ("from_place", "to_place"),
         ("How do I get from {from_place} to {to_place}?", "I am at {from_place} and must be at {to_place}, I go by {by}.", "Way from {from_place} to {to_place} by {by}?"),
         ({"from_place": "Ghent", "to_place": "Bruges", "by": "bike"}, {"from_place": "the airport", "to_place": "Elm Street", "by": "car"}, {"from_place": "the zoo", "to_place": "City Hall", "by": "foot"})),
    Tool("send_sms", "Sends a short message to a phone", {"phone": _text("Phone number"), "message": _text("Words of the message")}, ("phone", "message"),
         ('Text {phone}: "{message}"', 'Let {phone} know: "{message}"', 'Tell {phone} by text that "{message}".'),
         ({"phone": "555-0187", "message": "the train is late"}, {"phone": "555-0142", "message": "bring an umbrella"}, {"phone": "555-0199", "message": "happy birthday"})),
    Tool("add_to_cart", "Adds a product to the shopping cart", {"product": _text("Name of the product"), "quantity": _whole("How many pieces")}, ("product",),
         ("I will take {quantity} {product}.", "Throw {quantity} {product} into the cart.", "{quantity} times {product}, into my basket."),
         ({"product": "AA batteries", "quantity": 8}, {"product": "wool blankets", "quantity": 2}, {"product": "blue folders", "quantity": 30})),
    Tool("word_definition", "Looks a word up in the dictionary", {"word": _text("The word")}, ("word",),
         ("Dictionary entry for {word}?", "Is {word} a real word?", "I came across {word}, explain it with the dictionary."),
         ({"word": "petrichor"}, {"word": "sesquipedalian"}, {"word": "gloaming"})),
    Tool("restaurant_seats", "Reserves a table at a restaurant", {"restaurant": _text("Name of the restaurant"), "guests": _whole("Number of people"), "evening": _text("Day, YYYY-MM-DD")}, ("restaurant", "guests"),
         ("We are {guests} and want to eat at {restaurant}.", "A table for {guests} at {restaurant} on {evening}.", "Can {restaurant} seat {guests} of us on {evening}?"),
         ({"restaurant": "Luna Rossa", "guests": 5, "evening": "2027-02-14"}, {"restaurant": "The Old Mill", "guests": 2, "evening": "2026-12-31"}, {"restaurant": "Sakura", "guests": 9, "evening": "2027-01-08"})),
    Tool("count_words", "Counts the words of a file", {"file_path": _text("Path of the file")}, ("file_path",),
         ("How long is {file_path} in words?", "Number of words in {file_path}?", "Is {file_path} more than a thousand words?"),
         ({"file_path": "/srv/essay.tex"}, {"file_path": "notes/draft7.rst"}, {"file_path": "~/thesis.odt"})),
    Tool("play_podcast", "Plays an episode of a podcast", {"show": _text("Name of the podcast"), "episode": _whole("Number of the episode")}, ("show",),
         ("Put on {show}.", "I feel like hearing {show}, number {episode}.", "Episode {episode} of {show}, now."),
         ({"show": "Deep Water", "episode": 31}, {"show": "Mostly Maps", "episode": 8}, {"show": "The Late Train", "episode": 112})),
    Tool("log_expense", "Writes down an expense", {"amount": _number("Money spent"), "category": _one_of("Kind of expense", "food", "travel", "rent", "fun")}, ("amount", "category"),
         ("I spent {amount} on {category}.", "{amount} went to {category} today.", "Note {amount} under {category}."),
         ({"amount": 14.2, "category": "food"}, {"amount": 88, "category": "travel"}, {"amount": 31.75, "category": "fun"})),
    Tool("lock_door", "Locks or unlocks a door", {"door": _text("Which door"), "locked": {"type": "boolean", "description": "True to lock"}}, ("door", "locked"),
         ("Lock the {door}.", "Is the {door} open? Lock it.", "Please make sure that the {door} is locked."),
         ({"door": "back door", "locked": True}, {"door": "garage", "locked": True}, {"door": "cellar door", "locked": True})),
    Tool("moon_phase", "Phase of the moon on a day", {"day": _text("Day, YYYY-MM-DD")}, ("day",),
         ("Is it full moon on {day}?", "How does the moon look on {day}?", "What moon will we have on {day}?"),
         ({"day": "2027-09-03"}, {"day": "2026-12-24"}, {"day": "2028-05-19"})),
    Tool("give_photo_name", "Gives a photo another name", {"old_name": _text("Present name"), "new_name": _text("Name that it gets")}, ("old_name", "new_name"),
         ("Call {old_name} {new_name} from now on.", "{old_name} should be named {new_name}.", "Give {old_name} the name {new_name}."),
         ({"old_name": "IMG_2231.jpg", "new_name": "sunset.jpg"}, {"old_name": "dsc04.png", "new_name": "grandma.png"}, {"old_name": "scan3.tif", "new_name": "contract.tif"})),
)  # fmt: skip

STORY_OPENINGS = (
    "Tell me a story about {}.", "Write a short story about {}.", "Please tell me a bedtime story with {} in it.",
    "I would love to hear a tale of {}.", "Make up a little story: {}.",
)  # fmt: skip
STORY_THEMES = (
    "a bear who cannot sleep", "two friends and a boat", "a girl who finds a key", "an old tree", "a lonely robot", "a cat in the rain",
    "the first snow", "a boy who lost his shoe", "a kind baker", "a frog who wants to fly", "a red balloon", "a brave mouse", "a hidden garden",
    "a dog named Biscuit", "a very small dragon", "a broken toy", "the moon and a child", "a farmer and his goat", "a bird with one wing",
    "a walk to the river", "a magic pencil", "a shy giant", "a lost letter", "three ducks", "a birthday surprise", "a windy day",
    "a quiet library", "a fox and a hen", "a sailor who misses home", "a new neighbor", "a secret door", "a blue umbrella", "a hungry owl",
    "a race in the village", "an empty nest", "a star that fell down", "a gardener and a snail", "a music box", "a night in the forest",
    "a snowman in spring",
)  # fmt: skip

# Question, and words of which one must be in the answer. The wordings are none of training/questions.py; the facts are.
QUESTIONS = tuple(
    (line.split("|")[0], tuple(line.split("|")[1].split("/")))
    for line in """Capital of Italy?|Rome
Japan's capital is called what?|Tokyo
Name the capital of Egypt.|Cairo
What's the capital of Spain?|Madrid
What is Germany's capital?|Berlin
Is Paris in France or in Italy?|France
On what continent do we find Kenya?|Africa
On what continent does Brazil lie?|South America
What do people speak in Mexico?|Spanish
What language would I hear in Austria?|German
2 and 2 make how much?|4/four
Add 9 and 6.|15/fifteen
3 + 8?|11/eleven
What's 10 minus 4?|6/six
Multiply 5 by 3.|15/fifteen
What do you get when you add 7 and 7?|14/fourteen
Take 5 away from 12.|7/seven
6 multiplied by 6 gives what?|36
What's 20 plus 30?|50/fifty
One and one make how much?|2/two
By day the sky has which color?|blue
Which color has grass?|green
What colour is snow?|white
Tell me the color of a ripe banana.|yellow
Is coal black or white?|black
How many days does one week have?|seven/7
How many months make a year?|twelve/12
How many hours does one day have?|24/twenty-four
How many minutes make an hour?|60/sixty
How many seasons does a year have?|four/4
How many legs has a spider?|eight/8
How many legs has a dog?|four/4
How many wheels has a bicycle?|two/2
How many sides has a triangle?|three/3
How many continents are there on Earth?|seven/7
What day follows Monday?|Tuesday
What day is before Sunday?|Saturday
Which month follows March?|April
Which month comes before December?|November
What number comes right after 41?|42
What comes before 10?|9/nine
Which number is one less than 100?|99
What's the opposite of big?|small/little
What's the opposite of up?|down
Opposite of wet?|dry
Tell me the opposite of night.|day
The opposite of slow is what?|fast
Give the opposite of happy.|sad
What sound do cows make?|moo
What noise does a cat make?|meow
How does a duck sound?|quack
Give the word for a very young cat.|kitten
What is a young dog called?|puppy
What is a young cow called?|calf
In what do bees have their home?|hive
Fish have their home where?|water/sea/river
What sweet thing comes from bees?|honey
What do we get from hens?|egg/eggs
What comes from cows that we drink?|milk
Tell me what ice is.|frozen/water
Bread: from what is it baked?|flour
What's paper made of?|wood
From what do people make cheese?|milk
Which of the planets is biggest?|Jupiter
Which planet is nearest the sun?|Mercury
What planet are we on?|Earth
Name the biggest ocean.|Pacific
What's the tallest mountain on Earth?|Everest
Which animal is the largest of all?|whale
What is the fastest animal on land?|cheetah
Name the animal that is taller than all others.|giraffe
On which side does the sun come up, east or west?|east
The sun goes down in which direction?|west
At what time of day do we see the sun come up?|morning
What does a baker make?|bread/cake/cakes
Who puts out fires?|firefighter/firefighters
What is the work of a teacher?|teach/teaches/learn/help/helps
What is a doctor for?|sick/help/helps/heal
Which part of the body hears?|ear/ears
Which part of the body sees?|eye/eyes
What can I use to cut paper?|scissors
Name something for your feet.|shoe/shoes/sock/socks
Tell me what the sun is.|star
Tell me what an island is.|land/water
Tell me what a desert is.|dry
Does fire feel cold or hot?|hot
Which shape has the Earth?|round/ball
Can penguins fly?|cannot/can not/can't/no
Romeo and Juliet: who is its author?|Shakespeare
What do plants need?|water/light
What would I find in a museum?|look/old/beautiful/art
After winter, which season is it?|spring
Tell me the food of pandas.|bamboo
In which part of the world are polar bears?|north/arctic
What do you call frozen water?|ice
How many letters has the alphabet?|26/twenty-six
Introduce yourself, please.|expertstream/model
Are you a person or a program?|not/model/program
My name is Nils. What is my name?|Nils
I have 3 cats. How many cats do I have?|3/three""".splitlines()
)
