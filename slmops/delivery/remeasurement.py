"""A deployed version measured again on this device: its verified files, in a Foundry home of their own.

So the measurement is not disturbed when the deployed version is removed after a promotion or loaded by a service, and
it disturbs nothing itself.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.core import locks
from slmops.core.errors import BusyError, PrerequisiteError, SlmopsError, UsageError
from slmops.core.files import write_atomic
from slmops.core.settings import Settings
from slmops.core.values import Answer, Frozen, Measurement, Registration
from slmops.delivery import installed
from slmops.evaluation import answers_worker, dataset, logits_worker, quality, scoring, speed, statistics, summary
from slmops.evaluation.answers_worker import AnswersRequest
from slmops.evaluation.dataset import EvaluationSet
from slmops.evaluation.drift import PERPLEXITY, SPEED_METRICS, Recorded
from slmops.evaluation.logits_worker import LogitsRequest
from slmops.foundry.layout import stage
from slmops.foundry.register import register_folder
from slmops.foundry.versions import Installed, ModelVersion

log = logging.getLogger(__name__)


class Plan(Frozen):
    """Which parts of a recorded evaluation can be measured again here."""

    speed: bool
    questions: EvaluationSet | None
    text: str | None
    left_out: tuple[str, ...]


def plan(recorded: Recorded, here: str, settings: Settings) -> Plan:
    """What can be measured on the kind of machine ``here`` and compared with what was recorded, if anything can."""
    left_out = []
    timed = here == recorded.hardware_kind and not SPEED_METRICS.keys().isdisjoint(recorded.measurements)
    if here != recorded.hardware_kind:
        kinds = f"{recorded.hardware_kind}; not {here}"
        left_out.append(f"speed and memory, which were recorded on another kind of machine ({kinds})")
    elif not timed:
        left_out.append("speed and memory, which were not recorded")
    questions, reason = _questions(recorded, settings)
    if questions is None:
        left_out.append(f"accuracy, because {reason}")
    text = _text(recorded)
    if text is None:
        left_out.append("perplexity, because its text is gone or altered")
    if not timed and questions is None and text is None:
        fix = "Run its checkpoint again on this machine: `slmops run`."
        raise PrerequisiteError(f"Nothing can be compared: {'; '.join(left_out)}.", fix)
    return Plan(speed=timed, questions=questions, text=text, left_out=tuple(left_out))


def check_unmeasured(version: ModelVersion, recorded: Recorded) -> None:
    """Refuse, with a UsageError, a version whose speed was measured already."""
    if not SPEED_METRICS.keys().isdisjoint(recorded.measurements):
        fix = f"`slmops remeasure {version.name} --version {version.version}` measures it again."
        raise UsageError(f"{version.label} was measured already.", fix)


@contextmanager
def copied(version: Installed, name: str, settings: Settings) -> Iterator[Registration]:
    """Lay an installed version out in a Foundry home of its own, its files linked, registered and answering.

    That is :func:`home_of` the work folder ``name``, which nobody else uses now, and which is removed in the end. It is
    a BusyError if the version was removed just now, and a PrerequisiteError if its device is not here.
    """
    home = home_of(name, settings)
    original = Registration(foundry_id=version.foundry_id, path=version.folder, answer="")
    try:
        try:
            with installed.locked(version.name, settings):
                staged = stage(original, home)
        except FileNotFoundError as error:
            said = f"{version.foundry_id} was removed from this device before it could be measured."
            raise BusyError(said, "Another version was deployed in the meantime: try again.") from error
        foundry_id, log_file = version.foundry_id, settings.logs / name / f"{version.variant}.register.log"
        done = register_folder(home, staged.folder, foundry_id, foundry_id, log=log_file)
        if done.not_run is not None:
            fix = "Measure it on a device that has one."
            raise PrerequisiteError(f"{foundry_id} cannot be measured here: {done.not_run}.", fix)
        yield original.model_copy(update={"path": staged.folder, "answer": done.answer})
    finally:
        shutil.rmtree(settings.work(name), ignore_errors=True)


def home_of(name: str, settings: Settings) -> Path:
    return settings.work(name) / "foundry"


def measure_speed(copy: Registration, recorded: Recorded, name: str, settings: Settings) -> dict[str, Measurement]:
    """Speed and memory, measured as in the job: the same prompts and as many rounds."""
    variant = recorded.variant
    measured = speed.measure([(variant, copy)], name, recorded.job, settings)[variant.name]
    if isinstance(measured, SlmopsError):
        raise measured
    return summary.of_speed(measured)


def measure_perplexity(
    copy: Registration, text: str, recorded: Recorded, name: str, settings: Settings
) -> dict[str, Measurement]:
    file = settings.work(name) / "text.txt"
    write_atomic(file, text)
    with locks.machine(settings):
        log.info("%s: scoring the text", recorded.variant.name)
        context = recorded.variant.checkpoint.context_length
        request = LogitsRequest(folder=copy.path, text=file, tokens=recorded.tokens, context_length=context)
        scored = quality.in_child(logits_worker.handle, request, name, f"{recorded.variant.name}.logits", settings)
    return {PERPLEXITY: statistics.perplexity(scored.nll)}


def ask_questions(
    copy: Registration, questions: EvaluationSet, recorded: Recorded, name: str, settings: Settings
) -> tuple[Answer, ...]:
    """Answers to the job's evaluation set, judged as the job judged them."""
    items = dataset.subset(questions.items, len(recorded.answers))
    with locks.machine(settings):
        log.info("%s: answering the evaluation set", recorded.variant.name)
        home, matcher = home_of(name, settings), recorded.job.matcher
        request = AnswersRequest(folder=home, foundry_id=copy.foundry_id, items=items, matcher=matcher)
        asked = quality.in_child(answers_worker.handle, request, name, f"{recorded.variant.name}.answers", settings)
    return scoring.ask_judge(items, asked.answers, settings)


def _questions(recorded: Recorded, settings: Settings) -> tuple[EvaluationSet | None, str]:
    """The evaluation set with the recorded digest, or why there is none; first the job's copy, then the original."""
    matcher = recorded.job.matcher
    if matcher is not None and not Path(matcher.rpartition(":")[0]).expanduser().is_file():
        return None, f"its matcher {matcher} is not on this machine"
    reason = "its evaluation set is gone or altered"
    for path in dict.fromkeys((recorded.evaluation_set, recorded.job.evaluation_set)):
        try:
            found = dataset.load(path, matcher=matcher, judge=settings.judge_configured)
        except UsageError as error:
            reason = f"its evaluation set cannot be used: {error.message}"
            continue
        if found.digest == recorded.evaluation_set_digest:
            return found, ""
    return None, reason


def _text(recorded: Recorded) -> str | None:
    """The text with the recorded digest; first the job's copy, then the original."""
    for path in dict.fromkeys((recorded.text, recorded.job.perplexity_text)):
        try:
            text, digest = dataset.perplexity_text(path)
        except UsageError:
            continue
        if digest == recorded.text_digest:
            return text
    return None
