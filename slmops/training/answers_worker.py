"""Child process: a Hugging Face checkpoint answers the evaluation set, and the answers are judged."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from slmops.core.values import Answer, Frozen
from slmops.evaluation import matchers
from slmops.evaluation.dataset import Item
from slmops.processes import child

BATCH = 8


class Request(Frozen):
    """A checkpoint and the questions."""

    folder: Path
    items: tuple[Item, ...]
    matcher: str | None = None


class Result(Frozen):
    """The judged answers, in the order of the items."""

    answers: tuple[Answer, ...]


class Reply(Frozen):
    """What was generated."""

    text: str
    finish_reason: str
    seconds: float
    completion_tokens: int


def handle(request: Request) -> Result:
    """Answer and judge.

    Raises:
        UsageError: The user's matcher cannot be loaded.
    """
    function = matchers.load_function(request.matcher) if request.matcher else None
    answers = []
    for item, reply in zip(request.items, _replies(request), strict=True):
        judgement = matchers.judge(item, reply.text, function)
        answers.append(
            Answer(
                id=item.id or "",
                category=item.category,
                prompt=item.conversation[-1]["content"],
                expected=item.expected,
                answer=reply.text,
                correct=judgement.correct,
                score=judgement.score,
                reason=judgement.reason,
                format_valid=item.format_valid(reply.text),
                **reply.model_dump(exclude={"text"}),
            )
        )
    return Result(answers=tuple(answers))


def _replies(request: Request) -> list[Reply]:
    """Greedy answers, in batches of prompts that are about as long."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(request.folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(request.folder, dtype=torch.float32).eval()
    ends = _ends(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template(item.conversation, tokenize=False, add_generation_prompt=True)
        for item in request.items
    ]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    replies: dict[int, Reply] = {}
    for first in range(0, len(order), BATCH):
        places = order[first : first + BATCH]
        # Only these: a checkpoint's own settings may sample or punish repetition.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=max(request.items[place].max_tokens for place in places),
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        batch = tokenizer([prompts[p] for p in places], add_special_tokens=False, padding=True, return_tensors="pt")
        started = time.perf_counter()
        with torch.no_grad():
            generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        seconds = (time.perf_counter() - started) / len(places)
        for place, row in zip(places, generated[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            tokens, ended = _cut(row, ends, request.items[place].max_tokens)
            replies[place] = Reply(
                text=tokenizer.decode(tokens, skip_special_tokens=True),
                finish_reason="stop" if ended else "length",
                seconds=seconds,
                completion_tokens=len(tokens),
            )
    return [replies[place] for place in range(len(prompts))]


def _ends(*said: Any) -> list[int]:
    """Tokens that end an answer: those that the checkpoint names, and the one that its tokenizer names."""
    return sorted({end for ends in said for end in (ends if isinstance(ends, list) else [ends]) if end is not None})


def _cut(row: list[int], ends: list[int], most: int) -> tuple[list[int], bool]:
    """The answer's own tokens, at most so many, and whether it came to its end within them."""
    end = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: min(end, most)], end < min(most, len(row))


if __name__ == "__main__":
    child.main(Request, handle)
