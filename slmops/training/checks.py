"""Compare training items with each other and with the evaluation set: duplicates, contradictions, leaks, the split."""

import hashlib
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from slmops.evaluation.dataset import Item
from slmops.training.examples import Example, shown
from slmops.training.values import DataProblem

GRAM_WORDS = 5  # words in an n-gram, at most
LISTED_PER_KIND = 20  # how many harmless problems of one kind are listed one by one

_OPERATORS = {"-": "−", "*": "×", "/": "÷"}
# Thai to Burmese, Khmer, kana and Chinese: scripts without spaces between words.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")


class _Marks(dict[int, str]):
    """For str.translate: punctuation becomes a space; a symbol or a character of an unspaced script becomes a word."""

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
    """The words of a text, independent of case, spaces, punctuation and encoding. Operators between digits count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    counted = re.sub(r"(?<=\d)\s*([-*/])\s*(?=\d)", lambda found: _OPERATORS[found[1]], folded)
    return counted.translate(_MARKS).split() or [folded.strip()]


def asked(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The words of the last user messages, at least five if there are: "Yes, please" does not say what was asked."""
    found: list[str] = []
    for message in reversed(messages):
        if message["role"] == "user":
            found = words(message["content"]) + found
            if len(found) >= GRAM_WORDS:
                break
    return found


def unique(examples: Iterable[Example]) -> tuple[list[Example], list[DataProblem]]:
    """Separate the examples from their exact repetitions, which are dropped."""
    kept: dict[str, Example] = {}
    problems = []
    for example in examples:
        first = kept.setdefault(example.json, example)
        if first is not example:
            problems.append(example.problem("duplicate", f"the same as {first.place}; kept once"))
    return list(kept.values()), problems


def alike(examples: Sequence[Example], threshold: float) -> list[DataProblem]:
    """Find examples that ask the same as an earlier one, or nearly, with the same answer or a different one.

    Exact repetitions have been dropped. Nearly: the Jaccard similarity of their n-grams of words is at least the
    ``threshold``.
    """
    earlier: dict[str, Example] = {}
    problems = {}
    for number, example in enumerate(examples):
        question = "\n".join(f"{turn['role']} {' '.join(words(turn['content']))}" for turn in example.messages[:-1])
        first = earlier.setdefault(question, example)
        if first is not example:
            same = words(first.messages[-1]["content"]) == words(example.messages[-1]["content"])
            answer = shown(example.messages[-1]["content"])
            detail = (
                f"the same as {first.place} except for case, spaces and punctuation"
                if same
                else f"asks the same as {first.place}, with a different answer: '{answer}'"
            )
            problems[number] = example.problem("near_duplicate", detail)
    questions = [asked(example.messages) for example in examples]
    for number, (other, similarity) in _similar(questions, questions, threshold, before=True).items():
        detail = f"asks nearly the same as {examples[other].place} (similarity {similarity:.2f})"
        problems.setdefault(number, examples[number].problem("near_duplicate", detail))
    return [problems[number] for number in sorted(problems)]


def leaks(examples: Sequence[Example], items: Sequence[Item], threshold: float) -> list[DataProblem]:
    """Find examples that ask, at any turn, the same as the evaluation set or nearly: they would make it measure memory.

    Only user messages are compared, since all items often share a system prompt. ``threshold`` is as for :func:`alike`.
    """
    names = [f"evaluation item {shown(item.id or '')}" for item in items]
    questions = [asked(item.conversation) for item in items]
    exactly = {" ".join(question): number for number, question in reversed(list(enumerate(questions)))}
    turns = [
        (number, asked(example.messages[: place + 1]))
        for number, example in enumerate(examples)
        for place, message in enumerate(example.messages)
        if message["role"] == "user"
    ]
    near = _similar(questions, [said for _, said in turns], threshold)
    problems: dict[int, DataProblem] = {}
    for place, (number, said) in enumerate(turns):
        if (other := exactly.get(" ".join(said))) is not None:
            problems.setdefault(number, examples[number].problem("leak", f"asks the same as {names[other]}"))
        elif place in near:
            other, similarity = near[place]
            detail = f"asks nearly the same as {names[other]} (similarity {similarity:.2f})"
            problems.setdefault(number, examples[number].problem("near_leak", detail))
    return list(problems.values())


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split at least two different examples into training and, about ``share`` of them, validation; neither is empty.

    The side of an example depends on its content and the seed only, so adding data does not move the earlier ones.
    """
    places = {
        example.json: int(hashlib.sha256(f"{seed} {example.json}".encode()).hexdigest()[:16], 16) / 2**64
        for example in examples
    }
    lowest, *_, highest = sorted(places.values())
    limit = min(max(share, math.nextafter(lowest, 1)), highest)
    training = [example for example in examples if places[example.json] >= limit]
    return training, [example for example in examples if places[example.json] < limit]


def shortened(problems: Sequence[DataProblem]) -> list[DataProblem]:
    """The first problems, and one that counts the rest."""
    if len(problems) <= LISTED_PER_KIND:
        return list(problems)
    detail = f"and {len(problems) - LISTED_PER_KIND} more like this, from here on"
    return [*problems[:LISTED_PER_KIND], problems[LISTED_PER_KIND].model_copy(update={"detail": detail})]


def _similar(
    questions: Sequence[Sequence[str]], texts: Sequence[Sequence[str]], threshold: float, *, before: bool = False
) -> dict[int, tuple[int, float]]:
    """Map the number of each text that resembles a question to the first such question and the Jaccard similarity.

    Two sets that are similar enough share one of their rarest members, so only these are looked up (prefix
    filtering: Chaudhuri, Ganti and Kaushik 2006, "A Primitive Operator for Similarity Joins in Data Cleaning").

    The number of words of a question sets the length of its n-grams. With ``before``, both lists are the same, and only
    questions before the text count.
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
    """Words per n-gram: five from eight words on, where a word more at the end leaves a similarity of 0.8."""
    return min(GRAM_WORDS, length, max(2, length - 3))


def _grams(text: Sequence[str], size: int) -> set[str]:
    return {" ".join(text[start : start + size]) for start in range(len(text) - size + 1)}


def _rarest(members: set[str], frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest members. Every set that is similar enough contains at least one of them."""
    needed = math.ceil(threshold * len(members) - 1e-9)  # the product may be too large by a rounding error
    return sorted(members, key=lambda gram: (frequency[gram], gram))[: len(members) - needed + 1]
