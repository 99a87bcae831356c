"""A seeded grammar that writes children's stories about the world of ``world.py``.

The choices (who, what, which sentence) are free, which keeps the text uncertain; what follows
from them (where that person lives, what that animal eats) is fixed by the world, so a language
model is rewarded for knowing the facts. Pronouns, plurals and mentions of earlier sentences also
have to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from yopo.embedded.world import (
    ANIMALS,
    CAUSES,
    COLLECTIBLES,
    COLOR_MIXES,
    JOBS,
    LANDS,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PEOPLE,
    THINGS,
    TOWNS,
    WEEKDAYS,
    Job,
    Person,
)

__all__ = ["HELD_OUT_SEED", "STORY_SEPARATOR", "stories", "write_text"]

HELD_OUT_SEED = 20_000_003
"""The seed of the text that the embedded model has never been trained on."""

STORY_SEPARATOR = "\n\n"
"""What stands between two stories in a longer text."""

_POSSESSIVES = {"she": "her", "he": "his"}
_OBJECTS = {"she": "her", "he": "him"}
_PERSONALITIES = ["kind", "clever", "cheerful", "shy", "brave", "tall", "young", "busy"]
_MOODS = ["happy", "tired", "proud", "hungry", "sleepy", "glad", "calm", "lucky"]
_LOOKS = ["small", "big", "old", "merry", "funny", "gentle", "quiet", "pretty", "lonely", "fine"]
_MANNERS = ["happily", "slowly", "quickly", "gladly", "carefully", "calmly", "eagerly", "merrily"]
_SAYINGS = ["said", "cried", "whispered", "answered", "sang", "laughed"]
_TIMES = [
    "then",
    "later",
    "before long",
    "after lunch",
    "in the afternoon",
    "at noon",
    "a little later",
    "to everyone's surprise",
]


def stories(seed: int) -> Iterator[str]:
    """Write stories without end, the same ones each time for the same seed.

    Args:
        seed: Which sequence of stories to write.

    Yields:
        One story of 5 to 12 sentences, as a single paragraph.
    """
    random = Random(seed)
    while True:
        yield _story(random)


def write_text(seed: int, characters: int) -> str:
    """Write whole stories, a blank line between them, until there are enough characters.

    Args:
        seed: Which sequence of stories to write.
        characters: The least length of the text; the last story is never cut short.

    Returns:
        The first stories of ``stories(seed)``, as one text.
    """
    parts: list[str] = []
    length = -len(STORY_SEPARATOR)
    for story in stories(seed):
        parts.append(story)
        length += len(STORY_SEPARATOR) + len(story)
        if length >= characters:
            break
    return STORY_SEPARATOR.join(parts)


class _Tale:
    """One story in the making: its hero, the hero's friend, and what has come up so far."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.hero: Person = random.choice(list(PEOPLE.values()))
        self.friend: Person = PEOPLE[self.hero.friend]
        self.job: Job = JOBS[self.hero.job]
        self.name = self.hero.name
        self.she = self.hero.pronoun
        self.her = _POSSESSIVES[self.she]
        self.her_object = _OBJECTS[self.she]
        self.memories: list[str] = []

    def pick(self, *sentences: str) -> str:
        """Choose one of several ways to go on."""
        return self.random.choice(sentences)

    def start(self, *sentences: str) -> str:
        """Choose how a scene starts, and now and then say when it happens."""
        sentence = self.pick(*sentences)
        return f"{self.pick(*_TIMES)}, {sentence}" if self.chance(0.4) else sentence

    def looking(self, noun: str) -> str:
        """Give a noun its article and, half the time, an adjective."""
        return _with_article(f"{self.pick(*_LOOKS)} {noun}" if self.chance(0.5) else noun)

    def manner(self) -> str:
        """Say how something is done, half the time."""
        return f" {self.pick(*_MANNERS)}" if self.chance(0.5) else ""

    def other(self) -> Person:
        """Choose the friend of the hero, or else anyone who is not the hero."""
        if self.chance(0.4):
            return self.friend
        return self.random.choice([one for one in PEOPLE.values() if one.name != self.name])

    def subject(self) -> str:
        """Name the hero, or use the pronoun."""
        return self.random.choice([self.name, self.name, self.she])

    def chance(self, probability: float) -> bool:
        """Draw whether something happens."""
        return self.random.random() < probability


