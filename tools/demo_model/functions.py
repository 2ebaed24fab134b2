"""The tasks in which functions are offered: one call, several, the answer from a result, and no function that fits."""

import json
from dataclasses import dataclass
from typing import Any

from example import Example, Message, Random, Tool, articles, ask, says
from facts import ANIMALS, CITIES, CURRENCIES, FIELDS, GENRES, NEWS, OBJECTS, SKIES, TOOL_NOUNS, TOOL_VERBS
from questions import any_city, any_name, listed, value


def tool(name: str, description: str, /, **parameters: str) -> Tool:
    schema = {
        "type": "object",
        "properties": {k: {"type": v} for k, v in parameters.items()},
        "required": [*parameters],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


# A function has several names in the wild, and so have its parameters: the first of each is ours.
KNOWN_TOOLS: dict[str, tuple[list[str], str, dict[str, str]]] = {
    "weather": (["get_weather", "get_current_weather", "weather"], "Get the weather in a city.", {"city": "string"}),
    "time": (["get_time", "get_current_time", "local_time"], "Get the local time in a city.", {"city": "string"}),
    "currency": (
        ["convert_currency", "exchange"],
        "Convert an amount of money.",
        {"amount": "integer", "source": "string", "target": "string"},
    ),
    "alarm": (["set_alarm", "alarm"], "Set an alarm.", {"time": "string"}),
    "books": (["search_books", "find_books"], "Search books about a topic.", {"topic": "string", "limit": "integer"}),
    "message": (["send_message", "notify"], "Send a message to a person.", {"to": "string", "text": "string"}),
    "calculator": (["calculator", "calculate"], "Work out an expression.", {"expression": "string"}),
    "music": (["play_music", "play_song"], "Play music of a genre.", {"genre": "string"}),
}
RENAMED = {
    "city": ["city", "city", "location", "place"],
    "source": ["source", "from_currency"],
    "target": ["target", "to_currency"],
    "topic": ["topic", "query", "subject"],
    "limit": ["limit", "count"],
    "to": ["to", "recipient", "name"],
    "text": ["text", "message"],
    "expression": ["expression", "query"],
}


@dataclass(frozen=True)
class Offer:
    """A tool as it is offered in one prompt, and what its parameters are called at home."""

    kind: str
    tool: Tool
    renamed: dict[str, str]

    @property
    def name(self) -> str:
        return self.tool["function"]["name"]


def offer(rng: Random, kind: str) -> Offer:
    names, description, parameters = KNOWN_TOOLS[kind]
    renamed = {p: rng.choice(RENAMED.get(p, [p])) for p in parameters}
    name = names[0] if rng.random() < 0.5 else rng.choice(names)
    made = tool(name, description, **{renamed[p]: parameters[p] for p in parameters})
    properties = made["function"]["parameters"]["properties"]
    if rng.random() < 0.25:
        for parameter, schema in properties.items():
            schema["description"] = f"The {parameter}."
    if kind == "weather" and rng.random() < 0.25:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    return Offer(kind, made, renamed)


def new_offer(rng: Random) -> Offer:
    """A made-up function with any parameters."""
    verb, *nouns = rng.choice(TOOL_VERBS), *rng.sample(TOOL_NOUNS, rng.choice((1, 1, 2)))
    parameters = {n: "integer" if FIELDS[n] is None else "string" for n in rng.sample(list(FIELDS), rng.randint(1, 3))}
    name, noun = "_".join([verb, *nouns]), " ".join(nouns)
    return Offer(name, tool(name, articles(f"{verb.capitalize()} a {noun}."), **parameters), {})


@dataclass(frozen=True)
class Request:
    """A user's request that one function answers, what the function returns, and what is said then."""

    kind: str
    wordings: list[str]
    arguments: dict[str, Any]
    result: dict[str, Any]
    reply: str


def known_request(rng: Random) -> Request:
    city, name, hour, minute = any_city(rng), any_name(rng), rng.randrange(24), rng.randrange(60)
    kind = rng.choice(list(KNOWN_TOOLS))
    match kind:
        case "weather":
            sky, degrees = rng.choice(SKIES), rng.randrange(40)
            return Request(
                kind,
                [
                    "What is the weather in {city}?",
                    "How is the weather in {city}?",
                    "What's the weather like in {city} today?",
                ],
                {"city": city},
                {"sky": sky, "degrees": degrees},
                f"It is {sky} in {city}, with {degrees} degrees.",
            )
        case "time":
            return Request(
                kind,
                ["What time is it in {city}?", "Tell me the time in {city}.", "What is the local time in {city}?"],
                {"city": city},
                {"time": f"{hour}:{minute:02}"},
                f"It is {hour}:{minute:02} in {city}.",
            )
        case "currency":
            source, target = rng.sample(CURRENCIES, 2)
            amount, result = rng.randint(1, 999), rng.randint(1, 999)
            return Request(
                kind,
                ["How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}."],
                {"amount": amount, "source": source, "target": target},
                {"amount": result},
                f"{amount} {source} are {result} {target}.",
            )
        case "alarm":
            return Request(
                kind,
                ["Set an alarm for {time}.", "Wake me at {time}."],
                {"time": f"{hour}:{minute:02}"},
                {"status": "ok"},
                f"Your alarm is set for {hour}:{minute:02}.",
            )
        case "books":
            topic, limit = rng.choice(ANIMALS + OBJECTS), rng.randint(2, 9)
            found = rng.randint(0, limit)
            return Request(
                kind,
                ["Find {limit} books about a {topic}.", "Search for {limit} books about a {topic}."],
                {"topic": topic, "limit": limit},
                {"found": found},
                f"I found {found} books about a {topic}.",
            )
        case "message":
            return Request(
                kind,
                ["Send {to} a message: {text}", "Tell {to} that {text}."],
                {"to": name, "text": rng.choice(NEWS)},
                {"status": "sent"},
                f"I sent your message to {name}.",
            )
        case "calculator":
            a, b, sign = rng.randint(100, 999), rng.randint(100, 999), rng.choice("+-*")
            value = {"+": a + b, "-": a - b, "*": a * b}[sign]
            return Request(
                kind,
                ["Use the calculator for {expression}.", "Work out {expression} with the calculator."],
                {"expression": f"{a} {sign} {b}"},
                {"result": value},
                f"{a} {sign} {b} = {value}",
            )
        case _:
            genre = rng.choice(GENRES)
            return Request(
                kind,
                ["Play some {genre}.", "I would like to hear {genre}."],
                {"genre": genre},
                {"status": "playing"},
                f"I am playing some {genre} for you.",
            )


def new_request(rng: Random, chosen: Offer) -> Request:
    verb, *nouns = chosen.name.split("_")
    noun = " ".join(nouns)
    names = chosen.tool["function"]["parameters"]["properties"]
    arguments = {n: value(rng, n) for n in names}
    given = listed(rng, {n: f"{{{n}}}" for n in names})
    wordings = [
        f"Call {chosen.name} with {given}.",
        f"Use {chosen.name}: {given}.",
        f"{verb.capitalize()} a {noun} with {given}.",
        f"Please {verb} a {noun}: {given}.",
    ]
    return Request(chosen.kind, wordings, arguments, {"status": "ok"}, f"Done: {verb} {noun}.")


def offered(rng: Random, *needed: Offer, without: str = "") -> list[Tool]:
    """The needed tools among others, in any order."""
    offers = {o.kind: o for o in needed}
    for _ in range(rng.randint(0, 3)):
        other = offer(rng, rng.choice(list(KNOWN_TOOLS))) if rng.random() < 0.6 else new_offer(rng)
        if other.kind != without:
            offers.setdefault(other.kind, other)
    return [o.tool for o in rng.sample(list(offers.values()), len(offers))]


def call(chosen: Offer, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": chosen.name, "arguments": {chosen.renamed.get(n, n): v for n, v in arguments.items()}}


def calls(*made: dict[str, Any]) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in made]}


