"""Child process: a registered variant under load in Foundry Local's runtime: times, memory, CPU, answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

from slmops import child
from slmops.errors import EvaluationError
from slmops.evaluation.dataset import Item
from slmops.models import Answer, Frozen

# Long enough for the sampler in the parent to see the loaded model at rest.
HOLD_S = 0.6
OUTPUT_TOKENS = 32


class Request(Frozen):
    """What to measure."""

    home: Path
    foundry_id: str
    prompts: tuple[str, ...]
    repetitions: int
    items: tuple[Item, ...]


class Timed(Frozen):
    """One timed request; seconds from its start."""

    prompt: int
    repetition: int
    prompt_tokens: int
    completion_tokens: int
    first_s: float
    last_s: float
    total_s: float


class Result(Frozen):
    """Raw figures; :mod:`slmops.evaluation.evaluate` makes metrics of them."""

    load_s: float
    loaded_from: float
    loaded_to: float
    cpu_percent: float
    timed: tuple[Timed, ...]
    answers: tuple[Answer, ...]


def handle(request: Request) -> Result:
    """Load, warm up with each prompt, time each prompt in rounds, then answer the evaluation set.

    Raises:
        EvaluationError: The model is not registered, or answers none of the prompts.
    """
    from slmops.foundry import runtime

    running = runtime.manager(request.home)
    model = runtime.local_catalog(running).get_model_variant(request.foundry_id)
    if model is None:
        raise EvaluationError(f"{request.foundry_id} is not registered in Foundry Local at {request.home}.")
    started = time.perf_counter()
    model.load()
    load_s = time.perf_counter() - started
    loaded_from = time.monotonic()
    time.sleep(HOLD_S)
    loaded_to = time.monotonic()
    conversations = [[{"role": "user", "content": prompt}] for prompt in request.prompts]
    for conversation in conversations:
        runtime.ask(model, conversation, max_tokens=OUTPUT_TOKENS)
    timed: list[Timed] = []
    cpu, wall = _cpu_s(), time.perf_counter()
    for repetition in range(request.repetitions):
        for number, conversation in enumerate(conversations):
            reply = runtime.ask(model, conversation, max_tokens=OUTPUT_TOKENS)
            if reply.first_s is None:
                continue
            timed.append(
                Timed(
                    prompt=number,
                    repetition=repetition,
                    prompt_tokens=reply.prompt_tokens,
                    completion_tokens=reply.completion_tokens,
                    first_s=reply.first_s,
                    last_s=reply.last_s,
                    total_s=reply.total_s,
                )
            )
    cpu_percent = 100 * (_cpu_s() - cpu) / (time.perf_counter() - wall)
    answers = []
    for item in request.items:
        reply = runtime.ask(model, item.conversation, max_tokens=item.max_tokens)
        answers.append(
            Answer(
                id=item.id or "",
                category=item.category,
                prompt=item.conversation[-1]["content"],
                expected=item.expected,
                answer=reply.text,
                correct=item.correct(reply.text),
                finish_reason=reply.finish_reason,
                seconds=reply.total_s,
                completion_tokens=reply.completion_tokens,
            )
        )
    model.unload()
    return Result(
        load_s=load_s,
        loaded_from=loaded_from,
        loaded_to=loaded_to,
        cpu_percent=cpu_percent,
        timed=tuple(timed),
        answers=tuple(answers),
    )


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system


if __name__ == "__main__":
    child.main(Request, handle)
