"""The demo's task: route a support ticket to a category and a priority, as JSON.

``python -m slmops.training.demo.tickets FOLDER`` writes the two files beside this module again, byte for byte. The
wordings are in ``phrases.toml``.
"""

from __future__ import annotations

import json
import random
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmops.core.values import Frozen


class Phrases(Frozen):
    """The wordings of one of the two sets; ``{p}`` stands for a product, ``{n}`` for a number.

    Attributes:
        problems: Category to sentences.
        impacts: Priority to sentences.
        asides: Category to sentences saying that it works fine.
    """

    products: tuple[str, ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    problems: dict[str, tuple[str, ...]]
    impacts: dict[str, tuple[str, ...]]
    asides: dict[str, tuple[str, ...]]


_phrases = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
TRAINING, EVALUATION = (Phrases.model_validate(_phrases[part]) for part in ("training", "evaluation"))
CATEGORIES = tuple(TRAINING.problems)
PRIORITIES = tuple(TRAINING.impacts)
TRAIN_ITEMS, EVALUATION_ITEMS = 432, 72
SYSTEM = (
    f"Route the ticket. Reply with JSON: category ({', '.join(CATEGORIES[:-1])} or {CATEGORIES[-1]}), "
    "priority (high, normal or low)."
)
SCHEMA = {
    "type": "object",
    "properties": {"category": {"enum": list(CATEGORIES)}, "priority": {"enum": list(PRIORITIES)}},
    "required": ["category", "priority"],
    "additionalProperties": False,
}
ASIDES, TYPOS, SWAPS = 0.25, 0.3, 0.2
"""Shares of the tickets that have an aside, have a typing error, and name the impact before the problem."""


def train_items(seed: int = 0) -> list[dict[str, Any]]:
    """Items to train on, with system, user and assistant messages."""
    return [
        {"messages": [*_asked(text), {"role": "assistant", "content": _answer(category, priority)}]}
        for text, category, priority in _tickets(TRAINING, TRAIN_ITEMS, seed)
    ]


def evaluation_items(seed: int = 1) -> list[dict[str, Any]]:
    """Held-out items, in the format of an evaluation set."""
    return [
        {
            "id": f"ticket-{number}",
            "category": category,
            "messages": _asked(text),
            "match": "json_schema",
            "schema": SCHEMA,
            "expected": _answer(category, priority),
            "format": "json",
            "max_tokens": 32,
        }
        for number, (text, category, priority) in enumerate(_tickets(EVALUATION, EVALUATION_ITEMS, seed), start=1)
    ]


def write(folder: Path) -> None:
    """Write both files into ``folder``."""
    for name, items in (("train.jsonl", train_items()), ("evaluation.jsonl", evaluation_items())):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def _answer(category: str, priority: str) -> str:
    return json.dumps({"category": category, "priority": priority})


def _tickets(phrases: Phrases, count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield different tickets as (text, category, priority), in random order, as many for each pair of labels."""
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    labels = [(category, priority) for category in phrases.problems for priority in phrases.impacts]
    wanted = labels * (count // len(labels))
    rng.shuffle(wanted)
    # Dealt from decks, so that each wording comes as often as the others of its kind.
    decks: dict[tuple[str, ...], list[str]] = {}
    seen: set[str] = set()
    for category, priority in wanted:
        text = ""
        while not text or text in seen:
            problem = _draw(decks, phrases.problems[category], rng)
            impact = _draw(decks, phrases.impacts[priority], rng)
            text = _ticket(phrases, category, problem, impact, rng)
        seen.add(text)
        yield text, category, priority


def _draw(decks: dict[tuple[str, ...], list[str]], cards: tuple[str, ...], rng: random.Random) -> str:
    if not decks.get(cards):
        decks[cards] = rng.sample(cards, len(cards))
    return decks[cards].pop()


def _ticket(phrases: Phrases, category: str, problem: str, impact: str, rng: random.Random) -> str:
    body = [impact, problem] if rng.random() < SWAPS else [problem, impact]
    if rng.random() < ASIDES:
        other = rng.choice([name for name in phrases.asides if name != category])
        body.insert(rng.randrange(3), rng.choice(phrases.asides[other]))
    parts = [rng.choice(phrases.openings), *body, rng.choice(phrases.closings)]
    text = " ".join(part for part in parts if part)
    text = text.replace("{p}", rng.choice(phrases.products)).replace("{n}", str(rng.randrange(4, 900)))
    return _misspelt(text, rng) if rng.random() < TYPOS else text


def _misspelt(text: str, rng: random.Random) -> str:
    """Exchange two letters of one long word, or leave one out."""
    words = text.split(" ")
    long = [place for place, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    at = rng.choice(long)
    word, place = words[at], rng.randrange(1, len(words[at]) - 2)
    swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    words[at] = swapped if rng.random() < 0.5 else word[:place] + word[place + 1 :]
    return " ".join(words)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
