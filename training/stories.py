"""Short stories from plots: a want or a trouble, an attempt that fails, help or an idea, an end. Each sentence has several forms.

They teach what the teacher's stories lack: who is who from the first sentence to the last, and an end.
"""

from __future__ import annotations

import random
import re

from .chat import Document
from .words import BOYS, COLORS, GIRLS, a

__all__ = ["asked", "plain", "story"]

R = random.Random
ANIMALS = "cat dog rabbit fox bear mouse duck frog owl hen pony lamb turtle squirrel hedgehog goat kitten puppy donkey bird beaver badger".split()
PEOPLE = (
    "baker farmer sailor gardener painter cook shepherd giant robot dragon wizard knight fisherman musician".split()
)
PLACES = "forest garden park village field farm meadow hill river lake beach school market library yard castle mountain island".split()
LITTLE = "small little young kind quiet brave curious shy cheerful gentle clever funny".split()
THINGS = "ball kite hat boat drum bell book lantern key shell coat bucket basket ribbon scarf spoon cup doll whistle stone box bag toy train".split()
FOODS = "apples bread soup cake berries honey cookies pears carrots cheese pancakes plums nuts pie rice".split()
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy", "foggy", "snowy", "bright", "quiet")
FAMILY = "mother father grandmother grandfather sister brother aunt uncle neighbor teacher".split()

