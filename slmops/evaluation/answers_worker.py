"""Child process: a registered variant answers the evaluation set, and the answers are judged."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmops.core.values import Answer, Frozen
from slmops.evaluation import matchers
from slmops.evaluation.dataset import Item
from slmops.processes import child

MOST_SESSIONS = 4


class Request(Frozen):
    """A registered variant and the questions."""

    home: Path
    foundry_id: str
    items: tuple[Item, ...]
    matcher: str | None = None


class Result(Frozen):
    """The judged answers, in the order of the items."""

    answers: tuple[Answer, ...]


def handle(request: Request) -> Result:
    """Answer and judge.

    Raises:
        EvaluationError: The model is not registered.
        UsageError: The user's matcher cannot be loaded.
    """
    from slmops.foundry import runtime

    function = matchers.load_function(request.matcher) if request.matcher else None
    model = runtime.registered(request.home, request.foundry_id)
    model.load()
    # Several at once use all cores. Each request has a session of its own and is greedy, so the answers are the same.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_SESSIONS)) as pool:
        replies = list(
            pool.map(lambda item: runtime.ask(model, item.conversation, max_tokens=item.max_tokens), request.items)
        )
    model.unload()
    answers = []
    for item, reply in zip(request.items, replies, strict=True):
        judgement = matchers.judge(item, reply.text, function)
        answers.append(
            Answer(
                id=item.id or "",
                category=item.category,
                prompt=item.conversation[-1]["content"],
                expected=item.expected or "",
                answer=reply.text,
                correct=judgement.correct,
                score=judgement.score,
                reason=judgement.reason,
                format_valid=item.format_valid(reply.text),
                finish_reason=reply.finish_reason,
                seconds=reply.total_s,
                completion_tokens=reply.completion_tokens,
            )
        )
    return Result(answers=tuple(answers))


if __name__ == "__main__":
    child.main(Request, handle)
