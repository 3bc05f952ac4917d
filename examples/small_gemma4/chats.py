"""Generated chats: short questions with answers that are right by construction, in ten topics.

A chat is a list of `{"role", "content"}` messages that ends with the model's answer; a chat with tools also carries
their declarations. Each class draws its items (numbers, words, facts) and one of several phrasings. The pair (item,
phrasing) is held out when the CRC-32 of its text says so, so that held-out chats never occur in training; sums are
held out by their two numbers, in every phrasing; greetings are never held out.
Not done: long answers and free conversation.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from small_gemma4 import facts

Message = dict[str, Any]
HELD_OUT_EVERY = 10
LARGEST_TERM = 12
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Chat:
    """One chat: its topic, the messages (the last is the model's), the declared tools and what decides its split."""

    topic: str
    messages: list[Message]
    key: str
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        return self.topic != "greeting" and zlib.crc32(self.key.encode()) % HELD_OUT_EVERY == 0


def _exchange(topic: str, question: str, answer: str, key: str | None = None, system: str | None = None) -> Chat:
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(topic, messages, key or f"{system}|{question}")


def _addition(rng: random.Random) -> Chat:
    left, right = rng.randint(0, LARGEST_TERM), rng.randint(0, LARGEST_TERM)
    question = rng.choice(["What is {} + {}?", "{} + {} = ?", "Add {} and {}."]).format(left, right)
    return _exchange("arithmetic", question, str(left + right), f"{left} + {right}")


def _subtraction(rng: random.Random) -> Chat:
    left = rng.randint(0, LARGEST_TERM)
    right = rng.randint(0, left)
    question = rng.choice(["What is {} - {}?", "{} - {} = ?"]).format(left, right)
    return _exchange("arithmetic", question, str(left - right), f"{left} - {right}")


def _comparison(rng: random.Random) -> Chat:
    left, right = rng.sample(range(21), 2)
    word, pick = rng.choice([("larger", max), ("smaller", min)])
    return _exchange("comparison", f"Which is {word}, {left} or {right}?", str(pick(left, right)))


def _counting(rng: random.Random) -> Chat:
    start = rng.randint(0, 12)
    numbers = list(range(start, start + rng.randint(2, 7)))
    if rng.random() < 0.3:
        numbers.reverse()
    answer = ", ".join(map(str, numbers))
    return _exchange("counting", f"Count from {numbers[0]} to {numbers[-1]}.", answer)


def _words(rng: random.Random) -> Chat:
    word = rng.choice(facts.WORDS + facts.SHORT_WORDS)
    kind = rng.choice(["copy", "twice", "first", "last", "spell", "reverse"])
    short = rng.choice(facts.SHORT_WORDS)
    question, answer = {
        "copy": (f"Repeat the word {word}.", word),
        "twice": (f"Say {word} twice.", f"{word} {word}"),
        "first": (f"What is the first letter of {word}?", word[0]),
        "last": (f"What is the last letter of {word}?", word[-1]),
        "spell": (f"Spell {short}.", "-".join(short)),
        "reverse": (f"Spell {short} backwards.", "-".join(reversed(short))),
    }[kind]
    return _exchange("words", question, answer, f"{kind} {question}")


def _fact(rng: random.Random) -> Chat:
    table, phrasings = rng.choice(
        [
            (facts.CAPITALS, ["What is the capital of {}?", "Name the capital of {}.", "Capital of {}?"]),
            (facts.OPPOSITES, ["What is the opposite of {}?", "Give the opposite of {}.", "Opposite of {}?"]),
            (facts.COLOURS, ["What colour is {}?", "Name the colour of {}.", "Which colour has {}?"]),
            (facts.SOUNDS, ["What does a {} say?", "Which sound does a {} make?"]),
            (facts.ANIMAL_LEGS, ["How many legs has a {}?", "Count the legs of a {}."]),
        ]
    )
    item = rng.choice(sorted(table))
    question = rng.choice(phrasings).format(item)
    if rng.random() < 0.2:
        return _exchange("system", question, table[item].upper(), system="Answer in capital letters.")
    return _exchange("facts", question, table[item])


def _calendar(rng: random.Random) -> Chat:
    kind, names = rng.choice([("day", facts.DAYS), ("month", facts.MONTHS)])
    word, step = rng.choice([("after", 1), ("before", -1)])
    index = rng.randrange(len(names))
    question = rng.choice(["Which {} comes {} {}?", "What {} is {} {}?"]).format(kind, word, names[index])
    return _exchange("calendar", question, names[(index + step) % len(names)])


def _greeting(rng: random.Random) -> Chat:
    name = rng.choice(facts.NAMES)
    question, answer = rng.choice(
        [
            ("Hello!", "Hello! How can I help you?"),
            ("Hi, how are you?", "I am fine, thank you."),
            (f"Hello, my name is {name}.", f"Hello {name}! How can I help you?"),
            (f"Hi, I am {name}.", f"Hello {name}! How can I help you?"),
            ("Who are you?", "I am a very small Gemma 4 model."),
            ("Thank you.", "You are welcome."),
            ("Goodbye.", "Goodbye! Have a nice day."),
        ]
    )
    return _exchange("greeting", question, answer)


def _recall(rng: random.Random) -> Chat:
    name, animal, word = rng.choice(facts.NAMES), rng.choice(sorted(facts.SOUNDS)), rng.choice(facts.WORDS)
    statement, reply, question, answer = rng.choice(
        [
            (f"Hello, my name is {name}.", f"Hello {name}! How can I help you?", "What is my name?", name),
            (f"I have a {animal}.", "That is nice.", "Which animal do I have?", animal),
            (f"The secret word is {word}.", "I will remember it.", "What is the secret word?", word),
        ]
    )
    middle = _fact(rng).messages[-2:] if rng.random() < 0.3 else []
    first = [{"role": "user", "content": statement}, {"role": "assistant", "content": reply}]
    last = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat("recall", [*first, *middle, *last], "".join(message["content"] for message in first + middle))


def _tool(rng: random.Random) -> Chat:
    city, weather = rng.choice(facts.CITIES), rng.choice(["sunny", "rainy", "cloudy", "windy"])
    question = rng.choice(["What is the weather in {}?", "How is the weather in {}?"]).format(city)
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "content": weather},
        {"role": "assistant", "content": f"It is {weather} in {city}."},
    ]
    return Chat("tools", messages, question + weather, [WEATHER_TOOL])


TOPICS: list[tuple[Callable[[random.Random], Chat], int]] = [
    (_addition, 16),
    (_subtraction, 8),
    (_comparison, 6),
    (_counting, 8),
    (_words, 16),
    (_fact, 20),
    (_calendar, 6),
    (_greeting, 6),
    (_recall, 5),
    (_tool, 3),
]


def generate(seed: int, held_out: bool) -> Iterator[Chat]:
    """An endless stream of chats of one split; the same seed always gives the same stream."""
    rng = random.Random(seed)
    makers, weights = [maker for maker, _ in TOPICS], [weight for _, weight in TOPICS]
    while True:
        chat = rng.choices(makers, weights)[0](rng)
        if chat.held_out is held_out:
            yield chat


def held_out_chats(count: int, seed: int = 1) -> list[Chat]:
    """`count` distinct held-out chats."""
    distinct: dict[str, Chat] = {}
    for chat in generate(seed, held_out=True):
        distinct.setdefault(repr(chat.messages), chat)
        if len(distinct) == count:
            break
    return list(distinct.values())
