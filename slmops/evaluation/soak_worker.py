"""Child process: many requests to a registered variant, one after the other, and the memory after each."""

from __future__ import annotations

import faulthandler
import json
from pathlib import Path
from typing import Any

import psutil

from slmops.core.values import Frozen
from slmops.processes import child

LENGTHS = [32, 64, 128, 256]
"""Tokens of the prompts, in turn; a conversation of three questions ends each turn."""
SOAK_TOKENS = 16
REQUEST_LIMIT_S = 300.0
PROGRESS = "soak: "
EVERY = 50


class SoakRequest(Frozen):
    home: Path
    foundry_id: str
    warm_up: int
    requests: int


class SoakSeries(Frozen):
    """Private memory of the process in KB (10^3 bytes) after each request, without the warm-up."""

    memory_kb: tuple[float, ...]


def handle(request: SoakRequest) -> SoakSeries:
    from slmops.foundry import runtime

    model = runtime.registered(request.home, request.foundry_id)
    talks = conversations(Path(model.get_path()))
    model.load()
    process = psutil.Process()
    memory = []
    for number in range(-request.warm_up, request.requests):
        # Renewed by each request. If native code hangs, a thread that needs no Python ends the process.
        faulthandler.dump_traceback_later(REQUEST_LIMIT_S, exit=True)
        runtime.ask(model, talks[number % len(talks)], max_tokens=SOAK_TOKENS)
        if number < 0:
            continue
        memory.append(private_kb(process))
        if (number + 1) % EVERY == 0:
            print(f"{PROGRESS}{number + 1} of {request.requests} requests, {memory[-1] / 1e3:.0f} MB", flush=True)
    faulthandler.cancel_dump_traceback_later()
    return SoakSeries(memory_kb=tuple(memory))


def conversations(folder: Path) -> list[list[dict[str, str]]]:
    """What to ask, in turn: a message of each length that fits the context, then several in one conversation."""
    from slmops.evaluation import prompts
    from slmops.foundry.layout import GENAI_CONFIG

    context = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))["model"]["context_length"]
    # At most a third of the context each, because the conversation must fit too.
    texts = list(prompts.of_lengths(LENGTHS, context // 3 - SOAK_TOKENS, folder).values())
    talks = [[{"role": "user", "content": text}] for text in texts]
    answer = {"role": "assistant", "content": "I see."}
    first, second = talks[0], talks[-1]
    return [*talks, [*first, answer, *second, answer, *first]]


def private_kb(process: psutil.Process) -> float:
    """Memory of this process alone, in KB: on Linux, anonymous pages, in memory (resident less shared) or swapped out.

    Proportional and unique set sizes jump by tens of MB when another process with the same libraries starts or ends.
    """
    memory: Any = process.memory_full_info()
    if hasattr(memory, "shared"):
        return float(memory.rss - memory.shared + memory.swap) / 1e3
    return float(memory.uss) / 1e3


if __name__ == "__main__":
    child.main(SoakRequest, handle)
