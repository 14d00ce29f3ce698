"""From generated text to scored answers: each item's own matcher judges, the judging model last and side by side."""

import threading
import time
from collections.abc import Callable, Sequence

from slmops.core.settings import Settings
from slmops.core.values import Answer, Frozen
from slmops.evaluation import judge, matchers
from slmops.evaluation.dataset import Item
from slmops.evaluation.matchers import Function, Judgement

JUDGED_AT_ONCE = 4
TO_BE_JUDGED = "the judge has not been asked"


class Generated(Frozen):
    text: str
    finish_reason: str
    seconds: float
    completion_tokens: int


class ScoredAnswers(Frozen):
    """Answers in the order of their items."""

    answers: tuple[Answer, ...]


def judgement(item: Item, text: str, function: Function | None, settings: Settings) -> Judgement:
    """Judge what a model said as its item asks: by the user's function for ``python``, by a model for ``judge``."""
    return judge.score(item, text, settings) if item.match == "judge" else _matched(item, text, function)


def answer_items(
    items: Sequence[Item], matcher: str | None, generate: Callable[[], Sequence[Generated]]
) -> ScoredAnswers:
    """Have a model answer and score what matchers can score; :func:`ask_judge` does the rest.

    A model that runs out of time leaves the last items out. It is a UsageError, before ``generate`` runs the model, if
    the user's ``matcher`` (FILE.py:FUNCTION) cannot be loaded.
    """
    function = matchers.load_function(matcher) if matcher else None
    answers, generated = [], generate()
    for item, said in zip(items[: len(generated)], generated, strict=True):
        judged = Judgement(reason=TO_BE_JUDGED) if item.match == "judge" else _matched(item, said.text, function)
        answers.append(
            Answer(
                id=item.id or "",
                category=item.category,
                prompt=item.conversation[-1]["content"],
                expected=item.expected,
                answer=said.text,
                format_valid=item.format_valid(said.text),
                **said.model_dump(exclude={"text"}),
                **judged.model_dump(),
            )
        )
    return ScoredAnswers(answers=tuple(answers))


def ask_judge(items: Sequence[Item], answers: Sequence[Answer], settings: Settings) -> tuple[Answer, ...]:
    """Have the judging model score the answers to items with match ``judge``, a few side by side.

    Call it without the machine lock. What it does not score within ``evaluation_timeout_s`` in all stays unscored.
    """
    scored = list(answers)
    places = [place for place, item in enumerate(items) if item.match == "judge"]
    waiting = iter(places)  # shared: each goes to one thread
    late = f"the judge did not get to it within {settings.evaluation_timeout_s:g} s"
    for place in places:
        scored[place] = answers[place].model_copy(update={"reason": late})
    deadline = time.monotonic() + settings.evaluation_timeout_s

    def work() -> None:
        for place in waiting:
            if time.monotonic() >= deadline:
                return
            judged = judge.score(items[place], answers[place].answer, settings)
            scored[place] = answers[place].model_copy(update=judged.model_dump())

    # Daemons: whoever interrupts the run does not wait for a judge that does not answer.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(JUDGED_AT_ONCE, len(places)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return tuple(scored)


def _matched(item: Item, text: str, function: Function | None) -> Judgement:
    expected = item.expected
    match item.match:
        case "contains":
            return Judgement.of(expected.casefold() in text.casefold())
        case "exact":
            return Judgement.of(expected.strip() == text.strip())
        case "regex":
            return Judgement.of(matchers.regex(expected, text))
        case "numeric":
            return Judgement.of(matchers.numeric(expected, text, item.tolerance or 0.0))
        case "json_schema":
            return matchers.json_schema(item.json_schema or {}, expected, text)
        case "rouge_l":
            return Judgement.graded(matchers.rouge_l(expected, text), item.threshold)
        case "f1":
            return Judgement.graded(matchers.f1(expected, text), item.threshold)
        case "python" if function is not None:
            return matchers.python(function, expected, text, item.threshold)
        case _:
            return Judgement(reason="no function was given")
