"""Hold the word stock from which the dialogues are put together."""

# ruff: noqa: SIM905 - word lists read better as one string

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

NAMES = (
    "Ann Ben Cara Dan Ella Finn Grace Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quinn Rosa Sam Tara Uma Vera Will "
    "Zoe Alex Emma Liam Lucy Max Nina Anna Tom Peter Maria John Sarah David Julia Oscar Ruth Amir Yuki Chen Priya"
).split()
ANIMALS = (
    "fox cat dog bear rabbit owl mouse horse duck frog turtle lion tiger wolf deer bee goat sheep cow pig hen whale "
    "seal crow hedgehog squirrel penguin elephant monkey snail dragon robot"
).split()
OBJECTS = (
    "lantern key boat map bell kite drum book hat scarf apple cake flute mirror ladder basket button shell feather "
    "ring stone rope wagon umbrella candle clock brush teapot blanket pebble"
).split()
PLACES = (
    "forest garden river village mountain lake castle island meadow market harbor cave library kitchen barn hill "
    "desert beach town valley"
).split()
ADJECTIVES = (
    "small brave kind clever quiet happy gentle curious sleepy patient shy cheerful young old lucky honest".split()
)
FRUITS = "apple banana cherry grape lemon mango orange peach pear plum".split()
VEGETABLES = "carrot potato onion pea bean cabbage spinach pumpkin tomato leek".split()
COLORS = "red blue green yellow orange purple pink brown black white".split()
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
SEASONS = "spring summer autumn winter".split()
INSTRUMENTS = "piano violin guitar drum flute trumpet harp cello".split()
FOODS = "pizza pasta rice soup bread cheese salad sushi curry pancakes chocolate noodles".split()
LANGUAGES = "Python English Chinese Spanish French German Italian Japanese".split()

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Austria": "Vienna", "Poland": "Warsaw", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "Hungary": "Budapest", "Russia": "Moscow", "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Australia": "Canberra",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Iran": "Tehran", "Iraq": "Baghdad", "Morocco": "Rabat",
    "Ghana": "Accra", "Iceland": "Reykjavik", "Ukraine": "Kyiv", "the United States": "Washington",
    "Switzerland": "Bern", "the Netherlands": "Amsterdam", "Turkey": "Ankara", "South Korea": "Seoul",
}  # fmt: skip
CITIES = sorted(set(CAPITALS.values())) + (
    "Munich Milan Lyon Porto Boston Chicago Sydney Shanghai Mumbai Zurich Geneva Prague Dubai Singapore Seattle".split()
)
CONTINENTS = {
    "Europe": "France Germany Italy Spain Portugal England Ireland Austria Poland Greece Norway Sweden Finland".split(),
    "Asia": "China Japan India Thailand Vietnam Iran Iraq".split(),
    "Africa": "Egypt Kenya Morocco Ghana".split(),
    "South America": "Peru Chile Brazil Argentina".split(),
}
_OPPOSITES = (
    "hot cold,big small,up down,fast slow,day night,happy sad,open closed,light dark,old new,full empty,high low,"
    "left right,hard soft,rich poor,early late,near far,wet dry,clean dirty,loud quiet,strong weak,long short,"
    "thick thin,in out,true false,start stop,win lose,buy sell,push pull,above below,before after,first last,"
    "good bad,yes no,love hate,tall short,deep shallow,sweet sour"
)
OPPOSITES = dict(pair.split() for pair in _OPPOSITES.split(","))
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink", "horse": "neigh",
    "lion": "roar", "bee": "buzz", "owl": "hoot", "frog": "ribbit", "wolf": "howl", "hen": "cluck", "mouse": "squeak",
}  # fmt: skip
YOUNG = {
    "cat": "kitten", "dog": "puppy", "cow": "calf", "sheep": "lamb", "duck": "duckling", "pig": "piglet",
    "horse": "foal", "lion": "cub", "bear": "cub", "owl": "owlet", "goat": "kid", "hen": "chick", "deer": "fawn",
}  # fmt: skip
PLURALS = {
    "cat": "cats", "dog": "dogs", "box": "boxes", "bus": "buses", "child": "children", "man": "men", "woman": "women",
    "foot": "feet", "tooth": "teeth", "mouse": "mice", "goose": "geese", "baby": "babies", "city": "cities",
    "leaf": "leaves", "knife": "knives", "wolf": "wolves", "fox": "foxes", "sheep": "sheep", "key": "keys",
}  # fmt: skip
PASTS = {
    "go": "went", "eat": "ate", "see": "saw", "run": "ran", "come": "came", "make": "made", "take": "took",
    "give": "gave", "find": "found", "think": "thought", "write": "wrote", "speak": "spoke", "sing": "sang",
    "swim": "swam", "fly": "flew", "know": "knew", "bring": "brought", "sleep": "slept", "walk": "walked",
}  # fmt: skip
THING_COLORS = {
    "grass": "green", "snow": "white", "a banana": "yellow", "the sky": "blue", "coal": "black", "a carrot": "orange",
    "a lemon": "yellow", "a tomato": "red", "chocolate": "brown", "milk": "white", "a frog": "green",
    "the sun": "yellow",
}  # fmt: skip
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()

