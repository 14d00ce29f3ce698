"""How well a checkpoint answers an evaluation set, before anything is converted."""

from __future__ import annotations

import shutil
from pathlib import Path

from slmops.core import locks
from slmops.core.errors import EvaluationError
from slmops.core.settings import Settings
from slmops.core.values import Answer, Measurement
from slmops.evaluation import dataset, scoring, statistics
from slmops.processes import children
from slmops.training import answers_worker
from slmops.training.finetune import OFFLINE_ENVIRONMENT


def answer_with_checkpoint(
    folder: Path, evaluation_set: Path, matcher: str | None, name: str, label: str, settings: Settings
) -> tuple[Measurement, tuple[Answer, ...]]:
    """Have the checkpoint in ``folder`` answer, greedily and in fp32.

    ``label`` says which of the model's checkpoints it is, for the name of the log.

    Returns:
        Accuracy over the items that could be judged, with its interval, and the judged answers.

    Raises:
        EvaluationError: The checkpoint does not answer, or no answer could be judged.
        UsageError: The evaluation set or the matcher is bad.
    """
    items = dataset.load(evaluation_set, matcher=matcher, judge=settings.judge_configured).items
    work = settings.work(name) / f"{label}-answers"
    log = settings.logs / name / f"{label}.answers.log"
    log.unlink(missing_ok=True)
    with locks.machine(settings):
        result, _ = children.call(
            "slmops.training.answers_worker",
            answers_worker.CheckpointAnswersRequest(folder=folder, items=items, matcher=matcher),
            scoring.ScoredAnswers,
            work=work,
            log=log,
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
            env=OFFLINE_ENVIRONMENT,
        )
    shutil.rmtree(work)
    answers = scoring.ask_judge(items, result.answers, settings)
    judged = [answer.correct for answer in answers if answer.correct is not None]
    if not judged:
        raise EvaluationError(
            f"None of the {len(answers)} answers could be judged: {answers[0].reason}",
            "Fix the evaluation set, the matcher or the judging model.",
        )
    return statistics.of_proportion(sum(judged), len(judged)), answers
