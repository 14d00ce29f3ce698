"""The demo's data: reproducible, balanced, and really held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from slmops.evaluation import dataset
from slmops.training.demo import tickets

COMMITTED = Path(tickets.__file__).parent


def ticket(item: dict[str, list[dict[str, str]]]) -> str:
    """The ticket's text; the system prompt is the same for all."""
    [text] = [message["content"] for message in item["messages"] if message["role"] == "user"]
    return text


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))}


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    tickets.write(tmp_path)
    for name in ("train.jsonl", "evaluation.jsonl"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()


def test_each_pair_of_labels_comes_as_often_as_any_other() -> None:
    for answers, each in (
        ([item["messages"][-1]["content"] for item in tickets.train_items()], 24),
        ([item["expected"] for item in tickets.evaluation_items()], 4),
    ):
        counts = Counter(tuple(json.loads(answer).values()) for answer in answers)
        assert len(counts) == 18
        assert set(counts.values()) == {each}


def test_what_is_held_out_is_worded_otherwise_and_no_ticket_comes_twice() -> None:
    texts = [ticket(item) for item in [*tickets.train_items(), *tickets.evaluation_items()]]
    assert len(set(texts)) == len(texts) == 432 + 72
    trained = [grams(ticket(item)) for item in tickets.train_items()]
    for item in tickets.evaluation_items():
        held_out = grams(ticket(item))
        assert max(len(held_out & other) / len(held_out | other) for other in trained) < 0.2


def test_tone_tells_nothing_of_the_priority() -> None:
    for shout in ("URGENT!!!", "This is unacceptable!"):
        priorities = {
            json.loads(item["messages"][-1]["content"])["priority"]
            for item in tickets.train_items()
            if shout in ticket(item)
        }
        assert priorities == set(tickets.PRIORITIES)


def test_the_evaluation_set_is_one() -> None:
    items = dataset.load(COMMITTED / "evaluation.jsonl").items
    assert len(items) == 72
    assert {item.category for item in items} == set(tickets.CATEGORIES)
    for item in items:
        assert item.format_valid(item.expected)
        assert [message["role"] for message in item.conversation] == ["system", "user"]


def test_the_question_names_every_label() -> None:
    for label in (*tickets.CATEGORIES, *tickets.PRIORITIES):
        assert label in tickets.SYSTEM
