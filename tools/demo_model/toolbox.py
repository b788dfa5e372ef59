"""Make tools of many kinds, requests that need them, their results, and the answers drawn from these."""

# ruff: noqa: SIM905 - word lists read better as one string

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .turns import typed
from .words import CITIES, NAMES, PRACTICE, any_word, invented_word, phrase

Json = dict[str, Any]


@dataclass
class Request:
    """Hold one use of a tool: what the user says, the arguments, what the tool returns, what is answered."""

    question: str
    arguments: Json
    result: str
    answer: str
    thought: str


@dataclass
class Tool:
    """Hold a declaration and the maker of requests for it; `pair` makes the words that ask for two at once."""

    name: str
    declaration: Json
    request: Callable[[Random], Request]
    takes_numbers: bool = False


def declare(name: str, about: str, *parameters: tuple[str, str, str]) -> Json:
    """Write a function declaration from (name, type, description) triples; a name ending in ? is optional."""
    properties = {n.rstrip("?"): {"type": t} | ({"description": d} if d else {}) for n, t, d in parameters}
    required = [n for n, _, _ in parameters if not n.endswith("?")]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


def as_result(rng: Random, key: str, value: str | int) -> str:
    """Write a tool's result as plain text or as JSON."""
    return str(value) if rng.random() < 0.5 else json.dumps({key: value})


def describe(rng: Random, text: str) -> str:
    """Keep a description, or now and then leave it out."""
    return text if rng.random() < 0.85 else ""


def city_tool(rng: Random) -> Tool:
    """Make a tool that tells something of a city: the weather or the time."""
    weather = rng.random() < 0.6
    key = rng.choice(["city", "city", "location", "place", "town"])
    if weather:
        name = rng.choice(["get_weather", "get_weather", "weather", "current_weather", "weather_lookup", "getWeather"])
        about = rng.choice(
            ["Get the weather in a city.", "Look up the weather.", "Return the current weather for a place."]
        )
    else:
        name = rng.choice(["get_time", "get_time", "current_time", "time_in_city", "clock", "world_clock"])
        about = rng.choice(["Get the current time in a city.", "Tell the local time.", "Return the time at a place."])
    fields = [(key, "string", describe(rng, rng.choice(["The city name.", "City name", "Name of the city"])))]
    if weather and rng.random() < 0.2:
        fields.append(("unit?", "string", describe(rng, "c or f")))

    def request(r: Random) -> Request:
        city = r.choice(CITIES) if r.random() < 0.8 else invented_word(r).capitalize()
        if weather:
            q = r.choice([f"what is the weather in {city}", f"how is the weather in {city}", f"weather in {city}",
                          f"is it raining in {city}", f"what is the weather like in {city}",
                          f"tell me the weather in {city}",
                          f"check the weather in {city}", f"is it cold in {city}",
                          f"do i need an umbrella in {city}"])  # fmt: skip
            sky, degrees = r.choice("sunny rainy cloudy windy snowy foggy".split()), r.randint(-9, 38)
            result = r.choice([f"{sky}, {degrees} degrees", json.dumps({"weather": sky, "degrees": degrees})])
            return Request(typed(r, q), {key: city}, result, f"It is {sky} in {city}, with {degrees} degrees.",
                           f"I need the weather in {city}.")  # fmt: skip
        q = r.choice([f"what time is it in {city}", f"what is the time in {city}", f"time in {city}",
                      f"tell me the time in {city}", f"what is the current time in {city}",
                      f"how late is it in {city}"])  # fmt: skip
        clock = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
        return Request(typed(r, q), {key: city}, as_result(r, "time", clock), f"It is {clock} in {city}.",
                       f"I need the time in {city}.")  # fmt: skip

    return Tool(name, declare(name, about, *fields), request)