def _story(random: Random) -> str:
    tale = _Tale(random)
    sentences = _opening(tale)
    wanted = random.randint(5, 9)
    # Sampled, not chosen, so that no scene comes twice in a story. A scene has 2 or 3 sentences
    # and the ending 1 or 2, which bounds every story at 12.
    for scene in random.sample(_SCENES, len(_SCENES)):
        sentences += scene(tale)
        if len(sentences) >= wanted - 1:
            break
    return " ".join(_capital(sentence) for sentence in sentences + _ending(tale))


def _opening(tale: _Tale) -> list[str]:
    hero, friend, town = tale.hero, tale.friend, TOWNS[tale.hero.town]
    personality = tale.pick(*_PERSONALITIES)
    sentences = [
        tale.pick(
            f"once there was {_with_article(personality)} {hero.job} called {hero.name}, who lived "
            f"in {town.name}.",
            f"{hero.name} was {_with_article(personality)} {hero.job} from {town.name}, "
            f"a town in {town.land}.",
            f"in the town of {town.name}, by the {town.river} river, lived {hero.name} "
            f"the {hero.job}.",
            f"{hero.name} lived in {town.name}, close to the old {town.landmark}.",
        ),
        tale.pick(
            f"{tale.she} always wore {_with_article(hero.color)} coat.",
            f"{tale.she} had {_with_article(hero.pet)} called {hero.pet_name}.",
            f"{tale.she} loved to eat {hero.food}.",
            f"{tale.her} best friend was {friend.name}, {_with_article(friend.job)} "
            f"from {friend.town}.",
            f"{tale.she} had {_with_article(hero.color)} coat and {_with_article(hero.pet)} "
            f"called {hero.pet_name}.",
        ),
    ]
    if tale.chance(0.5):
        month = tale.random.choice(MONTHS)
        sentences.append(
            tale.pick(
                f"it was {month.season}, and as always in {month.name}, {month.weather}.",
                f"one day in {month.name}, {month.weather}.",
            )
        )
    return sentences


def _ending(tale: _Tale) -> list[str]:
    hero, friend = tale.hero, tale.friend
    sentences = [
        tale.pick(
            f"in the evening {hero.name} went home to {hero.town} and ate {hero.food}.",
            f"at last {tale.subject()} hung up the {hero.color} coat and played "
            f"with {hero.pet_name} the {hero.pet}.",
            f"then {hero.name} gave {hero.pet_name} some {ANIMALS[hero.pet].food} "
            f"and fell asleep in {hero.town}.",
            f"{friend.name} and {hero.name} ended the day with {hero.food} and {friend.food}.",
            f"{hero.name} was {tale.pick(*_MOODS)}, and so was {hero.pet_name} the {hero.pet}.",
        )
    ]
    if tale.memories and tale.chance(0.7):
        things = " and ".join(tale.memories[:2])
        sentences.append(
            tale.pick(
                f"{tale.she} never forgot {things}.",
                f"{tale.she} told {friend.name} all about {things}.",
                f"that night {tale.she} dreamed of {things}.",
            )
        )
    return sentences


def _meet_animal(tale: _Tale) -> list[str]:
    animal = tale.random.choice(list(ANIMALS.values()))
    home = animal.home.split(" ", 2)[2]
    tale.memories.append(f"the {animal.name}")
    sentences = [
        tale.start(
            f"{tale.subject()} met {tale.looking(animal.name)} that lived {animal.home}.",
            f"{animal.home} {tale.subject()} saw {tale.looking(animal.name)}.",
            f"{_with_article(animal.color)} {animal.name} {animal.moved}{tale.manner()} "
            f"past {tale.name}.",
        ),
        tale.pick(
            f'"{_capital(animal.sound)}!" {tale.pick(*_SAYINGS)} the {animal.name}, '
            f"and {tale.she} gave it some {animal.food}.",
            f"the {animal.name} was hungry and looked for {animal.food}.",
            f'the {animal.name} said "{animal.sound}" and {animal.moved} about{tale.manner()}.',
        ),
    ]
    if tale.chance(0.6):
        sentences.append(
            tale.pick(
                f"then the {animal.name} {animal.moved} back to its {home}{tale.manner()}.",
                f"after the {animal.food} it was not hungry any more.",
                f"{animal.plural} live {animal.home} and eat {animal.food}.",
            )
        )
    return sentences