# {n} the hero, {he} {him} {his} pronouns, {m} the helper's name, {f} the family member, {an} an animal, {adj}, {t} {t2}
# things, {p} {p2} places, {food}, {col} a color, {w} weather. "A|B" between parentheses is a choice.
OPENINGS = (
    "(Once upon a time, there was|Once there was|There once was) {a adj} {child} named {n}. {He} lived near the {p} with {his} {f}.",
    "{n} was {a adj} {child} who loved the {p}. (Every morning|Every day after school|When it was {w}), {he} went there to play.",
    "(On a {w} morning|One {w} day|One {w} afternoon), {n} went to the {p}. {He} took {his} {col} {t} (with {him}|along).",
    "In a house by the {p} lived {a adj} {child} named {n}. {He} had {a an} named {m}, and the two were (best friends|always together).",
    "{n} had {a col} {t}. It was a (present|gift) from {his} {f}, and {he} (took it everywhere|loved it very much).",
)
PLOTS = (
    (  # lost
        "One day, the {t} was gone. {n} looked under the bed and behind the door, but it was not there.",
        "(Then|One {w} day) something bad happened. {n} could not find {his} {t} (anywhere|any more).",
        "/",
        '"(Where can it be|Oh no, where is it)?" {n} (said|asked). {He} felt (sad|like crying).',
        "{n} was (sad|worried), and {he} asked {his} {f} for help.",
        "/",
        "{His} {f} said, \"(Think back|Let us think). Where did you play (yesterday|last)?\" {n} thought about it. {He} had been at the {p2}.",
        "{m} the {an} (came by and asked|saw {him} and asked), \"Why are you sad?\" {n} told {m} about the {t}. \"I saw (something {col}|it) at the {p2},\" said {m}.",
        "/",
        "They went to the {p2} together. (There, under a tree,|There, in the grass,|There, beside a big stone,) lay the {t}.",
        "So they walked to the {p2} and looked (everywhere|all around). At last {n} saw the {t} (under a bush|behind a wall|in the tall grass).",
        "/",
        "{n} was so happy that {he} (jumped up and down|laughed out loud). \"Thank you for (helping me|your help)!\" {he} said.",
        "{n} (hugged|held) the {t} and smiled. From that day on, {he} always put it back in its place.",
    ),
    (  # fear
        "But {n} was afraid of (the dark|deep water|high places|loud noises|the big {p2}).",
        "There was one thing that {n} did not like. {He} was afraid (of the dark|of storms|of the old bridge|to speak to others).",
        "/",
        "One evening, {m} the {an} was (stuck|lost) near the {p2} and called, \"Help! Help!\"",
        "One day, {he} heard a small voice from the {p2}. It was {m} the {an}, who (could not get home|had hurt a leg).",
        "/",
        "{n}'s heart beat fast. {He} wanted to run away, but {m} needed {him}.",
        "{n} (took a deep breath|closed {his} eyes and counted to three). \"I am scared, but I will try,\" {he} said.",
        "/",
        "Step by step, {he} went (closer|on). It was not as bad as {he} had thought. {He} (reached out {his} hand and helped {m}|carried {m} all the way home).",
        "{He} held {his} {t} tight and walked slowly to the {p2}. There {he} (found|helped) {m}, and they went home together.",
        "/",
        "\"You are very brave,\" said {m}. {n} smiled, because {he} (felt brave too|was not afraid any more).",
        "{His} {f} was proud of {him}. \"Being brave means that you are afraid and do it (anyway|all the same),\" {his} {f} said.",
    ),
    (  # sharing
        "{n} had a basket of {food}. {He} wanted to eat them all by {him}self.",
        "One day, {his} {f} gave {him} some {food}. \"They are all mine,\" {n} said.",
        "/",
        "On the way to the {p2}, {he} met {m} the {an}. \"I am so hungry,\" said {m}. \"I have not eaten (today|since yesterday).\"",
        "Then {m} the {an} came by. {m} looked (tired|thin) and had nothing to eat.",
        "/",
        "{n} looked at the {food} and then at {m}. {He} thought for a (moment|while). \"We can share,\" {he} said.",
        "First {n} wanted to (hide the basket|walk on). But {m} looked so sad that {he} stopped and said, \"Here, have some of mine.\"",
        "/",
        "They sat down (under a tree|in the sun) and ate together. The {food} tasted better than ever.",
        "{m} ate and smiled. \"Thank you! Now I will show you something,\" said {m}, and took {n} to a secret place in the {p2}.",
        "/",
        "From that day on, {n} and {m} were (good|best) friends, and they always shared.",
        "{n} learned that it is (nicer|more fun) to share than to eat alone.",
    ),
    (  # building
        "{n} wanted to build a (tree house|boat|bridge|kite|bird house). {He} had (wood|paper), some string and a lot of (hope|time).",
        "One day, {n} had an idea. \"I will make a (boat|kite|swing|little house)!\" {he} said.",
        "/",
        "{He} worked all morning, but it (fell down|broke) again and again.",
        "{He} tried once, and it fell apart. {He} tried (twice|again), and it fell apart (too|again).",
        "/",
        "\"I will never do it,\" {n} said (sadly|and sat down). {m} the {an} heard {him} and said, \"Let us do it together.\"",
        "{His} {f} saw it and did not laugh. \"What if you start with the (big|bottom) part?\" {his} {f} asked.",
        "/",
        "So they started again, (slowly|piece by piece). One held the string and the other tied the knots. (After a while|Before it got dark), it was ready.",
        "{n} tried it that way. It took (a long time|all afternoon), but this time it held.",
        "/",
        "It was not perfect, but it was (strong|good), and they had made it (together|with their own hands). They were very proud.",
        "{n} smiled from ear to ear. \"The best things take some time,\" {he} said.",
    ),
    (  # new friend
        "One day, a new child came to the {p2}. {His2} name was {m}, and {he2} did not know anybody.",
        "At the {p2}, {n} saw a child who stood alone. It was {m}, who had just moved (there|to the village).",
        "/",
        "The others were playing, and nobody asked {m} to join. {m} looked at the ground.",
        "{m} wanted to play too but was too shy to ask.",
        "/",
        "{n} remembered (how it feels to be alone|{his} own first day). {He} walked over and said, \"Hi, I am {n}. Do you want to play with my {t}?\"",
        "{n} took {his} {t} and went over. \"Do you like {food}?\" {he} asked. {m} nodded and smiled a little.",
        "/",
        "They played until (the sun went down|it was time to go home). They (ran, jumped and laughed|laughed a lot).",
        "Soon they were (running around|playing) together, and {m} told {n} about {his2} old home.",
        "/",
        "\"Will you come (again|back) tomorrow?\" asked {m}. \"Of course,\" said {n}. \"We are friends now.\"",
        "That evening, {n} told {his} {f}, \"Today I made a new friend.\" And that was the best part of the day.",
    ),
    (  # rescue in weather
        "Suddenly the wind grew strong and dark clouds came over the {p2}. It began to rain.",
        "Then the weather changed. It became (cold|dark), and soon it rained (hard|cats and dogs).",
        "/",
        "{n} wanted to go home, but then {he} saw (a tiny|a little) {an} under a (leaf|bench|bush). It was wet and it shook.",
        "On the way home, {n} heard a (soft|small) cry. A little {an} sat in the rain all alone.",
        "/",
        "\"Do not be afraid,\" said {n}. {He} put the {an} (under {his} coat|into {his} hat) and carried it home.",
        "{n} took off {his} scarf and wrapped it around the {an}. \"You can come with me,\" {he} said softly.",
        "/",
        "At home, {his} {f} brought a towel and some (warm milk|{food}). The {an} ate, closed its eyes and slept by the fire.",
        "{His} {f} made a warm bed in a box. Soon the {an} was dry and (happy|fast asleep).",
        "/",
        "The next morning the sun was shining. The {an} did not want to leave, so {n} named it {m}, and it stayed.",
        "When the rain was over, they found its mother at the {p2}. {n} waved goodbye and felt warm inside.",
    ),
    (  # contest
        "There was going to be a (race|song contest|baking contest) at the {p2}. {n} wanted to win.",
        "Every year there was a big (race|show) at the {p2}. This year {n} would take part.",
        "/",
        "{He} practiced every day. Sometimes it went well, and sometimes it did not, but {he} did not give up.",
        "{He} practiced in the morning and in the evening, and {his} {f} (helped|watched).",
        "/",
        "On the day of the contest, {n} was (nervous|excited). In the middle of it, {m} the {an} (fell down|hurt a foot|dropped everything).",
        "The day came, and {n} did very well. Then {he} saw that {m} the {an} was in trouble.",
        "/",
        "{n} could have gone on and won. But {he} stopped and helped {m} (up|first).",
        "\"Go on, you can win!\" said {m}. But {n} shook {his} head. \"We will finish together,\" {he} said.",
        "/",
        "They came in last, but everybody clapped. The judge gave {n} {a col} ribbon for (being kind|a kind heart).",
        "They did not win, but {n} had a new friend, and that was (better than a prize|worth more than winning).",
    ),
)  # fmt: skip
PLOTS += (
    (  # a cup that broke
        "One afternoon, {n} was playing inside with {his} {t}. (Crash|Bang)! The best (cup|vase) of {his} {f} fell down and broke.",
        "{n} ran through the house, and {his} {t} hit a (cup|plate). It fell and broke into (many|a hundred) pieces.",
        "/",
        "{n} looked (around|at the door). Nobody had seen it. {He} hid the pieces (under the bed|behind a chair).",
        "\"What shall I do?\" {n} whispered. {He} put the pieces into a box and went outside.",
        "/",
        "But {he} could not (play|eat|sleep). {His} stomach hurt, and all {he} could think of was the broken pieces.",
        "All day, {n} was very quiet. Even {food} did not taste good.",
        "/",
        "At last {n} went to {his} {f}. \"It was me. I broke it, and I am sorry,\" {he} said with tears in {his} eyes.",
        "In the evening {he} said (softly|in a small voice), \"I have to tell you something. I broke it.\"",
        "/",
        "{His} {f} was quiet for a moment. Then {his} {f} said, \"Thank you for telling me the truth. That was not easy.\"",
        "{His} {f} took {him} into {his} arms. \"A thing can be mended,\" {his} {f} said. \"I am glad that you told me.\"",
        "/",
        "Together they glued the pieces. You could still see the cracks, but {n} felt (light|much better).",
        "That night {n} slept well again, for there was nothing left to hide.",
    ),
    (  # a seed
        "{His} {f} gave {n} a tiny seed. \"Put it into the ground and (wait|be patient),\" {his} {f} said.",
        "Near the {p2}, {n} found a seed that was as small as a (grain of sand|crumb). {He} took it home.",
        "/",
        "{n} put it into a pot and gave it water. {He} sat down beside it and waited, but nothing happened.",
        "{He} planted it behind the house. The next morning {he} ran outside, but there was only (earth|brown soil).",
        "/",
        "After (three days|a week), {n} was (sad|angry). \"It does not want to grow!\" {he} told {m} the {an}.",
        "Day after day nothing could be seen. \"Maybe it is dead,\" {n} said to {m} the {an}.",
        "/",
        "\"Good things grow in the dark first,\" said {m}. So {n} went on giving it water and (told it little songs|sang to it).",
        "{m} laughed. \"I was not big in one day either. Give it (time|some sun and some time).\"",
        "/",
        "Then, one {w} morning, there was a green (point|leaf). {n} shouted so loudly that everybody came to see it.",
        "And one day, when {n} had almost forgotten it, a small green (leaf|stem) looked out of the earth.",
        "/",
        "In summer it was {a col} flower, taller than {n}. \"I only had to wait,\" {he} said.",
        "It grew and grew, and in autumn there were new seeds. {n} gave one of them to {m}.",
    ),
    (  # lost on the way
        "One day {n} followed {a col} butterfly, further and further, until {he} did not know where {he} was.",
        "On the way to the {p2}, {n} took a path that {he} did not know. Soon all the trees looked the same.",
        "/",
        "The sun went down, and it became (cold|dark). \"I want to go home,\" said {n}, but nobody answered.",
        "{He} went left, then right, then left again. (It got darker|The shadows grew longer) and longer.",
        "/",
        "Then {he} heard a voice. \"Who is crying here?\" It was {m}, an old {an} (with kind eyes|with a gray nose).",
        "Something moved in the bushes. {n} held {his} breath. But it was only {m}, a (friendly|little) {an}.",
        "/",
        "\"I know the way by the stars,\" said {m}. \"Do you see the bright one? It stands above the {p}. Follow me.\"",
        "\"Listen,\" said {m}. \"Do you hear the water? It flows past the {p}. We only have to walk beside it.\"",
        "/",
        "They walked and told each other stories, and the night was not so dark any more. (Soon|At last) {n} saw a light.",
        "So they went on together until {n} could see {his} own window far away.",
        "/",
        "{His} {f} ran out and held {n} tight. And {m} got a big plate of {food} and a place by the fire.",
        "\"There you are!\" called {his} {f}. From that day on, {n} and {m} met every evening to look at the stars.",
    ),
    (  # a surprise
        "It was {n}'s birthday, but in the morning nobody said a word about it. {His} {f} only said, \"Good morning.\"",
        "{n} woke up early because it was {his} birthday. But the kitchen was empty, and there was no cake.",
        "/",
        "{He} went to see {m} the {an}. \"I have no time today,\" said {m} and ran away.",
        "{n} asked {m} the {an} to play. But {m} (looked at the ground|turned red) and said, \"Not now, maybe later.\"",
        "/",
        "\"They have all forgotten me,\" thought {n}, and walked slowly to the {p2}.",
        "{n} sat down alone at the {p2} and threw little stones. It was the (longest|saddest) day of the year.",
        "/",
        "When it got dark, {he} went home. The house was quiet. {He} opened the door and (everybody|a whole room of friends) shouted, \"Surprise!\"",
        "Then {his} {f} came and said, \"Close your eyes and come with me.\" When {n} opened them, all {his} friends were there.",
        "/",
        "There was a cake with {food}, and {m} had made {a col} {t} for {him}. \"That is why I had no time,\" {m} said and laughed.",
        "Lanterns hung in the trees, and there were {food} for everybody. {m} gave {n} {a col} {t}.",
        "/",
        "\"And I thought that you had forgotten me,\" said {n}. \"We could never forget you,\" said {his} {f}.",
        "They danced until late. It was the best birthday that {n} ever had.",
    ),
    (  # learning something
        "All the others could (swim|ride a bike|whistle), only {n} could not. When they met at the {p2}, {he} always stayed at home.",
        "{n} wanted so much to learn to (swim|sing|climb|dance). But every time {he} tried, somebody laughed.",
        "/",
        "\"I am too {adj} for that,\" {he} told {m} the {an}. \"Nobody is too {adj} for that,\" said {m}.",
        "One day {m} the {an} saw {him} sitting alone. \"Shall I show you how it goes?\" asked {m}.",
        "/",
        "They began with something very easy. {n} tried it (ten|twenty) times, and {m} never laughed.",
        "First {n} only watched. Then {he} did a little bit of it, and the next day a little bit more.",
        "/",
        "One time {he} almost gave up. \"Tomorrow it will be easier,\" said {m}. And it was true.",
        "There was a day when nothing worked. {n} was (angry|close to tears), but the next morning {he} tried again.",
        "/",
        "And then, (suddenly|one {w} morning), it worked! {n} could do it, once, twice and then again and again.",
        "After two weeks {n} went to the {p2} and showed it to everybody. Nobody laughed this time. They clapped.",
        "/",
        "\"How did you do it?\" they asked. {n} smiled at {m}. \"I had a good teacher,\" {he} said.",
        "Now {n} helps the little ones who cannot do it yet, and {he} never laughs at them.",
    ),
)  # fmt: skip
ENDINGS = ("", "", "", " The end.", "\n\nThe end.", " And they lived happily ever after.", " That night, {n} slept very well.", " {He} went to bed with a smile.")  # fmt: skip


