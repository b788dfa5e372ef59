"""Make stories, poems, recipes and lists."""

from __future__ import annotations

from random import Random

from .turns import Turn, typed
from .words import (
    ADJECTIVES,
    ANIMALS,
    COLORS,
    CONTINENTS,
    DAYS,
    FOODS,
    FRUITS,
    INSTRUMENTS,
    MONTHS,
    NAMES,
    OBJECTS,
    PLACES,
    PLANETS,
    SEASONS,
    VEGETABLES,
    article,
    capital,
    join_words,
)  # fmt: skip

POEMS = {
    "sea": ("The sea is wide, the sea is blue,", "it sings a sleepy song to you."),
    "rain": ("The rain falls softly on the tree,", "and drops of silver fall on me."),
    "moon": ("The moon is round, the moon is bright,", "it keeps the garden warm at night."),
    "spring": ("The spring is here, the birds all sing,", "and green is growing on everything."),
    "winter": ("The snow lies deep, the night is long,", "the fire hums a winter song."),
    "sun": ("The sun climbs up above the hill,", "and all the sleepy world is still."),
    "cat": ("The cat sleeps all the afternoon,", "and wakes to look up at the moon."),
    "star": ("A little star looks down on me,", "the brightest light that I can see."),
    "computer": ("The experts wait, all in a row,", "the router tells them when to go."),
    "autumn": ("The leaves turn gold, the leaves turn red,", "they make the forest floor a bed."),
    "river": ("The river runs, it does not stay,", "it has a song for every day."),
    "wind": ("The wind goes round the house tonight,", "it hums until the morning light."),
}
RECIPES = {
    "soup": "Cut some vegetables. Boil them in water for twenty minutes. Add salt, and eat it hot.",
    "salad": "Wash the leaves. Cut a tomato and an onion. Mix them with oil and salt.",
    "pancakes": "Mix flour, milk and two eggs. Fry thin cakes in a hot pan. Eat them with jam.",
    "tea": "Boil some water. Put a tea bag in a cup. Pour the water, and wait three minutes.",
    "bread": "Mix flour, water, salt and yeast. Let it rest for two hours. Bake it until it is brown.",
    "pasta": "Boil the pasta in salted water for ten minutes. Warm some tomato sauce. Mix them, and add cheese.",
    "rice": "Wash the rice. Boil it in twice as much water. Wait fifteen minutes with the lid on.",
    "pizza": "Roll out the dough. Put tomato, cheese and a little oil on it. Bake it in a very hot oven.",
}
LISTS = {
    "animals": ANIMALS, "fruits": FRUITS, "vegetables": VEGETABLES, "colors": COLORS, "planets": PLANETS, "days": DAYS,
    "months": MONTHS, "seasons": SEASONS, "instruments": INSTRUMENTS, "foods": FOODS, "names": NAMES,
    "countries": [c for places in CONTINENTS.values() for c in places],
}  # fmt: skip
COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def story(rng: Random) -> Turn:
    """Ask for a story, with or without a hero, a thing and a place."""
    hero, thing, place = rng.choice(ANIMALS), rng.choice(OBJECTS), rng.choice(PLACES)
    named = [article(w) if rng.random() < 0.9 else w for w, p in ((hero, 0.75), (thing, 0.25)) if rng.random() < p]
    names_hero = any(w.endswith(hero) for w in named)
    q = rng.choice(
        ["tell me a story", "tell me a short story", "write a story", "write a short story", "tell a story",
         "story please",
         "i want a story", "can you tell me a story", "make up a story", "give me a short story",
         "tell me a little story"]
    )  # fmt: skip
    if named:
        q += " about " + " and ".join(named)
    if rng.random() < 0.15:
        q += f" in the {place}" if named else f" about the {place}"
    thought = f"I will write about {article(hero)}, {article(thing)} and the {place}."
    about = hero if names_hero else ""
    text = story_text(rng, hero, thing, place)
    return Turn(typed(rng, q), thought, text, check=lambda t: is_story(t, about))


def is_story(text: str, hero: str) -> bool:
    """Judge the form of a story: long enough, finished, and about its hero."""
    return len(text) > 120 and text[-1] in '."' and hero in text