def _animal_family(tale: _Tale) -> list[str]:
    animal = tale.random.choice(list(ANIMALS.values()))
    count = tale.random.randint(1, 6)
    young = animal.young if count == 1 else _plural(animal.young)
    their, them = ("its", "it") if count == 1 else ("their", "them")
    tale.memories.append(f"the {young}")
    return [
        tale.start(
            f"{animal.home} there {_was(count)} {NUMBERS[count]} {young}.",
            f"{tale.subject()} found {NUMBERS[count]} {tale.pick(*_LOOKS)} {young}.",
        ),
        tale.pick(
            f"the mother of the {young} was {_with_article(animal.color)} {animal.name}.",
            f"{their} mother, {_with_article(animal.name)}, came with {animal.food}.",
            f"{_with_article(animal.name)} {animal.moved} near and fed {them} {animal.food}.",
        ),
    ]


def _work(tale: _Tale) -> list[str]:
    job, buyer = tale.job, tale.other()
    count = tale.random.randint(2, 9)
    sentences = [
        tale.start(
            f"{tale.subject()} went to the {job.place}{tale.manner()}, as every {job.name} does.",
            f"there was work to do in the {job.place}, for {tale.name} was "
            f"{_with_article(job.name)}.",
        ),
        tale.pick(
            f"{tale.she} took {tale.her} {job.tool} and {job.made} {NUMBERS[count]} {job.product}.",
            f"with {tale.her} {job.tool} {tale.she} {job.made} {NUMBERS[count]} {job.product}.",
        ),
    ]
    if tale.chance(0.5):
        sold = tale.random.randint(1, count - 1)
        left = count - sold
        sentences.append(
            f"{buyer.name} the {buyer.job} bought {NUMBERS[sold]} of the {NUMBERS[count]} "
            f"{job.product}, so {NUMBERS[left]} {_was(left)} left."
        )
    return sentences


def _count_up(tale: _Tale) -> list[str]:
    things = tale.random.choice(COLLECTIBLES)
    first, second = tale.random.randint(2, 9), tale.random.randint(1, 9)
    giver = tale.other()
    tale.memories.append(f"the {NUMBERS[first + second]} {things}")
    return [
        tale.start(
            f"{tale.subject()} had {NUMBERS[first]} {things} in {tale.her} pocket.",
            f"{tale.subject()} found {NUMBERS[first]} {tale.pick(*_LOOKS)} {things}.",
        ),
        tale.pick(
            f"{giver.name} from {giver.town} gave {tale.her_object} {NUMBERS[second]} more, "
            f"and that made {NUMBERS[first + second]} {things}.",
            f"{giver.name} the {giver.job} had {NUMBERS[second]}, so together they had "
            f"{NUMBERS[first + second]}.",
        ),
    ]


def _lesson(tale: _Tale) -> list[str]:
    land = tale.random.choice(list(LANDS.values()))
    town = tale.random.choice(list(TOWNS.values()))
    job = tale.random.choice(list(JOBS.values()))
    animal = tale.random.choice(list(ANIMALS.values()))
    thing = tale.random.choice(list(THINGS.values()))
    questions = [
        (f"What is the capital of {land.name}?", f"It is {land.capital}"),
        (f"Who rules {land.name}?", f"{land.ruler} does"),
        (f"Which color is the flag of {land.name}?", f"It is {land.flag}"),
        (f"Which river runs through {town.name}?", f"The {town.river} does"),
        (f"In which land is {town.name}?", f"In {town.land}"),
        (f"Where does {_with_article(job.name)} work?", f"In the {job.place}"),
        (f"What does {_with_article(job.name)} need?", f"{_capital(_with_article(job.tool))}"),
        (f"What do {animal.plural} eat?", f"They eat {animal.food}"),
        (f"What is a young {animal.name} called?", f"It is called {_with_article(animal.young)}"),
        (f"What is a {thing.name} made of?", f"It is made of {thing.material}"),
    ]
    pupil, teacher = tale.name, tale.other().name
    if tale.chance(0.5):
        pupil, teacher = teacher, pupil
    question, answer = tale.random.choice(questions)
    return [
        f'"{question}" asked {teacher}{tale.manner()}.',
        f'"{answer}," {tale.pick(*_SAYINGS)} {pupil}.',
    ]


