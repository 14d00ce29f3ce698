"""Child process: a registered variant answers the evaluation set in Foundry Local."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slmops.core.values import Frozen
from slmops.evaluation.dataset import Item
from slmops.evaluation.scoring import Generated, ScoredAnswers, answer_items
from slmops.processes import child

MOST_SESSIONS = 4


class AnswersRequest(Frozen):
    home: Path
    foundry_id: str
    items: tuple[Item, ...]
    matcher: str | None = None


def handle(request: AnswersRequest) -> ScoredAnswers:
    return answer_items(request.items, request.matcher, lambda: _generate(request))


def _generate(request: AnswersRequest) -> list[Generated]:
    from slmops.foundry import runtime

    model = runtime.registered(request.home, request.foundry_id)

    def ask(item: Item) -> Generated:
        reply = runtime.ask(model, item.conversation, max_tokens=item.max_tokens)
        return Generated(
            text=reply.text,
            finish_reason=reply.finish_reason,
            seconds=reply.total_s,
            completion_tokens=reply.completion_tokens,
        )

    model.load()
    # Several at once use all cores. Each request has a session of its own and is greedy, so the answers are the same.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_SESSIONS)) as pool:
        generated = list(pool.map(ask, request.items))
    model.unload()
    return generated


if __name__ == "__main__":
    child.main(AnswersRequest, handle)
