"""Child process: a variant answers the evaluation set in Foundry Local, or a checkpoint with transformers."""

import itertools
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from slmops.checkpoints import generation
from slmops.checkpoints import model as stored
from slmops.core.errors import EvaluationError
from slmops.core.values import Frozen
from slmops.evaluation.dataset import Item
from slmops.evaluation.scoring import Generated, ScoredAnswers, answer_items

LEAST_QUESTIONS = 20  # with fewer, two that flip by chance are too much for the policy's limits
MOST_SESSIONS = 4
PROMPTS_AT_ONCE = 8


class AnswersRequest(Frozen):
    folder: Path = Field(description="A home of Foundry Local, or a checkpoint.")
    foundry_id: str | None = Field(None, description="A variant that is registered there; None: it is a checkpoint.")
    items: tuple[Item, ...]
    matcher: str | None = None
    budget_s: float | None = None  # the last items are left out then
    trust_remote_code: bool = False
    sessions: int = MOST_SESSIONS  # at once, each with a cache of its own


def handle(request: AnswersRequest) -> ScoredAnswers:
    generate = _of_variant if request.foundry_id else _of_checkpoint
    end = time.monotonic() + (request.budget_s or math.inf)
    return answer_items(request.items, request.matcher, lambda: generate(request, end))


def _of_variant(request: AnswersRequest, end: float) -> list[Generated]:
    from slmops.foundry import runtime

    model = runtime.registered(request.folder, request.foundry_id or "")

    def ask(place: int, item: Item) -> Generated | None:
        if place >= LEAST_QUESTIONS and time.monotonic() > end:
            return None
        try:
            reply = runtime.ask(model, item.conversation, max_tokens=item.max_tokens)
        except runtime.Fault as error:
            raise EvaluationError(
                f"Foundry Local does not answer {item.conversation[-1]['content'][:60]!r}: {error}",
                "If it is too long for the model's context: shorten the question, lower its max_tokens, or give a "
                "larger --max-length.",
            ) from error
        return Generated(
            text=reply.text,
            finish_reason=reply.finish_reason,
            seconds=reply.total_s,
            completion_tokens=reply.completion_tokens,
        )

    model.load()
    # Several at once use all cores. Each request has a session of its own and is greedy, so the answers are the same.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, request.sessions)) as pool:
        generated = list(pool.map(ask, itertools.count(), request.items))
    model.unload()
    return list(itertools.takewhile(bool, generated))  # type: ignore[arg-type]


def _of_checkpoint(request: AnswersRequest, end: float) -> list[Generated]:
    """Greedy answers of transformers, in batches of prompts of about the same length."""
    import torch
    import transformers

    trusted = {"trust_remote_code": request.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.folder, padding_side="left", **trusted)
    model = stored.load(request.folder, **trusted)
    ends = generation.stop_tokens(request.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template(item.conversation, tokenize=False, add_generation_prompt=True)
        for item in request.items
    ]
    order = sorted(range(len(prompts)), key=lambda place: 0 if request.budget_s else len(prompts[place]))
    said: dict[int, Generated] = {}
    for first in range(0, len(order), PROMPTS_AT_ONCE):
        if first >= LEAST_QUESTIONS and time.monotonic() > end:
            break
        places = order[first : first + PROMPTS_AT_ONCE]
        # Only these: a checkpoint's own settings may sample or punish repetition.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max(request.items[place].max_tokens for place in places),
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
        )
        batch = tokenizer([prompts[p] for p in places], add_special_tokens=False, padding=True, return_tensors="pt")
        started = time.perf_counter()
        with torch.no_grad():
            generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        seconds = (time.perf_counter() - started) / len(places)
        for place, row in zip(places, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            room = row[: request.items[place].max_tokens]
            tokens = list(itertools.takewhile(lambda token: token not in ends, room))
            said[place] = Generated(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                finish_reason="stop" if len(tokens) < len(room) else "length",
                seconds=seconds,
                completion_tokens=len(tokens),
            )
    return [said[place] for place in range(len(said))]
