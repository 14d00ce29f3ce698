"""Print what int4-calibrated gains over int4 on a fine-tuned checkpoint, on text that it was not calibrated with.

    python benchmarks/calibrated.py [CHECKPOINT]

The checkpoint is the one that `slmops retrain --demo` makes, which takes some minutes; or give the folder `merged` of
one. Its text for int4-calibrated is what it was trained on: each conversation in its chat template. It is compared on
the held-out tickets with their answers, and on a general text. Flips are answers to the held-out tickets that are right
where the checkpoint's in transformers are wrong, or the other way round.
"""

import json
import sys
import tempfile
from pathlib import Path

import peers
from conversion import not_at_all
from transformers import AutoTokenizer

from slmops.checkpoints import source
from slmops.core import machine
from slmops.core.files import write_atomic
from slmops.core.job import BASELINE, Job
from slmops.core.settings import Settings
from slmops.core.values import Answer
from slmops.evaluation import answers_worker, dataset
from slmops.evaluation.answers_worker import AnswersRequest
from slmops.evaluation.dataset import Item
from slmops.training import data, finetune, sources
from slmops.training.values import Retrain, TrainingData

NAMES = ["int4", "int4-calibrated"]
EPOCHS = 2  # of the retraining demo


def main(folder: str | None = None) -> None:
    """Train, convert, compare, print."""
    here = machine.hardware()
    print(f"{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}")
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(home=Path(scratch) / "home")
        prepared, tuned = train(settings, Path(folder) if folder else None)
        checkpoint = source.resolve(Job(model=str(tuned)), settings, download=not_at_all)
        render = AutoTokenizer.from_pretrained(tuned).apply_chat_template
        text = settings.home / "calibration.txt"
        write_atomic(text, "".join(render(said, tokenize=False) for said in conversations(prepared.train)))
        held_out = held_out_items(prepared)
        tickets = "".join(render([*item.conversation, answer(item)], tokenize=False) for item in held_out)
        job = Job(model=str(tuned), precision=NAMES, baseline=BASELINE, calibration_text=text)
        made = peers.registered(checkpoint, job, settings)
        contest = peers.Contest(checkpoint, {name: one.path for name, one in made.items()}, [], Path(), Path(scratch))
        on_tickets, in_general = contest.quality(tickets), contest.quality(dataset.perplexity_text(None)[0])
        reference = answers(contest, AnswersRequest(folder=tuned, items=held_out))
        rows = {}
        for name, one in made.items():
            asked = AnswersRequest(folder=settings.foundry, foundry_id=one.foundry_id, items=held_out)
            rows[name] = (
                {"MB": on_tickets[name]["MB"]}
                | {f"{key}, tickets": on_tickets[name][key] for key in ("KL mean", "top-1")}
                | compared(answers(contest, asked), reference)
                | {f"{key}, general": in_general[name][key] for key in ("KL mean", "top-1")}
            )
        right = sum(bool(one.correct) for one in reference)
        print(f"{len(held_out)} held-out tickets, of which the checkpoint answers {right} right\n")
        peers.print_rows(rows)


def train(settings: Settings, tuned: Path | None) -> tuple[TrainingData, Path]:
    """The demo's checked training data, and the checkpoint that was made of it."""
    request = Retrain(model="demo", data="demo", training={"epochs": EPOCHS})
    base = source.resolve(Job(model=request.model), Settings(), download=not_at_all)
    fetched = sources.fetch(request, settings, download=not_at_all, dataset=lambda _name: [])
    prepared = data.prepare(fetched, request, base, settings, "calibrated")
    if tuned is None:
        made = finetune.finetune(base, prepared, request.training, settings, "calibrated", lambda _point: None)
        tuned = made.merged
    return prepared, tuned


def conversations(file: Path) -> list[list[dict[str, str]]]:
    """The messages of each item."""
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]


def held_out_items(prepared: TrainingData) -> tuple[Item, ...]:
    """The evaluation set, and what the training was validated with, as questions of the same kind."""
    items = dataset.load(prepared.evaluation).items
    validation = [
        items[0].model_dump(by_alias=True)
        | {"messages": said[:-1], "expected": said[-1]["content"], "id": f"validation-{number}"}
        for number, said in enumerate(conversations(prepared.validation))
    ]
    return items + tuple(map(Item.model_validate, validation))


def answer(item: Item) -> dict[str, str]:
    """What should have been said."""
    return {"role": "assistant", "content": item.expected}


def answers(contest: peers.Contest, request: AnswersRequest) -> tuple[Answer, ...]:
    """What a model says."""
    return contest.call(answers_worker.handle, request)[0].answers


def compared(own: tuple[Answer, ...], reference: tuple[Answer, ...]) -> dict[str, str]:
    """How many are right, are right where the reference is wrong or the other way round, and differ at all."""
    pairs = list(zip(own, reference, strict=True))
    return {
        "right": f"{sum(bool(one.correct) for one in own)}",
        "flips": f"{sum(one.correct != other.correct for one, other in pairs)}",
        "other answers": f"{sum(one.answer != other.answer for one, other in pairs)}",
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