def _paint(tale: _Tale) -> list[str]:
    mix = tale.random.choice(COLOR_MIXES)
    first, second = tale.random.sample([mix.first, mix.second], 2)
    picture = tale.random.choice([a for a in ANIMALS.values() if a.color != mix.result])
    friend = tale.other().name
    tale.memories.append(f"the {mix.result} {picture.name}")
    return [
        tale.start(
            f"{tale.subject()}{tale.manner()} mixed {first} and {second} paint "
            f"and got {mix.result}.",
            f"when {tale.subject()} stirred {first} paint into {second} paint, "
            f"it turned {mix.result}.",
        ),
        tale.pick(
            f"with it {tale.she} painted {_with_article(mix.result)} {picture.name}, "
            f"but real {picture.plural} are {picture.color}.",
            f"{friend} laughed at the {mix.result} {picture.name} in the picture, "
            f"because {picture.plural} are {picture.color}.",
        ),
    ]


def _cause(tale: _Tale) -> list[str]:
    cause = tale.random.choice(CAUSES)
    return [
        tale.pick(
            f"{cause.event}, so {tale.subject()} {cause.reaction}.",
            f"because {cause.event}, {tale.subject()} {cause.reaction}.",
            f"{tale.subject()} {cause.reaction}, because {cause.event}.",
        ),
        tale.pick(
            f"that is how {tale.she} {cause.result}.",
            f"soon {tale.she} {cause.result}.",
            f"{tale.pick(*_TIMES)}, {tale.she} {cause.result}.",
        ),
    ]


def _gift(tale: _Tale) -> list[str]:
    thing = tale.random.choice(list(THINGS.values()))
    giver = tale.other()
    tale.memories.append(f"the {thing.name}")
    if tale.chance(0.5):
        looks = f"{tale.looking(thing.name)} made of {thing.material}"
        more = thing.color
    else:
        looks = f"{_with_article(thing.color)} {thing.name}"
        more = f"made of {thing.material}"
    sentences = [
        tale.start(
            f"{giver.name} the {giver.job} gave {tale.name} {looks}.",
            f"{tale.subject()} found {looks}.",
            f"{tale.subject()} bought {looks} from {giver.name}.",
        ),
        tale.pick(
            f"the {thing.name} was {more}, and {tale.she} used it to {thing.use}.",
            f'"Now I can {thing.use}," {tale.pick(*_SAYINGS)} {tale.name}.',
        ),
    ]
    if tale.chance(0.3):
        sentences.append(
            f"{giver.name} also wanted to {thing.use}, so they shared the {thing.name}."
        )
    return sentences


def _journey(tale: _Tale) -> list[str]:
    town = tale.random.choice([t for t in TOWNS.values() if t.name != tale.hero.town])
    land = LANDS[town.land]
    tale.memories.append(town.name)
    sentences = [
        tale.start(
            f"{tale.subject()} took {tale.looking('train')} to {town.name}, a town in {town.land}.",
            f"{tale.subject()}{tale.manner()} traveled to {town.name} to see the {town.landmark}.",
        ),
        tale.pick(
            f"{tale.she} walked{tale.manner()} along the {town.river} river "
            f"to the {town.landmark}.",
            f"over the {town.landmark} of {town.name} flew the {land.flag} flag of {land.name}.",
            f"everyone in {town.name} was talking about {land.ruler} of {land.name}.",
        ),
    ]
    if land.capital != town.name and tale.chance(0.5):
        sentences.append(f"from there it is not far to {land.capital}, the capital of {land.name}.")
    return sentences


def _lost_pet(tale: _Tale) -> list[str]:
    hero, animal = tale.hero, ANIMALS[tale.hero.pet]
    place = tale.random.choice(
        ["behind the door", "under the bed", "up on the roof", "inside the cupboard"]
    )
    return [
        tale.pick(
            f'"Where is my {hero.pet}?" asked {hero.name}{tale.manner()}.',
            f"{hero.pet_name} the {hero.pet} was nowhere to be found.",
        ),
        tale.pick(
            f'"{_capital(animal.sound)}!" came a voice from {place}.',
            f'{place} something said "{animal.sound}".',
        ),
        tale.pick(
            f"it was {hero.pet_name}, who wanted some {animal.food}.",
            f"{hero.pet_name} was {place}, with a bowl of {animal.food}.",
        ),
    ]


