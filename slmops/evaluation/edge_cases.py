"""Edge cases: how the runtime handles conversations that nobody would send on purpose, with one variant.

The variant is staged with a short context, to make the cases at its end as quick as the others. A case that takes the
runtime down, or never ends, fails; the rest goes on in a new process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from slmops.core.errors import EvaluationError
from slmops.core.settings import Settings
from slmops.core.values import CaseOutcome, Frozen, Measurement, Registration, Variant
from slmops.evaluation import edge_worker, prompts
from slmops.evaluation.edge_worker import CaseProgress, EdgeCase, Expected
from slmops.foundry.layout import Staged, stage
from slmops.processes import children

CONTEXT = 256
"""Tokens beyond those of the chat template; less if the model has less."""
CASE_LIMIT_S = 120.0
REFUSAL_LIMIT_S = 5.0
"""What does not fit must be refused at once, not after the work."""

_EXPECTED: dict[Expected, str] = {
    "answered or refused": "empty whitespace nul_in_text assistant_first",
    "refused": "longer_than_context one_beyond_the_context repeated_tokens lone_surrogate",
    "answered": "exactly_the_context own_special_tokens foreign_markers emoji right_to_left greedy_twice "
    "ordinary_question",  # the last of all: it shows whether the runtime still answers
}
EDGE_CASES = tuple(EdgeCase(id=name, expected=end) for end, names in _EXPECTED.items() for name in names.split())
KNOWN_DEFECTS = {("nul_in_text", "cut")}
"""What foundry-local-sdk 2.2.1 does wrong with every model, so not the variant's fault. Remove what a release fixes."""


def run(
    variant: Variant,
    registration: Registration,
    name: str,
    settings: Settings,
    *,
    cases: Sequence[EdgeCase] = EDGE_CASES,
    limit_s: float = CASE_LIMIT_S,
) -> tuple[CaseOutcome, ...]:
    """Put the cases to a staged copy of a variant, each for ``limit_s`` seconds at most; one outcome for each case.

    The caller holds the machine lock. EvaluationError: the model does not load, or all cases together take too long.
    """
    work = settings.work(name) / f"{variant.name}-edge"
    log = settings.logs / name / f"{variant.name}.edge.log"
    deadline = time.monotonic() + settings.evaluation_timeout_s
    progress = work / "progress.jsonl"
    progress.unlink(missing_ok=True)
    try:
        context = CONTEXT + prompts.counter(registration.path)("")
        staged = stage(registration, work / "foundry", context_length=context)
        seen: dict[str, CaseProgress] = {}
        while left := tuple(case for case in cases if case.id not in seen):
            died = _go_through(left, staged, progress, log, limit_s, deadline)
            known = seen.keys()
            seen = {line.id: line for line in _lines(progress) if line.outcome}
            if died is not None and (seen.keys() == known or time.monotonic() > deadline):
                raise died
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return tuple(_judge(case, seen[case.id]) for case in cases)


def _go_through(
    cases: tuple[EdgeCase, ...], staged: Staged, progress: Path, log: Path, limit_s: float, deadline: float
) -> EvaluationError | None:
    """Go through the cases in one process. If it dies, that is the outcome of the running case."""
    try:
        children.call(
            "slmops.evaluation.edge_worker",
            edge_worker.EdgeCaseRequest(**staged.model_dump(), cases=cases, limit_s=limit_s, progress=progress),
            Frozen,
            work=progress.parent,
            log=log,
            timeout_s=max(deadline - time.monotonic(), 0.0),
            error=EvaluationError,
        )
    except EvaluationError as error:
        ended = time.monotonic()
        running = _lines(progress)[-1:]
        if running and running[0].outcome is None and ended <= deadline:
            seconds = ended - running[0].at
            hung = seconds >= limit_s
            detail = f"It took longer than {limit_s:g} s." if hung else error.message[:300]
            end = {"outcome": "hung" if hung else "crashed", "detail": detail, "seconds": seconds}
            edge_worker.write(progress, running[0].model_copy(update=end))
        return error
    return None


def _lines(progress: Path) -> list[CaseProgress]:
    text = progress.read_text(encoding="utf-8") if progress.exists() else ""
    return [CaseProgress.model_validate_json(line) for line in text.splitlines()]


def _judge(case: EdgeCase, seen: CaseProgress) -> CaseOutcome:
    outcome, detail = seen.outcome or "", seen.detail
    passed = outcome in case.expected.split(" or ")
    if passed and case.expected == "refused" and seen.seconds > REFUSAL_LIMIT_S:
        passed, detail = False, f"Only after {seen.seconds:.0f} s: {detail}"
    if (case.id, outcome) in KNOWN_DEFECTS:
        detail += "; a known defect of the runtime with any variant, not counted"
    return CaseOutcome(id=case.id, expected=case.expected, outcome=outcome, passed=passed, detail=detail)


def measurement(cases: Sequence[CaseOutcome]) -> Measurement:
    """Share of passed cases, from 0 to 1; :data:`KNOWN_DEFECTS` are left out and named in the note."""
    counted = [case for case in cases if (case.id, case.outcome) not in KNOWN_DEFECTS]
    share = Measurement.exact(sum(case.passed for case in counted) / len(counted), "1", samples=len(counted))
    left_out = [case.id for case in cases if case not in counted]
    return share.model_copy(update={"note": f"not counted: {', '.join(left_out)}"}) if left_out else share
