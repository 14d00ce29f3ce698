"""What training items are to each other and to the evaluation set: duplicates, contradictions, leaks, the split."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from slmops.evaluation.dataset import Item
from slmops.training.examples import Example, shown
from slmops.training.values import Problem

GRAM = 5
"""Words that are compared together."""
LISTED = 20
"""Problems of one kind that refuse nothing and are told one by one."""

_OPERATORS = {"-": "−", "*": "×", "/": "÷"}
# Thai to Burmese, Khmer, kana and Chinese: scripts that put no blanks between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


class _Marks(dict[int, str]):
    """For str.translate: punctuation becomes a blank; a symbol, and a character of an unspaced script, is a word."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if kind in "PZC":
            self[code] = " "
        else:
            self[code] = f" {character} " if kind == "S" or _UNSPACED.match(character) else character
        return self[code]


_MARKS = _Marks()


def words(text: str) -> list[str]:
    """The words of a text, however it is cased, spaced, punctuated and encoded; operators between digits count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    counted = re.sub(r"(?<=\d)\s*([-*/])\s*(?=\d)", lambda found: _OPERATORS[found[1]], folded)
    return counted.translate(_MARKS).split() or [folded.strip()]


def asked(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The words of the last user message, and of those before it as long as they are fewer than five together.

    "Yes, please" alone says nothing of what was asked.
    """
    found: list[str] = []
    for message in reversed(messages):
        if message["role"] == "user":
            found = words(message["content"]) + found
            if len(found) >= GRAM:
                break
    return found


def unique(examples: Iterable[Example]) -> tuple[list[Example], list[Problem]]:
    """The examples without repetitions, and those that were dropped."""
    kept: dict[str, Example] = {}
    problems = []
    for example in examples:
        first = kept.setdefault(example.json, example)
        if first is not example:
            problems.append(example.problem("duplicate", f"the same as {first.place}; kept once", fatal=False))
    return list(kept.values()), problems


def alike(examples: Sequence[Example], threshold: float) -> list[Problem]:
    """Examples that ask what an earlier one asks, or nearly, with the same answer or another.

    Args:
        examples: Without repetitions.
        threshold: Jaccard similarity of the n-grams of words, from which on the question counts as nearly the same.
    """
    earlier: dict[str, Example] = {}
    problems = {}
    for number, example in enumerate(examples):
        question = "\n".join(f"{turn['role']} {' '.join(words(turn['content']))}" for turn in example.messages[:-1])
        first = earlier.setdefault(question, example)
        if first is not example:
            same = words(first.messages[-1]["content"]) == words(example.messages[-1]["content"])
            detail = (
                f"the same as {first.place} but for case, blanks and punctuation"
                if same
                else f"asks the same as {first.place}, and has another answer: {_last(example)}"
            )
            problems[number] = example.problem("near_duplicate", detail, fatal=False)
    questions = [asked(example.messages) for example in examples]
    for number, (other, similarity) in _similar(questions, questions, threshold, before=True).items():
        detail = f"asks nearly the same as {examples[other].place} (similarity {similarity:.2f})"
        problems.setdefault(number, examples[number].problem("near_duplicate", detail, fatal=False))
    return [problems[number] for number in sorted(problems)]