# Plain English words, used only as subjects that the model has to copy or to decline.
WORDS = Path(__file__).with_name("words.txt").read_text().split()
# Words that the dialogues themselves use so often that the vocabulary has a token for each with the space before it.
# Copied behind a quotation mark, such a word has other tokens than in the question: that must be learnt word by word.
SPACED = (
    "able about account another arithmetic best body both called calls cannot command commands could create created "
    "decl demo device directly does done down each email everything expression fetch filename fine folder found from "
    "functions gets goes have inspect ints json keeps last level little location looked lookup made make many math "
    "memory message minus module more mouse much name names next nice older once only page pages parameters parts "
    "please prints prompt python query reply right rules runs save saved saves sets share shared short shows slow "
    "smaller something speed starts tests they through timer times title together token tokens tools upon used value "
    "very ways well were when where which will word words would write"
).split()
_ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl qu r s sh sk st t th tr v w z".split()
_VOWELS = "a e i o u ai ea ee io ou".split()
_CODAS = ["", "", "", "n", "r", "s", "t", "l", "m", "x", "nd", "ck"]


def invented_word(rng: Random) -> str:
    """Make up a word of one to three syllables, so that copying is learnt and not a vocabulary."""
    syllables = rng.choice([1, 2, 2, 2, 3])
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


@dataclass
class Practice:
    """Say how much more of what is hard is drawn; nothing more in the prompts of the score.

    spaced: the share of words from SPACED. invented: how often a tool is an invented one, against the usual.
    """

    spaced: float = 0.0
    invented: float = 1.0

    def reset(self) -> None:
        """Draw nothing more of it."""
        self.spaced, self.invented = 0.0, 1.0


PRACTICE = Practice()  # the training process sets it


def any_word(rng: Random) -> str:
    """Draw an English word, or now and then an invented one."""
    if PRACTICE.spaced and rng.random() < PRACTICE.spaced:
        return rng.choice(SPACED)
    return rng.choice(WORDS) if rng.random() < 0.9 else invented_word(rng)


def phrase(rng: Random, low: int, high: int) -> str:
    """Draw `low` to `high` words joined by spaces."""
    return " ".join(any_word(rng) for _ in range(rng.randint(low, high)))


def article(word: str) -> str:
    """Put `a` or `an` before the word."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def capital(text: str) -> str:
    """Write the first letter large."""
    return text[:1].upper() + text[1:]


def plural(noun: str) -> str:
    """Return the plural of one of our objects and fruits."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("ch", "sh", "x", "s", "o")) else "s")


def join_words(words: list[str]) -> str:
    """Write a list as English does: `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
