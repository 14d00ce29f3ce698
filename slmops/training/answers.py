"""How well a checkpoint answers an evaluation set, before anything is converted."""

from pathlib import Path

from slmops.core import locks
from slmops.core.errors import EvaluationError
from slmops.core.settings import Settings
from slmops.core.values import Answer, Measurement
from slmops.evaluation import answers_worker, dataset, quality, scoring, statistics
from slmops.evaluation.answers_worker import AnswersRequest
from slmops.training.finetune import OFFLINE_ENVIRONMENT


def answer_with_checkpoint(
    folder: Path, evaluation_set: Path, matcher: str | None, name: str, label: str, settings: Settings
) -> tuple[Measurement, tuple[Answer, ...]]:
    """Have a checkpoint answer, greedily and in fp32: its accuracy over the answers that could be judged, and all.

    ``label`` says which of the model's checkpoints it is. It is an EvaluationError if no answer could be judged.
    """
    items = dataset.load(evaluation_set, matcher=matcher, judge=settings.judge_configured).items
    (settings.logs / name / f"{label}.answers.log").unlink(missing_ok=True)
    request = AnswersRequest(folder=folder, items=items, matcher=matcher)
    with locks.machine(settings):
        log = f"{label}.answers"
        asked = quality.in_child(answers_worker.handle, request, name, log, settings, OFFLINE_ENVIRONMENT)
    answers = scoring.ask_judge(items, asked.answers, settings)
    judged = [answer.correct for answer in answers if answer.correct is not None]
    if not judged:
        raise EvaluationError(
            f"None of the {len(answers)} answers could be judged: {answers[0].reason}",
            "Fix the evaluation set, the matcher or the judging model.",
        )
    return statistics.of_proportion(sum(judged), len(judged)), answers


def worse(base: Measurement, finetuned: Measurement) -> str | None:
    """Say why a fine-tuned checkpoint of this accuracy is not worth converting; None if it is."""
    if finetuned.value >= base.value:
        return None
    return (
        f"The fine-tuning made the model worse: accuracy {base.value:.2f} before it, {finetuned.value:.2f} after it. "
        "The champion stays."
    )
