"""Child process: a checkpoint answers the evaluation set with transformers."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from slmops.checkpoints import generation
from slmops.core.values import Frozen
from slmops.evaluation.dataset import Item
from slmops.evaluation.scoring import Generated, ScoredAnswers, answer_items
from slmops.processes import child

PROMPTS_AT_ONCE = 8


class CheckpointAnswersRequest(Frozen):
    """A checkpoint and what it is asked."""

    folder: Path
    items: tuple[Item, ...]
    matcher: str | None = None


def handle(request: CheckpointAnswersRequest) -> ScoredAnswers:
    """Answer, and score what needs no judging model.

    Raises:
        UsageError: The user's matcher cannot be loaded.
    """
    return answer_items(request.items, request.matcher, lambda: _generate(request))


def _generate(request: CheckpointAnswersRequest) -> list[Generated]:
    """Greedy answers, in batches of prompts of about the same length."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(request.folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(request.folder, dtype=torch.float32).eval()
    ends = generation.stop_tokens(request.folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [
        tokenizer.apply_chat_template(item.conversation, tokenize=False, add_generation_prompt=True)
        for item in request.items
    ]
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    said: dict[int, Generated] = {}
    for first in range(0, len(order), PROMPTS_AT_ONCE):
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
    return [said[place] for place in range(len(prompts))]


if __name__ == "__main__":
    child.main(CheckpointAnswersRequest, handle)
