"""Child process: a variant answers the evaluation set in Foundry Local, or a checkpoint with transformers."""

import itertools
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from slmops.checkpoints import abilities, generation
from slmops.checkpoints import model as stored
from slmops.checkpoints.abilities import Pair
from slmops.core.errors import EvaluationError
from slmops.core.values import Frozen
from slmops.evaluation import matchers
from slmops.evaluation.dataset import Item
from slmops.evaluation.edge_cases import INVALID_ARGUMENT
from slmops.evaluation.scoring import Generated, ScoredAnswers, answer_items
from slmops.foundry import layout

LEAST_QUESTIONS = 20  # with fewer, two that flip by chance are too much for the policy's limits
MOST_SESSIONS = 4
PROMPTS_AT_ONCE = 8
INVALID_CALL = "invalid_tool_call"  # why an answer ended


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
        started = time.monotonic()
        try:
            reply = runtime.ask(model, **item.request)
        except runtime.Fault as error:
            if error.error_code != INVALID_ARGUMENT and layout.CALL_REFUSED.search(str(error)):
                seconds = time.monotonic() - started
                return Generated(text="", finish_reason=INVALID_CALL, seconds=seconds, completion_tokens=0)
            raise EvaluationError(
                f"Foundry Local does not answer {item.conversation[-1]['content'][:60]!r}: {error}",
                "If it is too long for the model's context: shorten the question, lower its max_tokens, or give a "
                "larger --max-length.",
            ) from error
        return Generated(
            text=matchers.as_answer(reply.tool_calls) if reply.tool_calls else reply.text,
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
    able = abilities.derive(request.folder)
    prompts = [
        tokenizer.apply_chat_template(
            item.conversation,
            tools=item.request.get("tools"),
            tokenize=False,
            add_generation_prompt=True,
            **item.chat_template_kwargs or {},
        )
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
            shown = without_thoughts(tokens, able.reasoning, prompts[place])
            calls = calls_of(tokenizer.decode(shown), able.tools) if request.items[place].tools else []
            text = tokenizer.decode(shown, skip_special_tokens=True)
            if shown != tokens:
                text = text.removeprefix("\n")  # as the runtime does
            said[place] = Generated(
                text=matchers.as_answer(calls) if calls else text,
                finish_reason="stop" if len(tokens) < len(room) else "length",
                seconds=seconds,
                completion_tokens=len(tokens),
            )
    return [said[place] for place in range(len(said))]


def without_thoughts(tokens: list[int], pair: Pair | None, prompt: str) -> list[int]:
    """What a checkpoint answers after its thoughts, which the end of its prompt may have begun."""
    if pair is None:
        return tokens
    opening, closing = pair.ids
    if closing in tokens:
        return tokens[tokens.index(closing) + 1 :]
    return [] if opening in tokens or prompt.rstrip().endswith(pair.opening) else tokens


def calls_of(text: str, pair: Pair | None) -> list[dict[str, Any]]:
    """The tool calls in a checkpoint's answer, an object each or a list of them; none if one is not well formed."""
    if pair is None:
        return []
    between = f"{re.escape(pair.opening)}(.*?){re.escape(pair.closing)}"
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        blocks = [matchers.parse_json(block) for block in re.findall(between, text, re.DOTALL)]
        calls = [one for block in blocks for one in (block if isinstance(block, list) else [block])]
        return [{"name": one["name"], "arguments": one.get("arguments", one.get("parameters"))} for one in calls]
    return []