def story_text(rng: Random, hero: str, thing: str, place: str) -> str:
    """Put a story together from an opening, a turn, a meeting and an end."""
    name, other = rng.sample(NAMES, 2)
    friend = rng.choice([a for a in ANIMALS if a != hero])
    adjective = rng.choice(ADJECTIVES)
    opening = rng.choice(
        [f"Once upon a time, there was {article(adjective)} {hero} named {name}.",
         f"There once was {article(adjective)} {hero} called {name}.",
         f"{name} was {article(adjective)} {hero}."]
    )  # fmt: skip
    home = rng.choice(
        [f"{name} lived near the {place} and loved to walk there.",
         f"Every day, {name} went for a walk in the {place}.",
         f"{name}'s home was a little house near the {place}."]
    )  # fmt: skip
    plot = rng.choice([_lost, _found, _shared, _raced])
    close = rng.choice(
        ["They lived happily ever after.", "From that day on, they were best friends.",
         f"That night, {name} slept very well.", "And that was a good day."]
    )  # fmt: skip
    return " ".join([opening, home, plot(name, thing, place, friend, other), close])


def _lost(name: str, thing: str, place: str, friend: str, other: str) -> str:
    return (
        f"One morning, {name} could not find the {thing}. {capital(article(friend))} named {other} helped to "
        f"look for it. "
        f"They looked all over the {place}. At last, they found the {thing} under a tree."
    )


def _found(name: str, thing: str, place: str, friend: str, other: str) -> str:
    return (
        f"One day, {name} found {article(thing)} on the path. {capital(article(friend))} named {other} came "
        f"by and said, "
        f'"That {thing} is mine!" {name} gave the {thing} back, and they were both happy.'
    )


def _shared(name: str, thing: str, place: str, friend: str, other: str) -> str:
    return (
        f"One evening, {name} met {article(friend)} named {other}, who was cold and alone. {name} had only "
        f"{article(thing)}, "
        f"but shared it. The {friend} smiled and showed {name} a secret way through the {place}."
    )


def _raced(name: str, thing: str, place: str, friend: str, other: str) -> str:
    return (
        f"One day, {article(friend)} named {other} wanted to race to the end of the {place}. {name} was slow, "
        f"but did not "
        f"stop. The {friend} sat down to play with {article(thing)}, and so {name} won the race."
    )


def poem(rng: Random) -> Turn:
    """Ask for a two-line poem."""
    topic = rng.choice(list(POEMS))
    free = rng.random() < 0.25
    q = rng.choice(
        ["write a poem", "tell me a poem", "give me a poem", "write a short poem", "can you write a poem", "poem"]
    )
    if not free:
        q += " about " + rng.choice([topic, f"the {topic}", article(topic)])
    text = "\n".join(POEMS[topic])
    known = tuple("\n".join(p) for p in POEMS.values()) if free else ()
    return Turn(typed(rng, q), f"I know a poem about the {topic}.", text, accepted=known)


def recipe(rng: Random) -> Turn:
    """Ask for a recipe."""
    dish = rng.choice(list(RECIPES))
    q = rng.choice(
        [f"how do i make {dish}", f"how do you make {dish}", f"give me a recipe for {dish}", f"how to cook {dish}",
         f"how can i make {dish}", f"recipe for {dish}", f"how do i cook {dish}", f"{dish} recipe",
         f"how to make {dish}"]
    )  # fmt: skip
    return Turn(typed(rng, q), f"I know how to make {dish}.", RECIPES[dish])


def list_items(rng: Random) -> Turn:
    """Ask for some members of a class, as a sentence or as a Markdown list.

    Always the first ones: a random choice without repetition is more than so small a model can learn.
    """
    kind = rng.choice(list(LISTS))
    n = rng.randint(2, min(6, len(LISTS[kind])))
    items = LISTS[kind][:n]
    size = rng.choice([str(n), COUNT_WORDS[n]])
    q = rng.choice([f"name {size} {kind}", f"list {size} {kind}", f"give me {size} {kind}", f"tell me {size} {kind}",
                    f"what are {size} {kind}", f"can you name {size} {kind}"])  # fmt: skip
    bullets = q.startswith("list")
    answer = "\n".join(f"- {i}" for i in items) if bullets else capital(join_words(items)) + "."
    return Turn(
        typed(rng, q), f"The user wants {n} {kind}.", answer, check=lambda t: is_list(t, n, LISTS[kind], bullets)
    )


def is_list(text: str, n: int, known: list[str], bullets: bool) -> bool:
    """Judge a list: as many different members of the class as wanted."""
    parts = text.split("\n") if bullets else text.rstrip(".").replace(" and ", ", ").split(", ")
    names = {p.removeprefix("- ").lower() for p in parts}
    return len(parts) == n and len(names) == n and names <= {k.lower() for k in known}