def leaks(examples: Sequence[Example], items: Sequence[Item], threshold: float) -> list[Problem]:
    """Examples that ask, at any turn, what the evaluation set asks, or nearly: it would measure memory.

    Only what the users say is compared; a system prompt is often common to all.

    Args:
        examples: Training and validation.
        items: The evaluation set.
        threshold: Jaccard similarity of the n-grams of words from which on it is a leak.
    """
    questions = [asked(item.conversation) for item in items]
    exactly = {" ".join(question): number for number, question in reversed(list(enumerate(questions)))}
    turns = [
        (number, asked(example.messages[: place + 1]))
        for number, example in enumerate(examples)
        for place, message in enumerate(example.messages)
        if message["role"] == "user"
    ]
    near = _similar(questions, [said for _, said in turns], threshold)
    problems: dict[int, Problem] = {}
    for place, (number, said) in enumerate(turns):
        if number in problems:
            continue
        example = examples[number]
        if (other := exactly.get(" ".join(said))) is not None:
            problems[number] = example.problem("leak", f"asks what the {_item(items[other])} asks")
        elif place in near:
            other, similarity = near[place]
            detail = f"asks nearly what the {_item(items[other])} asks (similarity {similarity:.2f})"
            problems[number] = example.problem("near_leak", detail)
    return list(problems.values())


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation, at least one of each.

    Which side an example is on depends on itself alone, so that data which are added move nothing that was there.

    Args:
        examples: At least two, without repetitions.
        share: Of the examples, about, that go to the validation.
        seed: Makes another split.
    """
    places = {
        example.json: int(hashlib.sha256(f"{seed} {example.json}".encode()).hexdigest()[:16], 16) / 2**64
        for example in examples
    }
    lowest, *_, highest = sorted(places.values())
    limit = min(max(share, math.nextafter(lowest, 1)), highest)
    training = [example for example in examples if places[example.json] >= limit]
    return training, [example for example in examples if places[example.json] < limit]


def shortened(problems: Sequence[Problem]) -> list[Problem]:
    """The first of them, and one that counts the others."""
    if len(problems) <= LISTED:
        return list(problems)
    further = problems[LISTED]
    detail = f"and {len(problems) - LISTED} more like it, from here on"
    return [*problems[:LISTED], further.model_copy(update={"detail": detail})]


def _similar(
    questions: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], threshold: float, *, before: bool = False
) -> dict[int, tuple[int, float]]:
    """Number of each text that is like a question, with the first such question and the Jaccard similarity.

    Two sets that are similar enough have one of their rarest members in common, so only those are looked up (prefix
    filtering: Chaudhuri, Ganti and Kaushik 2006, "A Primitive Operator for Similarity Joins in Data Cleaning").

    Args:
        questions: Their words, of which the length of the n-grams depends.
        texts: Their words.
        threshold: From 0 (excluded) to 1.
        before: Both are the same list, and only questions before the text count.
    """
    of_size: dict[int, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        of_size[_gram(len(question))].append(number)
    found: dict[int, tuple[int, float]] = {}
    for size, numbers in of_size.items():
        grams = {number: _grams(questions[number], size) for number in numbers}
        frequency = Counter(gram for members in grams.values() for gram in members)
        index: dict[str, list[int]] = defaultdict(list)
        for number, members in grams.items():
            for gram in _rarest(members, frequency, threshold):
                index[gram].append(number)
        for place, text in enumerate(texts):
            members = _grams(text, size)
            candidates = {number for gram in _rarest(members, frequency, threshold) for number in index.get(gram, ())}
            for number in sorted(candidates):
                if (before and number >= place) or (place in found and number >= found[place][0]):
                    break
                common = len(members & grams[number])
                similarity = common / (len(members) + len(grams[number]) - common)
                if similarity >= threshold:
                    found[place] = number, similarity
                    break
    return found


def _gram(length: int) -> int:
    """Words of an n-gram for a question of so many words: five from eight words on; then one word more or less, at the
    end of it, is still a similarity of 0.8."""
    return min(GRAM, length, max(2, length - 3))


def _grams(text: Sequence[str], size: int) -> set[str]:
    return {" ".join(text[start : start + size]) for start in range(len(text) - size + 1)}


def _rarest(members: set[str], frequency: Counter[str], threshold: float) -> list[str]:
    """Those of which one is in each set that is similar enough."""
    needed = math.ceil(threshold * len(members) - 1e-9)  # less what the product is too large by
    return sorted(members, key=lambda gram: (frequency[gram], gram))[: len(members) - needed + 1]


def _item(item: Item) -> str:
    return f"evaluation item {shown(item.id or '')}"


def _last(example: Example) -> str:
    return f"'{shown(example.messages[-1]['content'])}'"
