"""Functions that assistants are usually given, and how people ask for them: none of these names and wordings is in `unseen.py`.

`tools.py` draws from them, renames functions and parameters, and fills the {slots} of a wording with values. A parameter that the
wording does not name is left out of the call, unless the wording implies it: then its value is beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["SCENES", "Scene", "Slot"]


class Slot(NamedTuple):
    name: str
    kind: str  # a kind of value in tools.py, or "one of: a, b, c", or "bool"
    description: str
    required: bool = True


class Scene(NamedTuple):
    names: tuple[str, ...]
    description: str
    slots: tuple[Slot, ...]
    wordings: tuple[str | tuple[str, dict[str, Any]], ...]


def _s(names: str, description: str, slots: list[Slot], *wordings: str | tuple[str, dict[str, Any]]) -> Scene:
    return Scene(tuple(names.split()), description, tuple(slots), wordings)


SCENES = (
    _s("weather_report check_weather forecast", "Weather of a place", [Slot("place", "city", "Where"), Slot("day", "date", "Which day", False)],
       "What will the weather be in {place}?", "Does it rain in {place} on {day}?", "Is it cold in {place}?", "How is the weather in {place} on {day}?", "Should I take a coat to {place}?", "{place}: sun or rain?", "I travel to {place} on {day}, what should I wear?", "Weather for {place}, please.", "Will it snow in {place}?", "Is it windy over in {place} today?"),
    _s("find_pages web_lookup internet_search", "Looks something up on the internet", [Slot("words", "query", "What to look for")],
       "Search for {words}.", "Find pages about {words}.", "I want to read about {words}.", "Can you find something on {words}?", "What is there to know of {words}?", "Look up {words}.", "See if there is anything about {words} on the internet.", "{words}: what do they write about it?"),
    _s("convert_money exchange_rate change_money", "Changes an amount of money into another currency", [Slot("amount", "amount", "The amount of money"), Slot("have", "currency", "Currency that it is in"), Slot("want", "currency", "Currency that it should be in")],
       "What is {amount} {have} in {want}?", "Convert {amount} {have} to {want}.", "How much {want} is {amount} {have}?", "Please change {amount} {have} to {want}.", "I need {want} for my {amount} {have}.", "{amount} {have} makes how many {want}?", "Work out {amount} {have} as {want}."),
    _s("thermostat set_climate warm_up", "Sets how warm a place is", [Slot("where", "room", "The place in the house"), Slot("celsius", "degrees", "How warm")],
       "Heat the {where} to {celsius} degrees.", "Set the {where} to {celsius}.", "The {where} should have {celsius} degrees.", "I am freezing, {celsius} degrees in the {where} please.", "Can the {where} be at {celsius}?", "{celsius} degrees for the {where}.", "Turn the {where} up to {celsius} degrees.", "Let the {where} cool down to {celsius}."),
    _s("kitchen_timer timer_start remind_after", "A timer that rings", [Slot("length", "minutes", "Minutes until it rings"), Slot("reason", "room", "For what", False)],
       "Set a timer for {length} minutes.", "Tell me when {length} minutes are over.", "{length} minutes for the {reason}, please.", "The {reason} needs {length} minutes.", "Remind me of the {reason} in {length} minutes.", "Start a timer, {length} minutes.", "In {length} minutes I must look at the {reason}.", "Beep in {length} minutes."),
    _s("add_event new_appointment plan_event", "Writes an appointment down", [Slot("what", "query", "What happens"), Slot("when", "date", "The day"), Slot("hour", "time", "When it begins", False)],
       "Add {what} on {when}.", "On {when} there is {what}.", "I am going to {what} on {when} at {hour}.", "Save the date: {what}, {when}.", "Keep {when} free for {what}.", "New appointment: {what}, {when}, {hour}.", "{what} is on {when} at {hour}, please write it down.", "Remember {what} on {when}."),
    _s("translate say_in to_language", "Says something in another language", [Slot("words", "phrase", "What should be said"), Slot("language", "language", "In which language")],
       'Translate "{words}" to {language}.', 'What is "{words}" in {language}?', 'Say "{words}" in {language}.', 'I want to write "{words}" in {language}.', '"{words}" in {language}, please.', 'How would someone from abroad say "{words}" in {language}?', 'What would "{words}" be if I spoke {language}?'),
    _s("share_price market_value lookup_stock", "What a company's share costs", [Slot("share", "ticker", "Letters of the company")],
       "How much is {share}?", "Show me {share}.", "What does one {share} cost now?", "Is {share} up or down?", "Check {share} for me.", "I own {share}, how is it?", "{share} price, please.", "Give me the value of {share}."),
    _s("switch set_switch device_power", "Turns a thing on or off", [Slot("thing", "room", "Which thing"), Slot("state", "one of: on, off", "What it should be")],
       "Turn the {thing} {state}.", "Turn {state} the {thing}.", "{state} with the {thing}!", "The {thing} should be {state}.", "Please put the {thing} {state}.", "Can you turn the {thing} {state}?", "I want the {thing} to be {state}.", "{thing}: {state}."),
    _s("find_recipe cook_with meal_ideas", "Ideas for a meal", [Slot("food", "food", "What is there to cook with"), Slot("time", "minutes", "How many minutes it may take", False)],
       "Give me a recipe with {food}.", "What is for dinner if all I have is {food}?", "I bought {food}, what shall I make?", "Something with {food} in {time} minutes.", "There is {food} and {time} minutes left.", "Cook {food}, but in less than {time} minutes.", "How do people prepare {food}?", "Meals of {food}?"),
    _s("parcel_status where_is_order delivery_state", "Says where an order is", [Slot("code", "id", "Code of the order")],
       "Where is {code}?", "What happened to order {code}?", "Is {code} on its way?", "My order is {code}, when will it be here?", "Track {code}.", "I am still waiting for {code}.", "Check the delivery {code}.", "Did {code} get lost?"),
    _s("find_way route_from navigate", "The way from one place to another", [Slot("start", "spot", "Where it begins"), Slot("goal", "spot", "Where it ends"), Slot("vehicle", "one of: train, bus, plane, car, bicycle", "How to travel", False)],
       "Show me the way from {start} to {goal}.", "From {start} to {goal}, please.", "I want to go to {goal}, I start in {start}.", "How long is it from {start} to {goal} by {vehicle}?", "Take me from {start} to {goal} by {vehicle}.", "Which {vehicle} goes from {start} to {goal}?", "We leave {start} and go to {goal}.", "I stand at {start}, where is {goal}?"),
    _s("text_message send_note notify", "Sends words to somebody", [Slot("who", "name", "Who gets it"), Slot("words", "phrase", "What it says")],
       'Send {who} "{words}".', "Tell {who} that {words}.", "Write to {who}: {words}", 'Message {who}: "{words}"', "Let {who} know that {words}.", "Please inform {who} that {words}.", '{who} should hear "{words}".', "Say to {who} that {words}."),
    _s("call_number dial phone_call", "Calls a phone", [Slot("number", "phone", "The number")],
       "Call {number}.", "Phone {number} please.", "Dial {number} for me.", "I want to speak to {number}.", "Give {number} a ring.", "Can you get {number} on the line?"),
    _s("cart_add buy_item put_in_basket", "Puts something on the order", [Slot("article", "goods", "What to buy"), Slot("pieces", "count", "How many", False)],
       "I want {pieces} {article}.", "Buy {article}.", "Put {pieces} {article} on the list.", "{pieces} {article} for us, please.", "We need {article}.", "Order {pieces} {article} for us.", "Add {article} to my order.", "Get {pieces} of the {article}."),
    _s("dictionary define_word meaning_of", "Explains a word", [Slot("term", "rare", "Which word")],
       "What does {term} mean?", "Define {term}.", "Meaning of {term}?", "I do not know the word {term}.", "Explain {term} to me.", "Look {term} up.", "What is meant by {term}?", 'Tell me about the word "{term}".'),
    _s("book_table dinner_reservation table_for", "Keeps a table free", [Slot("place", "title", "Where to eat"), Slot("people", "count", "How many come"), Slot("day", "date", "Which day", False)],
       "Book {place} for {people}.", "Table for {people} at {place}, {day}.", "On {day} we are {people} at {place}.", "{people} of us would like to eat at {place}.", "Please call {place}, we come with {people} people.", "Reserve at {place} for {people} on {day}.", "Dinner for {people} at {place}."),
    _s("file_size count_lines read_file open_document", "Looks into a file", [Slot("path", "file", "Which file")],
       "How big is {path}?", "How many lines has {path}?", "Open {path}.", "What is in {path}?", "Look into {path}.", "Read me {path}.", "Tell me the size of {path}.", "Is there anything in {path}?"),
    _s("play_music play_song listen", "Plays something to listen to", [Slot("title", "title", "What to play"), Slot("part", "count", "Which part", False)],
       "Play {title}.", "I want to listen to {title}.", "Play part {part} of {title}.", "Let me hear {title}.", "{title}, part {part}, please.", "Start {title}.", "Can you play {title} from number {part}?", "Go on with {title}, the {part}th."),
    _s("add_cost spend book_payment", "Keeps track of money", [Slot("money", "amount", "How much"), Slot("kind", "one of: clothes, books, car, house, gifts, sports", "What for")],
       "I paid {money} for {kind}.", "{kind}: {money}.", "Add {money} to {kind}.", "Today {money} for {kind}.", "Write down that {kind} cost me {money}.", "My {kind} was {money}.", "{money} spent, {kind}."),
    _s("set_gate window_state close_shutter", "Opens or closes something", [Slot("which", "room", "Which one"), Slot("closed", "bool", "Whether it is closed")],
       ("Close the {which}.", {"closed": True}), ("Open the {which}.", {"closed": False}), ("The {which} must be shut.", {"closed": True}), ("I want the {which} open.", {"closed": False}), ("Shut the {which}, please.", {"closed": True}), ("Can you open the {which}?", {"closed": False}), ("Make sure nobody can come through the {which}.", {"closed": True})),
    _s("mute_sound alarm_armed silent_mode", "Sound on or off", [Slot("device", "room", "Which device"), Slot("silent", "bool", "True for no sound")],
       ("Be quiet, {device}.", {"silent": True}), ("Mute the {device}.", {"silent": True}), ("The {device} is too loud, sound off.", {"silent": True}), ("I cannot hear the {device}, sound on.", {"silent": False}), ("Unmute the {device}.", {"silent": False})),
    _s("sunrise_on daylight star_map", "The sky on a day", [Slot("date", "date", "Which day")],
       "When does the sun rise on {date}?", "How long is the day on {date}?", "Which stars can I see on {date}?", "Tell me about the sky on {date}.", "Will it be dark on {date}?", "The sun on {date}?"),
    _s("rename_file move_file copy_to", "Moves a file to another place", [Slot("source", "file", "The file now"), Slot("target", "file", "The file afterwards")],
       "Move {source} to {target}.", "Rename {source} to {target}.", "Copy {source} to {target}.", "Turn {source} into {target}.", "{source} should become {target}.", "I want {source} to be {target}.", "Make {target} out of {source}."),
    _s("delete_entry remove_user forget", "Deletes something", [Slot("entry", "id", "Which one")],
       "Delete {entry}.", "I do not need {entry} any more.", "Get rid of {entry}.", "Remove {entry}, please.", "{entry} can go.", "Throw {entry} away."),
    _s("flight_search find_flights fly", "Finds flights", [Slot("origin", "city", "Where it starts"), Slot("destination", "city", "Where it lands"), Slot("date", "date", "Day of the flight", False)],
       "Flights from {origin} to {destination}?", "I want to fly to {destination} from {origin}.", "Find me a flight from {origin} to {destination} on {date}.", "{origin} to {destination}, {date}.", "On {date} I must be in {destination}, I live in {origin}.", "How can I fly from {origin} to {destination}?"),
    _s("hotel_search rooms_in stay", "Finds a hotel", [Slot("city", "city", "Where"), Slot("nights", "minutes", "How many nights"), Slot("price", "amount", "At most so much a night", False)],
       "A hotel in {city} for {nights} nights.", "I stay in {city} for {nights} nights.", "{nights} nights in {city}, at most {price}.", "Find a room in {city}, {nights} nights.", "We need a bed in {city} for {nights} nights and have {price} a night."),
    _s("compute calculator do_math", "Calculates", [Slot("a", "count", "The first number"), Slot("b", "count", "The second number"), Slot("operation", "one of: plus, minus, times", "What to do with them")],
       "What is {a} {operation} {b}?", "{a} {operation} {b}?", "Calculate {a} {operation} {b}.", "How much is {a} {operation} {b}?", "Do the sum: {a} {operation} {b}."),
    _s("send_mail mail_to write_email", "Writes an email", [Slot("to", "email", "Who gets it"), Slot("subject", "query", "What it is about"), Slot("body", "phrase", "What it says", False)],
       "Email {to} about {subject}.", 'Write to {to} about {subject}: "{body}"', "Mail {to}, subject {subject}.", "{to} should get an email about {subject}.", 'Send "{body}" to {to}, subject {subject}.'),
    _s("paint set_color light_color", "Gives something a color", [Slot("thing", "room", "What gets it"), Slot("color", "color", "Which color")],
       "Make the {thing} {color}.", "The {thing} should be {color}.", "I want a {color} {thing}.", "{color} for the {thing}.", "Color the {thing} {color}.", "Can the {thing} be {color}?"),
    _s("set_volume brightness_of fan_speed", "How strong something is", [Slot("device", "room", "Which device"), Slot("percent", "level", "From 0 to 100")],
       "Set the {device} to {percent} percent.", "{device} at {percent}.", "Turn the {device} to {percent}.", "The {device} is too much, {percent} is enough.", "I want {percent} percent on the {device}.", "Put the {device} to {percent} %."),
    _s("create_user add_contact new_member", "Adds a person", [Slot("name", "name", "What the person is called"), Slot("email", "email", "Where to write to", False), Slot("age", "minutes", "How old", False)],
       "Add {name}.", "{name} is new here, the email is {email}.", "Save {name}, {email}.", "My friend {name} is {age} years old, please add.", "Put {name} on the list, age {age}.", "New member: {name}, {age}, {email}."),
    _s("news_about headlines read_news", "News", [Slot("topic", "query", "About what"), Slot("number", "count", "How many", False)],
       "What is new about {topic}?", "Any news on {topic}?", "Give me {number} headlines about {topic}.", "News of {topic}, please.", "Read me {number} stories on {topic}.", "What do the papers say about {topic}?"),
    _s("shopping_list add_items list_add", "Adds things to a list", [Slot("items", "items", "What to add")],
       "Put {items} on the list.", "Add {items}.", "We are out of {items}.", "I need {items}.", "Do not forget {items}.", "Please note {items}."),
    _s("get_time world_clock time_in", "What time it is in a place", [Slot("city", "city", "Which place")],
       "What time is it in {city}?", "How late is it in {city}?", "Time in {city}?", "Is it night in {city}?", "Can I call somebody in {city} now?"),
    _s("population country_info about_country", "Facts of a country", [Slot("country", "country", "Which country"), Slot("fact", "one of: people, area, capital, flag", "Which fact")],
       "Tell me the {fact} of {country}.", "{country}: {fact}?", "I would like to know the {fact} of {country}.", "What about the {fact} of {country}?", "Look up {country}, the {fact}."),
    _s("log_run sport_log track_exercise", "Keeps track of sports", [Slot("sport", "one of: running, swimming, cycling, yoga", "Which sport"), Slot("minutes", "minutes", "How long"), Slot("day", "date", "When", False)],
       "I did {minutes} minutes of {sport}.", "{sport}, {minutes} minutes.", "On {day} I was {sport} for {minutes} minutes.", "Write down {minutes} minutes {sport}.", "Today: {sport} for {minutes} minutes."),
    _s("set_alarm wake_at morning_call", "Wakes somebody", [Slot("time", "time", "When"), Slot("day", "date", "Which day", False)],
       "Wake me at {time}.", "I have to get up at {time}.", "Alarm at {time} on {day}.", "Set an alarm for {time}.", "On {day} I get up at {time}.", "Do not let me sleep past {time}."),
    _s("buy_ticket movie_seats event_tickets", "Gets tickets", [Slot("show", "title", "For what"), Slot("seats", "count", "How many"), Slot("time", "time", "When it begins", False)],
       "{seats} tickets for {show}.", "I want to see {show}, we are {seats}.", "Get {seats} seats for {show} at {time}.", "We want to go to {show} at {time}, {seats} of us.", "Are there {seats} seats for {show}?"),
    _s("review rate_product give_stars", "Says how good something was", [Slot("product", "goods", "What"), Slot("stars", "stars", "From 1 to 5"), Slot("comment", "phrase", "Why", False)],
       "{stars} stars for {product}.", "I give {product} {stars} stars.", 'Rate {product} with {stars}: "{comment}"', "{product} gets {stars} from me.", 'My opinion of {product}: {stars}, "{comment}".'),
    _s("unit_convert to_units measure", "Changes a length or a weight to another unit", [Slot("value", "amount", "How much it is"), Slot("given", "one of: miles, feet, pounds, gallons", "Unit that it has"), Slot("wanted", "one of: kilometers, meters, kilograms, liters", "Unit to give")],
       "What is {value} {given} in {wanted}?", "Convert {value} {given} to {wanted}.", "{value} {given} is how many {wanted}?", "How many {wanted} are {value} {given}?", "I have {value} {given}, say it in {wanted}."),
    _s("assign_task give_job todo_for", "Gives a task to somebody", [Slot("task", "query", "What is to be done"), Slot("person", "name", "Who does it"), Slot("urgency", "one of: low, normal, high", "How urgent", False)],
       "{person} should do {task}.", "Give {task} to {person}.", "Ask {person} to see to {task}, urgency {urgency}.", "{task} is for {person}.", "Let {person} take care of {task}.", "{urgency} urgency: {task}, by {person}."),
    _s("run_command execute shell", "Runs a command on the computer", [Slot("command", "command", "What to run")],
       "Run {command}.", "Execute `{command}`.", "Type {command} for me.", "What does {command} print?", "Please run `{command}` and tell me.", "Start {command} in the shell."),
    _s("library_search find_book books_by", "Finds books", [Slot("author", "name", "Who wrote it"), Slot("about", "query", "What it is about", False), Slot("year", "year", "When it came out", False)],
       "Which books did {author} write?", "A book by {author} about {about}.", "Something by {author} from {year}.", "Do you have {author}?", "I am looking for a book by {author}.", "{author} wrote about {about} in {year}, find it."),
    _s("pay transfer_money send_money", "Sends money to somebody", [Slot("receiver", "name", "Who gets it"), Slot("amount", "amount", "How much")],
       "Pay {receiver} {amount}.", "Send {amount} to {receiver}.", "{receiver} gets {amount} from me.", "I owe {receiver} {amount}.", "Give {amount} to {receiver}.", "Transfer {amount}, it is for {receiver}."),
)  # fmt: skip
