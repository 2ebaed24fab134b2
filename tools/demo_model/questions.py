"""The tasks that are one question and one answer: sums, facts, words, stories, records, small talk, raw statements.

Each function draws one random `Example`. The tasks that offer functions are in `functions.py`.
"""

import json
from typing import Any

from example import Example, Random, ask, says
from facts import (
    ANIMALS,
    CAPITALS,
    CITIES,
    CODAS,
    COLOURS,
    EMOJI,
    FIELDS,
    JOBS,
    NAMES,
    OBJECTS,
    ONSETS,
    OPPOSITES,
    PLACES,
    VOWELS,
    WEEKDAYS,
    WORDS,
    words,
)


def new_name(rng: Random) -> str:
    parts = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.randint(1, 2)))
    return (parts + rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)).capitalize()


def any_name(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(NAMES)
    return new_name(rng) if kind < 0.9 else f"{rng.choice(NAMES)} {new_name(rng)}"


def any_city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.85 else new_name(rng)


# --- arithmetic

# A pair that is held out is held out in every wording, in word problems, in plain text and with its terms exchanged.
ADD = ["What is {a} + {b}?", "{a} + {b} =", "Add {a} and {b}.", "Calculate {a} plus {b}.", "How much is {a} plus {b}?"]
SUBTRACT = [
    "What is {a} - {b}?",
    "{a} - {b} =",
    "Subtract {b} from {a}.",
    "Calculate {a} minus {b}.",
    "How much is {a} minus {b}?",
]
MULTIPLY = [
    "What is {a} * {b}?",
    "{a} * {b} =",
    "Multiply {a} by {b}.",
    "Calculate {a} times {b}.",
    "How much is {a} times {b}?",
    "What is {a} x {b}?",
    "What is the product of {a} and {b}?",
]
GAIN = [
    "{name} has {a} {thing}s and gets {b} more. How many {thing}s does {name} have now?",
    "There are {a} {thing}s in a box. {name} adds {b} {thing}s. How many {thing}s are in the box?",
]
LOSS = [
    "{name} has {a} {thing}s and gives away {b}. How many {thing}s does {name} have now?",
    "There are {a} {thing}s in a box. {name} takes {b} {thing}s. How many {thing}s are in the box?",
]
COUNTABLES = words(
    "ball bell book bottle button candle coin cup feather flower hammer kite lamp lemon letter pencil ring spoon"
)


def operands(rng: Random) -> tuple[int, int]:
    top = rng.choice((10, 20, 100, 100))
    return rng.randrange(top), rng.randrange(top)


def sum_key(a: int, sign: str, b: int) -> str:
    return f"{min(a, b)}+{max(a, b)}" if sign == "+" else f"{a}-{b}"


def addition(rng: Random) -> Example:
    a, b = operands(rng)
    _, question = ask(rng, ADD, a=a, b=b)
    return Example("addition", (sum_key(a, "+", b),), says(f"{a} + {b} = {a + b}"), question)


def subtraction(rng: Random) -> Example:
    b, a = sorted(operands(rng))
    _, question = ask(rng, SUBTRACT, a=a, b=b)
    return Example("subtraction", (sum_key(a, "-", b),), says(f"{a} - {b} = {a - b}"), question)


def multiplication(rng: Random) -> Example:
    a, b = rng.randrange(13), rng.randrange(13)
    wording, question = ask(rng, MULTIPLY, a=a, b=b)
    return Example("multiplication", (f"{a}*{b}|{wording}",), says(f"{a} * {b} = {a * b}"), question)


def word_problem(rng: Random) -> Example:
    b, a = sorted((rng.randint(2, 50), rng.randint(2, 50)))
    gain = rng.random() < 0.5
    name, thing = rng.choice(NAMES), rng.choice(COUNTABLES)
    wording, question = ask(rng, GAIN if gain else LOSS, a=a, b=b, name=name, thing=thing)
    sign, total = ("+", a + b) if gain else ("-", a - b)
    subject = f"{name} has" if wording == 0 else "There are"
    answer = says(f"{a} {sign} {b} = {total}. {subject} {total} {thing}s.")
    return Example("word_problem", (sum_key(a, sign, b),), answer, question)


# --- facts and words

CAPITAL = [
    "What is the capital of {country}?",
    "Which city is the capital of {country}?",
    "Name the capital of {country}.",
    "Tell me the capital of {country}.",
    "What's the capital city of {country}?",
    "{country}: what is its capital?",
    "{country} has which capital?",
    "{country} is a country. What is its capital?",
    "Do you know the capital of {country}?",
    "I need the capital of {country}.",
]
COUNTRY = [
    "{capital} is the capital of which country?",
    "{capital} is a capital. Of which country?",
    "{capital}: of which country is it the capital?",
    "Which country has {capital} as its capital?",
    "Of which country is {capital} the capital?",
    "What country has the capital {capital}?",
]
OPPOSITE = [
    "What is the opposite of {word}?",
    "What is the opposite of '{word}'?",
    "Give me the opposite of {word}.",
    "Name the opposite of '{word}'.",
    "Which word is the opposite of {word}?",
    "Tell me the antonym of {word}.",
    "'{word}': what is the opposite?",
    "I need the opposite of '{word}'.",
]
COUNT_UP = [
    "Count from {a} to {b}.",
    "Please count from {a} up to {b}.",
    "List the numbers from {a} to {b}.",
    "Can you count from {a} to {b}?",
]
COUNT_DOWN = ["Count down from {a} to {b}.", "Count backwards from {a} to {b}."]
SPELL = [
    "Spell the word '{word}'.",
    "Spell {word}.",
    "How do you spell '{word}'?",
    "How is {word} spelled?",
    "Please spell '{word}' for me.",
    "Can you spell the word {word}?",
]
EMOJIS = [
    "Give me the emoji for {word}.",
    "What is the emoji for '{word}'?",
    "Which emoji shows a {word}?",
    "Show me a {word} emoji.",
    "I need an emoji: {word}.",
    "Which emoji is called '{word}'?",
    "Give me the '{word}' emoji.",
]


def capital(rng: Random) -> Example:
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.7:
        wording, question = ask(rng, CAPITAL, country=country)
        return Example("capitals", (f"{country}|{wording}",), says(f"The capital of {country} is {city}."), question)
    wording, question = ask(rng, COUNTRY, capital=city)
    return Example("capitals", (f"{city}|{wording}",), says(f"{city} is the capital of {country}."), question)


def opposite(rng: Random) -> Example:
    pair = rng.choice(OPPOSITES)
    word, other = pair if rng.random() < 0.5 else pair[::-1]
    wording, question = ask(rng, OPPOSITE, word=word)
    return Example("opposites", (f"{word}|{wording}",), says(f"The opposite of {word} is {other}."), question)


def counting(rng: Random) -> Example:
    low, length = (
        rng.choice((1, rng.randint(0, 9), rng.randint(0, 80))),
        rng.choice((rng.randint(3, 10), rng.randint(3, 20))),
    )
    high = low + length - 1
    up = rng.random() < 0.7
    a, b = (low, high) if up else (high, low)
    _, question = ask(rng, COUNT_UP if up else COUNT_DOWN, a=a, b=b)
    numbers = range(low, high + 1) if up else range(high, low - 1, -1)
    return Example("counting", (f"{a} to {b}",), says(", ".join(map(str, numbers))), question)


def spelling(rng: Random) -> Example:
    word = rng.choice(WORDS)
    wording, question = ask(rng, SPELL, word=word)
    return Example("spelling", (f"{word}|{wording}",), says("-".join(word)), question)


def emoji(rng: Random) -> Example:
    word, sign = rng.choice(list(EMOJI.items()))
    wording, question = ask(rng, EMOJIS, word=word)
    return Example("emoji", (f"{word}|{wording}",), says(f"Here is a {word}: {sign}"), question)


# --- stories

STORY = [
    "Tell me a short story about a {animal} named {name} and a {thing}.",
    "Write a short story about {name} the {animal} and a {thing}.",
    "Tell me a story with a {animal} called {name} and a {thing}.",
]
OPENINGS = [
    "Once upon a time there was a {mood} {animal} named {name}.",
    "Long ago, a {mood} {animal} named {name} lived in a {place}.",
    "In a quiet {place} there lived a {animal} named {name}.",
    "There was once a {animal} named {name} who loved the {place}.",
]
FINDS = [
    "One day {name} found a {colour} {thing} near the {place}.",
    "One morning {name} saw a {thing} in the {place}.",
    "One evening a friend gave {name} a {colour} {thing}.",
    "On {day}, {name} went to the {place} to look for a {thing}.",
]
EVENTS = [
    "But the {thing} was broken, and {name} was sad.",
    "Suddenly it began to rain, and everyone ran home.",
    "A {other} wanted the {thing} too.",
    "{name} did not know what to do with it.",
    "A {other} came by and asked for help.",
    "Then the wind carried the {thing} away.",
]
ENDINGS = [
    "{name} and the {other} shared the {thing} and became friends.",
    "{name} took the {thing} home and was happy.",
    "In the end {name} gave the {thing} to a {other}, and they danced all night.",
    "From that day on {name} kept the {thing} safe in the {place}.",
]
MOODS = words("brave clever curious happy kind lonely quiet shy small wise young old")


def tell(rng: Random, animal: str, name: str, thing: str) -> str:
    slots = {
        "animal": animal,
        "name": name,
        "thing": thing,
        "mood": rng.choice(MOODS),
        "place": rng.choice(PLACES),
        "colour": rng.choice(COLOURS),
        "other": rng.choice(ANIMALS),
        "day": rng.choice(WEEKDAYS),
    }
    sentences = [rng.choice(OPENINGS), rng.choice(FINDS), *rng.sample(EVENTS, rng.randint(1, 2)), rng.choice(ENDINGS)]
    return " ".join(s.format(**slots) for s in sentences) + " The end."


def story(rng: Random) -> Example:
    animal, name, thing = rng.choice(ANIMALS), rng.choice(NAMES), rng.choice(OBJECTS)
    _, question = ask(rng, STORY, animal=animal, name=name, thing=thing)
    answer = says(tell(rng, animal, name, thing))
    return Example(
        "stories", (f"{animal}|{name}|{thing}",), answer, question, check="story", expected=[animal, name, thing]
    )


# --- JSON records

PERSON = [
    "Give me a JSON record for a person named {name}, age {age}, city {city}.",
    "Write a JSON object for a person: name {name}, age {age}, city {city}.",
    "{name} is {age} years old and lives in {city}. Give me this as JSON.",
    "Make a JSON record: {name}, {age} years old, from {city}.",
]
WORKER = [
    "Give me a JSON record for a person named {name}, age {age}, city {city}, job {job}.",
    "{name} is a {job}, is {age} years old and lives in {city}. Give me this as JSON.",
]
PRODUCT = [
    "Give me a JSON record for a product: {colour} {thing}, price {price}, {stock}.",
    "Write a JSON object for a {colour} {thing} that costs {price} and is {stock}.",
]
ANY_RECORD = [
    "Give me a JSON object with {fields}.",
    "Write JSON with {fields}.",
    "Write a JSON object: {fields}.",
]
LIST = [
    "Write the numbers {items} as a JSON list.",
    "Give me a JSON list of {items}.",
    "Turn {items} into a JSON array.",
]


def value(rng: Random, field: str) -> str | int:
    values = FIELDS[field]
    if values is None:
        return rng.randrange(rng.choice((10, 100, 1000)))
    if values and rng.random() < 0.7:
        return rng.choice(values)
    name = new_name(rng)
    return rng.choice((name, name.lower(), name[:4].upper()))


def listed(rng: Random, record: dict[str, Any]) -> str:
    sign, comma = rng.choice((" ", " ", " = ", ": ")), rng.choice((", ", " and "))
    return comma.join(f"{field}{sign}{value}" for field, value in record.items())


def json_record(rng: Random) -> Example:
    kind = rng.choice(("person", "person", "worker", "product", "list", "fields"))
    record: Any
    if kind == "product":
        record = {"name": rng.choice(OBJECTS), "colour": rng.choice(COLOURS), "price": rng.randint(1, 99)}
        record["in_stock"] = rng.random() < 0.5
        stock = "in stock" if record["in_stock"] else "sold out"
        _, question = ask(
            rng, PRODUCT, thing=record["name"], colour=record["colour"], price=record["price"], stock=stock
        )
    elif kind == "list":
        words = rng.random() < 0.5
        record = [rng.choice(COLOURS) if words else rng.randint(0, 99) for _ in range(rng.randint(3, 6))]
        _, question = ask(rng, LIST[1:] if words else LIST, items=", ".join(map(str, record)))
    elif kind == "fields":
        record = {field: value(rng, field) for field in rng.sample(list(FIELDS), rng.randint(1, 3))}
        _, question = ask(rng, ANY_RECORD, fields=listed(rng, record))
    else:
        record = {"name": any_name(rng), "age": rng.randint(1, 99), "city": any_city(rng)}
        if kind == "worker":
            record["job"] = rng.choice(JOBS)
        _, question = ask(rng, WORKER if kind == "worker" else PERSON, **record)
    text = json.dumps(record, ensure_ascii=False)
    # Every value that is not a listed name or city is a key too: a held-out one is in no training record at all.
    new = [v for v in record.values() if isinstance(v, str)] if kind in ("person", "worker", "fields") else []
    keys = (text, *(v for v in new if v not in NAMES and v not in CITIES))
    return Example("json", keys, says(text), question, check="json", expected=record)


def json_new_name(rng: Random) -> Example:
    """Records for made-up names; no training record has the held-out ones, so they must be copied, not remembered."""
    record = {"name": new_name(rng), "age": rng.randint(1, 99), "city": rng.choice(CITIES)}
    _, question = ask(rng, PERSON, **record)
    text = json.dumps(record, ensure_ascii=False)
    return Example("json_new_names", (str(record["name"]),), says(text), question, check="json", expected=record)


# --- conversation

HELLOS = ["Hello", "Hi", "Hi there", "Hey", "Good morning", "Good evening", "Greetings"]
INTRODUCTIONS = ["{hello}! I am {name}.", "{hello}, my name is {name}.", "{hello}! My name is {name}."]
IDENTITY = [
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Tell me about yourself.",
    "Are you an AI?",
    "Introduce yourself.",
    "Which model are you?",
]
I_AM = "I am the demo model of quire, a small language model trained on text that a script wrote."
I_CAN = (
    "I can add, subtract and multiply small numbers, name capitals and opposites, count, spell words, "
    "tell short stories, write JSON records and call functions."
)
ABILITY = ["What can you do?", "How can you help me?", "What are you good at?", "Help!", "What can I ask you?"]
SMALLTALK = [
    (
        ["How are you?", "How do you do?", "How is it going?", "Are you well?"],
        "I am fine, thank you. How can I help you?",
    ),
    (["Thank you!", "Thanks a lot.", "Thanks!", "Many thanks."], "You are welcome!"),
    (["Goodbye!", "Bye!", "See you later.", "Good night!"], "Goodbye! Have a nice day."),
    (
        ["Tell me a joke.", "Do you know a joke?", "Make me laugh."],
        "Why did the engine cross the road? To get to the next token.",
    ),
]
BEYOND = [
    "Write a poem about {thing}s.",
    "Who won the match on {day}?",
    "What is the meaning of life?",
    "Write a program that sorts a list.",
    "Why is the sky {colour}?",
    "How old is the {place}?",
    "Explain how a {thing} works.",
    "What is the best {thing}?",
    "Who invented the {thing}?",
    "How do I repair my {thing}?",
    "What does a {animal} eat?",
    "How far is it to {city}?",
    "What should I cook on {day}?",
    "Summarize this text for me.",
    "Who is {name}?",
    "What is love?",
    "When was {city} founded?",
    "Translate '{thing}' into French.",
    "Is a {animal} faster than a {thing}?",
]
I_CANNOT = "I am only a small demo model and do not know that. " + I_CAN


def anything(rng: Random) -> dict[str, str]:
    return {
        "name": any_name(rng),
        "city": any_city(rng),
        "animal": rng.choice(ANIMALS),
        "thing": rng.choice(OBJECTS),
        "colour": rng.choice(COLOURS),
        "place": rng.choice(PLACES),
        "day": rng.choice(WEEKDAYS),
    }


def smalltalk(rng: Random) -> Example:
    hello = rng.choice(HELLOS)
    kind = rng.choice(("hello", "introduction", "identity", "identity", "ability", "talk"))
    if kind == "hello":
        _, question = ask(rng, [hello + rng.choice(("!", ".", ", quire!", ", model!"))])
        reply = "Hello! How can I help you?"
    elif kind == "introduction":
        name = any_name(rng)
        _, question = ask(rng, INTRODUCTIONS, hello=hello, name=name)
        reply = f"Hello {name}! How can I help you?"
    else:
        wordings, reply = rng.choice(SMALLTALK)
        if kind == "identity":
            wordings, reply = IDENTITY, I_AM
        elif kind == "ability":
            wordings, reply = ABILITY, I_CAN
        text = rng.choice(wordings)
        _, question = ask(rng, [rng.choice((text, f"{hello}! {text}", f"{hello}, quire. {text}"))])
    return Example("smalltalk", (question[0]["content"].casefold().rstrip(".?!"),), says(reply), question)


def beyond(rng: Random) -> Example:
    hello = rng.choice(("", "", "", *(f"{h}! " for h in HELLOS)))
    _, question = ask(rng, [hello + text for text in BEYOND], **anything(rng))
    return Example("beyond", (question[0]["content"].casefold().rstrip(".?!"),), says(I_CANNOT), question)


# --- raw text

STATEMENTS = [
    "The capital of {country} is| {city}.",
    "The capital city of {country} is| {city}.",
    "{city} is the capital of| {country}.",
    "If you travel to {country}, visit its capital,| {city}.",
    "The opposite of {word} is| {other}.",
    "The word {word} is the opposite of| {other}.",
    "{city} lies in| {country}.",
    "{a} + {b} =| {total}.",
    "{a} plus {b} is| {total}.",
    "The sum of {a} and {b} is| {total}.",
]


def stated(number: int, place: tuple[str, str], words: tuple[str, str], terms: tuple[int, int]) -> Example:
    head, tail = STATEMENTS[number].split("|")
    (country, city), (word, other), (a, b) = place, words, terms
    slots = {"country": country, "city": city, "word": word, "other": other, "a": a, "b": b, "total": a + b}
    prompt, rest = head.format(**slots), tail.format(**slots)
    key = sum_key(a, "+", b) if "{total}" in tail else prompt
    return Example("completion", (key,), says(rest), prompt=prompt, check="prefix", expected=rest.strip())


def statement(rng: Random) -> Example:
    pair = rng.choice(OPPOSITES)
    words = pair if rng.random() < 0.5 else pair[::-1]
    return stated(rng.randrange(len(STATEMENTS)), rng.choice(list(CAPITALS.items())), words, operands(rng))


def statements(rng: Random, length: int) -> list[Example]:
    """One fact after the other in the order of the lists: what to say next is then certain."""
    number, (a, b) = rng.randrange(len(STATEMENTS)), operands(rng)
    places, at = list(CAPITALS.items()), rng.randrange(len(OPPOSITES))
    run = range(at, at + length)
    return [stated(number, places[i % len(places)], OPPOSITES[i % len(OPPOSITES)], (a, b + i - at)) for i in run]