def _choose(r: R, text: str) -> str:
    return re.sub(r"\(([^()]*\|[^()]*)\)", lambda m: r.choice(m[1].split("|")), text)


def _child(r: R, boy: bool) -> str:
    what = r.random()
    if what < 0.5:
        return r.choice(["boy", "child"]) if boy else r.choice(["girl", "child"])
    return r.choice(ANIMALS) if what < 0.8 else r.choice(PEOPLE)


def story(r: R) -> tuple[str, dict[str, str]]:
    """A story and what it is about."""
    boy, boy2 = r.random() < 0.5, r.random() < 0.5
    name = r.choice(BOYS if boy else GIRLS)
    other = r.choice([n for n in (BOYS if boy2 else GIRLS) if n != name])
    place, place2 = r.sample(PLACES, 2)
    child = _child(r, boy)
    about = {"child": child, "n": name, "m": other, "an": r.choice([x for x in ANIMALS if x != child]), "adj": r.choice(LITTLE), "t": r.choice(THINGS), "p": place, "p2": place2, "food": r.choice(FOODS), "col": r.choice(COLORS), "w": r.choice(WEATHER), "f": r.choice(FAMILY)}  # fmt: skip
    pronouns = {"he": "he", "him": "him", "his": "his"} if boy else {"he": "she", "him": "her", "his": "her"}
    words = about | pronouns | {"he2": "he" if boy2 else "she", "his2": "his" if boy2 else "her"}
    words |= {
        key.capitalize(): value.capitalize() for key, value in words.items() if key in pronouns or key.endswith("2")
    }
    groups, group = [], []
    plot = r.choice(PLOTS)
    for sentence in (*plot, "/"):
        if sentence == "/":
            groups.append(group)
            group = []
        else:
            group.append(sentence)
    first, *rest = [r.choice(g) for g in groups]
    # A companion animal fits only where the plot's animal has a name.
    openings = [o for o in OPENINGS if "{an}" not in o or any("{m} the {an}" in part for part in plot)]
    paragraphs = [r.choice(openings), first, *rest]
    breaks = r.choice([" ", "\n\n"]), r.choice([" ", " ", "\n\n"])
    text = paragraphs[0] + " " + paragraphs[1]
    for i, paragraph in enumerate(paragraphs[2:]):
        text += breaks[i % 2] + paragraph
    return _fill(r, text + r.choice(ENDINGS), words), words