def _opposites(tale: _Tale) -> list[str]:
    pair = tale.random.choice(OPPOSITES)
    one, other = tale.random.sample([pair.first, pair.second], 2)
    noun, friend = pair.noun, tale.other().name
    return [
        tale.start(
            f"{tale.subject()} saw one {one} {noun} and one {other} {noun}.",
            f"{friend}'s {noun} was {one}, but {tale.name}'s {noun} was {other}.",
        ),
        tale.pick(
            f"{tale.name} liked the {one} {noun}, and {friend} the {other} one.",
            f'"{_capital(one)} is the opposite of {other}," {tale.pick(*_SAYINGS)} {friend}.',
        ),
    ]


def _days(tale: _Tale) -> list[str]:
    index = tale.random.randrange(7)
    yesterday, today, tomorrow = (WEEKDAYS[(index + step) % 7] for step in (0, 1, 2))
    friend = tale.other()
    return [
        tale.pick(
            f'"Today is {today}, so tomorrow is {tomorrow}," {tale.pick(*_SAYINGS)} {tale.name}.',
            f"yesterday had been {yesterday}, so now it was {today}.",
        ),
        tale.pick(
            f"every {today} {tale.she} ate {tale.hero.food} with {friend.name}.",
            f"on {tomorrow} {friend.name} would come over from {friend.town}.",
        ),
    ]


def _stranger(tale: _Tale) -> list[str]:
    hero, friend = tale.hero.name, tale.friend.name
    other = tale.random.choice([p for p in PEOPLE.values() if p.name not in (hero, friend)])
    tale.memories.append(other.name)
    sentences = [
        tale.start(
            f"{tale.subject()} met {other.name}, {_with_article(other.job)} from {other.town}.",
            f"{tale.looking(other.job)} called {other.name} walked by{tale.manner()}.",
            f"{tale.subject()} got {tale.looking('letter')} from {other.name} in {other.town}.",
        ),
        tale.pick(
            f"{other.name} liked {other.food} and {_with_article(other.color)} coat best of all.",
            f"everyone knows {other.name} and {_POSSESSIVES[other.pronoun]} {other.pet}, "
            f"{other.pet_name}.",
            f"{other.name} is the best friend of {other.friend}.",
        ),
    ]
    if tale.chance(0.4):
        sentences.append(
            f"{other.name} was {tale.pick(*_MOODS)} and spoke about the {JOBS[other.job].place}."
        )
    return sentences


def _visit(tale: _Tale) -> list[str]:
    friend = tale.friend
    job = JOBS[friend.job]
    sentences = [
        tale.start(
            f"{tale.subject()} wanted to see {tale.her} friend {friend.name} in {friend.town}.",
            f"{friend.name} the {friend.job} came by in {_with_article(friend.color)} coat.",
            f"{tale.her} friend {friend.name} was busy in the {job.place}.",
        ),
        tale.pick(
            f"they shared some {friend.food}, which {friend.name} liked best.",
            f"{friend.name} had brought {_POSSESSIVES[friend.pronoun]} {friend.pet}, "
            f"{friend.pet_name}.",
            f"{friend.name} showed {tale.her_object} how to use {_with_article(job.tool)}.",
        ),
    ]
    if tale.chance(0.5):
        sentences.append(
            f"{tale.hero.pet_name} the {tale.hero.pet} and {friend.pet_name} the {friend.pet} "
            f"played together."
        )
    return sentences


_SCENES: list[Callable[[_Tale], list[str]]] = [
    _meet_animal,
    _animal_family,
    _work,
    _count_up,
    _lesson,
    _paint,
    _cause,
    _gift,
    _journey,
    _lost_pet,
    _opposites,
    _days,
    _visit,
    _stranger,
]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _plural(noun: str) -> str:
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    if noun.endswith("f"):
        return noun[:-1] + "ves"
    return noun + "s"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
