"""What the tiny world asks: small questions with one right answer, in ten kinds.

Each kind is a function of a random generator. Some kinds are facts to remember (letters, opposites, the calendar), some
are rules to apply to the prompt (copy a word, find a colour, sort). A model of a few hundred thousand parameters learns
part of them within a few hundred steps.

A kind knows all its facts. A fact is what decides the answer, whatever words ask for it: the operands, in no order
where none matters, and once where it can be asked for from two ends ("hot" and "cold" are one fact, as are Monday and
Tuesday). So a model that was taught one fact was told nothing of another one, but by a rule that holds for both.
"""

# ruff: noqa: SIM905 (forty words read better as a line of text)

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, pairwise, permutations, product
from random import Random


@dataclass(frozen=True, slots=True)
class Task:
    """A question and two answers to it.

    Attributes:
        fact: What decides the answer, one of the kind's facts.
        question: The question, or a short order.
        statement: A sentence that answers it, without its full stop; ``{}`` stands for the answer.
        right: The one right answer.
        wrong: A wrong answer of the same form.
        wrong_fact: The fact whose right answer that is, where it was taken from another one.
    """

    fact: str
    question: str
    statement: str
    right: str
    wrong: str
    wrong_fact: str | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of questions.

    Attributes:
        draw: A question of this kind.
        facts: All that it can be about.
    """

    draw: Callable[[Random], Task]
    facts: tuple[str, ...]


def _fact(*operands: str | int) -> str:
    """Operands whose order does not matter to the answer, in one order."""
    return " ".join(sorted(map(str, operands)))


def _add(rng: Random) -> Task:
    a, b = rng.randrange(10), rng.randrange(10)
    question = rng.choice(("What is {} plus {}?", "Add {} and {}.")).format(a, b)
    return Task(_fact(a, b), question, f"{a} plus {b} makes {{}}", str(a + b), _another_number(rng, a + b))


def _subtract(rng: Random) -> Task:
    a, b = sorted((rng.randrange(13), rng.randrange(13)), reverse=True)
    question = rng.choice(("What is {} minus {}?", "From {} take away {}.")).format(a, b)
    return Task(_fact(a, b), question, f"{a} minus {b} leaves {{}}", str(a - b), _another_number(rng, a - b))


def _another_number(rng: Random, number: int) -> str:
    return str(rng.choice([near for near in range(max(number - 3, 0), number + 4) if near != number]))


def _larger(rng: Random) -> Task:
    small, large = sorted(rng.sample(range(30), 2))
    question = rng.choice(("Which is larger, {} or {}?", "Which number is bigger: {} or {}?"))
    question = question.format(*rng.sample((small, large), 2))
    return Task(_fact(small, large), question, "the larger one is {}", str(large), str(small))


def _parity(rng: Random) -> Task:
    number = rng.randrange(50)
    question = rng.choice(("Is {} even or odd?", "Even or odd: {}?")).format(number)
    right, wrong = ("odd", "even") if number % 2 else ("even", "odd")
    return Task(str(number), question, f"{number} is {{}}", right, wrong)


def _sort(rng: Random) -> Task:
    numbers = rng.sample(range(1, 10), 3)
    wrong = sorted(numbers)
    while wrong == sorted(numbers):
        rng.shuffle(wrong)
    question = rng.choice(("Sort {}, {}, {}.", "Put in order: {}, {}, {}.")).format(*numbers)
    right = ", ".join(map(str, sorted(numbers)))
    return Task(_fact(*numbers), question, "in order they are {}", right, ", ".join(map(str, wrong)))


_WORDS = (
    "apple bread chair cloud dance fire flag fruit glass hand heart hill house island jacket kite lake lamp lemon moon "
    "music night ocean orange paper piano queen rain river road robot rose ship snow spoon stone tiger tree water wolf"
).split()


def _copy(rng: Random) -> Task:
    word, other = rng.sample(_WORDS, 2)
    question = rng.choice(("Repeat the word {}.", "Say {} once more.", "Write down {}.")).format(word)
    return Task(word, question, "the word is {}", word, other, other)


def _letter(rng: Random) -> Task:
    word = rng.choice(_WORDS)
    end, right = rng.choice((("first", word[0]), ("last", word[-1])))
    question = rng.choice(("What is the {} letter of {}?", "Give me the {} letter of {}.")).format(end, word)
    wrong = rng.choice([letter for letter in "abdeghklmnorstw" if letter != right])
    return Task(f"{end} {word}", question, f"the {end} letter of {word} is {{}}", right, wrong)


_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()


def _calendar(rng: Random) -> Task:
    name, names = rng.choice((("day", _DAYS), ("month", _MONTHS)))
    at = rng.randrange(len(names))
    relation, step = rng.choice((("after", 1), ("before", -1)))
    right = names[(at + step) % len(names)]
    question = rng.choice(("Which {} comes {} {}?", "Name the {} {} {}.", "What {} is {} {}?"))
    wrong = rng.choice([other for other in names if other not in (right, names[at])])
    question = question.format(name, relation, names[at])
    return Task(_fact(names[at], right), question, f"{relation} {names[at]} it is {{}}", right, wrong)


_OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "big/small hot/cold up/down old/young fast/slow day/night open/closed wet/dry light/dark happy/sad full/empty "
        "early/late hard/soft high/low in/out left/right long/short loud/quiet near/far rich/poor strong/weak "
        "thick/thin true/false clean/dirty push/pull"
    ).split()
)


def _opposite(rng: Random) -> Task:
    pair, other = rng.sample(_OPPOSITES, 2)
    word, right = rng.sample(pair, 2)
    question = rng.choice(("What is the opposite of {}?", "Name the opposite of {}.")).format(word)
    return Task(_fact(*pair), question, f"the opposite of {word} is {{}}", right, rng.choice(other), _fact(*other))


_THINGS = "ball bowl box car coat cup door hat pen shoe".split()
_COLOURS = "black blue brown green grey pink red white yellow".split()


def _colour(rng: Random) -> Task:
    things, colours = rng.sample(_THINGS, 2), rng.sample(_COLOURS, 2)
    asked = rng.randrange(2)
    first, second = zip(things, colours, strict=True)
    story = f"The {things[0]} is {colours[0]}, the {things[1]} is {colours[1]}."
    question = rng.choice(("What colour is the {}?", "And the {}?")).format(things[asked])
    statement = f"the {things[asked]} is {{}}"
    return Task(_story(first, second), f"{story} {question}", statement, colours[asked], colours[1 - asked])


def _story(*coloured: tuple[str, str]) -> str:
    return _fact(*(f"{thing}-{colour}" for thing, colour in coloured))


_STORIES = product(combinations(_THINGS, 2), permutations(_COLOURS, 2))

KINDS: dict[str, Kind] = {
    "add": Kind(_add, tuple(_fact(*pair) for pair in combinations_with_replacement(range(10), 2))),
    "subtract": Kind(_subtract, tuple(_fact(*pair) for pair in combinations_with_replacement(range(13), 2))),
    "larger": Kind(_larger, tuple(_fact(*pair) for pair in combinations(range(30), 2))),
    "parity": Kind(_parity, tuple(str(number) for number in range(50))),
    "sort": Kind(_sort, tuple(_fact(*numbers) for numbers in combinations(range(1, 10), 3))),
    "copy": Kind(_copy, tuple(_WORDS)),
    "letter": Kind(_letter, tuple(f"{end} {word}" for word in _WORDS for end in ("first", "last"))),
    "calendar": Kind(
        _calendar, tuple(_fact(*pair) for names in (_DAYS, _MONTHS) for pair in pairwise([*names, names[0]]))
    ),
    "opposite": Kind(_opposite, tuple(_fact(*pair) for pair in _OPPOSITES)),
    "colour": Kind(_colour, tuple(_story(*zip(*story, strict=True)) for story in _STORIES)),
}