def calculator_tool(rng: Random) -> Tool:
    """Make a tool that computes."""
    name = rng.choice(["calculator", "calculator", "calculate", "compute", "eval_math", "math"])
    key = rng.choice(["expression", "expression", "expr", "formula", "input"])
    about = rng.choice(["Compute an arithmetic expression.", "Evaluate an expression.", "Do arithmetic."])

    def request(r: Random) -> Request:
        a, b = r.randint(2, 10 ** r.choice([2, 3, 4, 5])), r.randint(2, 10 ** r.choice([2, 3, 4]))
        sign = r.choice("+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        word, ex = {"+": "plus", "-": "minus", "*": "times"}[sign], f"{a} {sign} {b}"
        q = r.choice([f"what is {ex}", f"what is {ex}", f"calculate {ex}", ex, f"use the calculator: {ex}",
                      f"compute {ex}",
                      f"what is {a} {word} {b}", f"how much is {ex}", f"{a} {word} {b}"])  # fmt: skip
        return Request(typed(r, q), {key: ex}, as_result(r, "result", value), f"{ex} = {value}", f"I compute {ex}.")

    field = (key, "string", describe(rng, "The expression."))
    return Tool(name, declare(name, about, field), request, takes_numbers=True)


def search_tool(rng: Random) -> Tool:
    """Make a tool that searches the web."""
    name = rng.choice(["search", "search", "web_search", "search_web", "find_pages", "lookup"])
    key = rng.choice(["query", "query", "q", "text", "words"])
    about = rng.choice(["Search the web.", "Find pages on the web.", "Look something up on the web."])

    def request(r: Random) -> Request:
        words = phrase(r, 1, 4)
        q = r.choice([f"search for {words}", f"search the web for {words}", f"look up {words}",
                      f"find pages about {words}",
                      f"google {words}", f"search {words}", f"find something about {words}"])  # fmt: skip
        found = f"{r.randint(1, 99)} pages about {words}"
        return Request(typed(r, q, polite=False).rstrip("?!. "), {key: words}, as_result(r, "found", found),
                       f"I found {found}.", f"I search for {words}.")  # fmt: skip

    return Tool(name, declare(name, about, (key, "string", describe(rng, "The search words."))), request)


def file_tool(rng: Random) -> Tool:
    """Make a tool that reads a file."""
    name = rng.choice(["read_file", "read_file", "open_file", "cat", "load_file", "readFile"])
    key = rng.choice(["path", "path", "file", "filename", "file_path"])
    about = rng.choice(["Read a text file.", "Return the content of a file.", "Open a file and return its text."])

    def request(r: Random) -> Request:
        path = r.choice(["", "", f"{any_word(r)}/"]) + any_word(r) + r.choice([".txt", ".md", ".json", ".py", ".csv"])
        q = r.choice([f"read the file {path}", f"what is in {path}", f"open {path}", f"read {path}", f"show me {path}",
                      f"what does {path} say"])  # fmt: skip
        text = phrase(r, 2, 6)
        return Request(
            typed(r, q, polite=False).rstrip("?!. "), {key: path}, text, f"The file says: {text}", f"I read {path}."
        )

    return Tool(name, declare(name, about, (key, "string", describe(rng, "The file path."))), request)


def message_tool(rng: Random) -> Tool:
    """Make a tool that sends a message to someone."""
    kind = rng.choice(["email", "message", "text"])
    name = rng.choice([f"send_{kind}", f"send_{kind}", f"{kind}_send", f"send{kind.capitalize()}"])
    who, what = rng.choice([("to", "text"), ("recipient", "body"), ("name", "message"), ("to", "body")])

    def request(r: Random) -> Request:
        person, words = r.choice(NAMES), phrase(r, 1, 5)
        q = r.choice([f"send {kind_article(kind)} to {person}: {words}", f"{kind} {person}: {words}",
                      f"send {person} {kind_article(kind)}: {words}",
                      f"write {kind_article(kind)} to {person}: {words}"])  # fmt: skip
        return Request(typed(r, q, polite=False).rstrip("?!. "), {who: person, what: words}, r.choice(["ok", "sent",
                                                                                                       "done"]),
                       f"I sent the {kind} to {person}.", f"I write to {person}.")  # fmt: skip

    fields = ((who, "string", describe(rng, "Who gets it.")), (what, "string", describe(rng, "The text.")))
    return Tool(name, declare(name, f"Send {kind_article(kind)}.", *fields), request)


def kind_article(kind: str) -> str:
    """Put the article before a kind of message."""
    return ("an " if kind == "email" else "a ") + kind


def number_tool(rng: Random) -> Tool:
    """Make a tool with one whole number: a die, a timer or a volume."""
    kind = rng.choice(["dice", "timer", "volume"])
    name, key, about, unit = {
        "dice": (rng.choice(["roll_dice", "roll_die", "dice"]), "sides", "Roll a die.", "The number of sides."),
        "timer": (rng.choice(["set_timer", "start_timer", "timer"]), "minutes", "Start a timer.", "How long."),
        "volume": (
            rng.choice(["set_volume", "volume"]),
            rng.choice(["level", "percent"]),
            "Set the volume.",
            "0 to 100",
        ),
    }[kind]

    def request(r: Random) -> Request:
        n = r.choice([4, 6, 6, 8, 10, 12, 20]) if kind == "dice" else r.randint(1, 99)
        if kind == "dice":
            q = r.choice(
                [f"roll a die with {n} sides", f"roll a d{n}", f"roll a {n} sided die", f"throw a die with {n} sides"]
            )
            value = r.randint(1, n)
            return Request(
                typed(r, q), {key: n}, as_result(r, "value", value), f"The die shows {value}.", "I roll the die."
            )
        if kind == "timer":
            q = r.choice([f"set a timer for {n} minutes", f"start a timer of {n} minutes", f"timer for {n} minutes"])
            return Request(typed(r, q), {key: n}, r.choice(["ok", "started"]), f"The timer runs for {n} minutes.",
                           "I start the timer.")  # fmt: skip
        q = r.choice([f"set the volume to {n}", f"turn the volume to {n}", f"volume {n}", f"set volume to {n} percent"])
        return Request(typed(r, q), {key: n}, r.choice(["ok", "done"]), f"The volume is {n} now.", "I set the volume.")

    return Tool(name, declare(name, about, (key, "integer", describe(rng, unit))), request, takes_numbers=True)


def note_tool(rng: Random) -> Tool:
    """Make a tool that keeps a note, a task or an event with a day."""
    kind = rng.choice(["note", "task", "reminder", "event"])
    name = rng.choice([f"add_{kind}", f"create_{kind}", f"save_{kind}", f"new_{kind}"])
    key = rng.choice(["text", "title", "content", kind])

    def request(r: Random) -> Request:
        words = phrase(r, 1, 4)
        q = r.choice(
            [f"add a {kind}: {words}", f"create a {kind}: {words}", f"new {kind}: {words}", f"save the {kind} {words}"]
        )
        q = q.replace("a event", "an event")
        return Request(typed(r, q, polite=False).rstrip("?!. "), {key: words}, r.choice(["ok", "saved", "done"]),
                       f"I saved the {kind}: {words}", f"I save the {kind}.")  # fmt: skip

    about = rng.choice([f"Add {'an' if kind == 'event' else 'a'} {kind}.", f"Save a new {kind}."])
    return Tool(name, declare(name, about, (key, "string", describe(rng, f"The {kind}."))), request)


VERBS = (
    "fetch scan check index render inspect trace route merge notify archive translate convert price book order".split()
)
NOUNS = "user order ticket module page account invoice planet song movie device sensor room team product stock".split()


def invented_tool(rng: Random) -> Tool:
    """Make a tool that exists nowhere, so that names must be read from the declaration."""
    verb, noun = (rng.choice(VERBS) if rng.random() < 0.7 else invented_word(rng)), rng.choice(NOUNS)
    noun = noun if rng.random() < 0.7 else invented_word(rng)
    name = rng.choice(
        [f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}_the_{noun}", f"{verb}{noun.capitalize()}", f"{noun}.{verb}"]
    )
    key = rng.choice([noun, "id", "name", "value", f"{noun}_id", f"{noun}_name", invented_word(rng)])
    numeric = rng.random() < 0.3

    def request(r: Random) -> Request:
        value: str | int = r.randint(1, 9999) if numeric else any_word(r)
        q = r.choice([f"{verb} the {noun} {value}", f"{verb} {noun} {value}", f"please {verb} the {noun} {value}",
                      f"can you {verb} the {noun} {value}", f"use {name} with {value}",
                      f"call {name} on {value}"])  # fmt: skip
        result = phrase(r, 1, 3)
        return Request(typed(r, q, polite=False).rstrip("?!. "), {key: value}, as_result(r, "result", result),
                       f"The tool says: {result}", f"I use {name}.")  # fmt: skip

    about = rng.choice([f"{verb.capitalize()} a {noun}.", f"{verb.capitalize()} the {noun}.", ""])
    field = (key, rng.choice(["integer", "number"]) if numeric else "string", describe(rng, f"The {noun}."))
    return Tool(name, declare(name, about, field), request)


MAKERS: list[tuple[Callable[[Random], Tool], float]] = [
    (city_tool, 4), (calculator_tool, 2), (search_tool, 2), (file_tool, 1.5), (message_tool, 1.5), (number_tool, 1.5),
    (note_tool, 1), (invented_tool, 3),
]  # fmt: skip


def toolbox(rng: Random, count: int) -> list[Tool]:
    """Draw tools of different names."""
    makers = [maker for maker, _ in MAKERS]
    weights = [weight * (PRACTICE.invented if maker is invented_tool else 1) for maker, weight in MAKERS]
    tools: dict[str, Tool] = {}
    while len(tools) < count:
        tool = rng.choices(makers, weights)[0](rng)
        if not any(same_kind(tool, t) for t in tools.values()):
            tools[tool.name] = tool
    return list(tools.values())


def same_kind(a: Tool, b: Tool) -> bool:
    """Tell whether two tools would answer the same request."""
    about = [t.declaration["function"]["description"].split(" ")[-1] for t in (a, b)]
    words = [set(t.name.lower().replace("get", "").replace("_", " ").split()) for t in (a, b)]
    kinds = [t.request.__qualname__ for t in (a, b)]
    same_maker = kinds[0] == kinds[1] and not kinds[0].startswith("invented")
    return same_maker or a.name == b.name or about[0] == about[1] != "" or bool(words[0] & words[1])


# Requests for which a tool would be needed, asked when none is there.
LOOSE_REQUESTS: list[Callable[[Random], Tool]] = [
    city_tool,
    search_tool,
    file_tool,
    message_tool,
    number_tool,
    note_tool,
]
NO_TOOL = "I have no tool for that. When you offer me one, I can call it."


def loose_request(rng: Random) -> str:
    """Draw a request that no offered tool serves."""
    return rng.choice(LOOSE_REQUESTS)(rng).request(rng).question