def _fill(r: R, text: str, words: dict[str, str]) -> str:
    text = re.sub(r"\{a (\w+)\}", lambda m: a(words[m[1]]), _choose(r, text))
    return text.format(**words)


REQUESTS = (
    "Tell me a story about {n}.", "Tell me a (short|little) story.", "Write a (short |little |)story about {a an} and {a t}.",
    "Write a story about {n} and {m}.", "Can you tell me a story about {a an}?", "I want to hear a story about {n} and {a t}.",
    "Tell me a bedtime story.", "Write a story with a happy end about {n} and the {t}.", "Please write a story that plays at the {p2}.",
    "Tell me about {n} and {m} the {an}.", "Write a short story about {a adj} {child} near the {p}.", "Tell me about {a child} named {n}.", "A story about {a adj} {child}, please.", "What happened to {n} the {child}?", "Story please, with {a an} in it!",
    "Make up a story about {a col} {t}.", "Do you know a story about the {p}?", "Once upon a time there was a child named {n}. What happened?",
)  # fmt: skip


def asked(r: R) -> Document:
    """A story that somebody asks for."""
    text, words = story(r)
    lower = text.lower()
    fitting = [q for q in REQUESTS if all(words[slot].lower() in lower for slot in re.findall(r"\{(?:a )?(\w+)\}", q))]
    question = _fill(r, r.choice(fitting), words)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    if r.random() < 0.15:
        more = (
            ("Who is the story about?", f"It is about {words['n']}."), ("What was the name of the child?", f"The name was {words['n']}."),
            ("Thank you! I liked it.", "I am glad that you liked it."), ("Where did it begin?", f"It began near the {words['p']}."),
            ("Who else is in it?", f"{words['m']} is in it too."),
        )  # fmt: skip
        question, answer = r.choice(more)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"c": "story", "m": messages}


def plain(r: R) -> Document:
    """A story as text, so that it can be continued from its first words."""
    return {"c": "text", "m": [{"role": "text", "content": story(r)[0]}]}