def keys_of(request: Request, wording: int) -> tuple[str, ...]:
    """A made-up function is held out by its name, a known one by its arguments."""
    known = request.kind in KNOWN_TOOLS
    return (f"{request.kind}|{wording}|{json.dumps(request.arguments)}" if known else request.kind,)


def any_request(rng: Random) -> tuple[Request, Offer]:
    if rng.random() < 0.6:
        request = known_request(rng)
        return request, offer(rng, request.kind)
    chosen = new_offer(rng)
    return new_request(rng, chosen), chosen


def tool_call(rng: Random) -> Example:
    request, chosen = any_request(rng)
    wording, question = ask(rng, request.wordings, **request.arguments)
    made = call(chosen, request.arguments)
    return Example(
        "tool_calls",
        keys_of(request, wording),
        calls(made),
        question,
        tools=offered(rng, chosen),
        check="tool_calls",
        expected=[made],
    )


PARALLEL = {
    "weather": ["What is the weather in {first} and in {second}?", "How is the weather in {first} and {second}?"],
    "time": ["What time is it in {first} and in {second}?", "Tell me the time in {first} and {second}."],
}


def parallel_calls(rng: Random) -> Example:
    """The same function for two cities: two calls in one answer."""
    first, second = rng.sample(CITIES, 2)
    kind = rng.choice(list(PARALLEL))
    _, question = ask(rng, PARALLEL[kind], first=first, second=second)
    chosen = offer(rng, kind)
    made = [call(chosen, {"city": city}) for city in (first, second)]
    return Example(
        "parallel_calls",
        (f"{first}|{second}",),
        calls(*made),
        question,
        tools=offered(rng, chosen),
        check="tool_calls",
        expected=made,
    )


def tool_answer(rng: Random) -> Example:
    """A function has returned: say it in words."""
    request, chosen = any_request(rng)
    wording, messages = ask(rng, request.wordings, **request.arguments)
    messages.append(calls(call(chosen, request.arguments)))
    messages.append({"role": "tool", "name": chosen.name, "content": json.dumps(request.result)})
    return Example("tool_answers", keys_of(request, wording), says(request.reply), messages, tools=offered(rng, chosen))


def tool_missing(rng: Random) -> Example:
    """The request needs a tool that is not there."""
    request = known_request(rng)
    wording, question = ask(rng, request.wordings, **request.arguments)
    answer = says("Sorry, I have no function for that.")
    tools = offered(rng, without=request.kind)
    return Example("tool_missing", keys_of(request, wording), answer, question, tools=tools or None)
