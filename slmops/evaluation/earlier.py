"""What an earlier job measured of the same variants: raw results in the home, by a digest of all they depend on.

Speeds are kept for all variants of a job together, and so are qualities: they were measured side by side, and compare
only with each other. Gates and choice are made anew of them each time.
"""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from slmops.core import machine
from slmops.core.errors import SlmopsError
from slmops.core.files import digest_of_json, sha256, write_atomic
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Frozen, Registration, Variant
from slmops.evaluation import dataset, summary
from slmops.evaluation.quality import Quality
from slmops.evaluation.speed import Speed
from slmops.foundry.layout import GENAI_CONFIG, INFERENCE_MODEL

log = logging.getLogger(__name__)

MEASURED_AS = 1  # how slmops measures; a change of it makes all measurements anew


Raw = TypeVar("Raw", Speed, Quality)


class RawResults(Frozen, Generic[Raw]):
    """What was measured, by the variant's name."""

    measured: datetime
    keys: tuple[str, ...]  # of the variants in the store
    variants: dict[str, Raw]
    checkpoint: Quality | None = None  # what the checkpoint's own were, if it was scored


Speeds, Qualities = RawResults[Speed], RawResults[Quality]


class Earlier:
    """What is known of the variants that a job has made, and where it is left for the next one."""

    def __init__(self, made: Sequence[tuple[Variant, Registration]], job: Job, settings: Settings) -> None:
        self._keys = tuple(variant.key for variant, _ in made)
        self._anew = job.remeasure or job.peer is not None  # which is measured in the same rounds
        common = {
            "format": MEASURED_AS,
            "hardware": machine.hardware().kind,
            "versions": machine.versions(),
            "variants": {variant.key: _files(variant, registration) for variant, registration in made},
            "quick": job.quick,
        }
        speed = {**common, "lengths": (job.prompt_lengths, job.output_lengths)}
        quality = {
            **common,
            "evaluation_set": dataset.load(
                job.evaluation_set, matcher=job.matcher, judge=settings.judge_configured
            ).digest,
            "matcher": sha256(Path(job.matcher.rpartition(":")[0]).expanduser()) if job.matcher else None,
            "function": job.matcher and job.matcher.rpartition(":")[2],
            "judge": (settings.judge_url, settings.judge_model),
            "text": dataset.perplexity_text(job.perplexity_text)[1],
            "baseline": job.baseline,
            "time": (job.minutes, settings.evaluation_timeout_s),
        }
        self._speeds = settings.measurements / f"speed-{digest_of_json(speed)[:16]}.json"
        self._qualities = settings.measurements / f"quality-{digest_of_json(quality)[:16]}.json"

    def speeds(self) -> RawResults[Speed] | None:
        return self._read(Speeds, self._speeds, "speeds")

    def qualities(self) -> RawResults[Quality] | None:
        return self._read(Qualities, self._qualities, "qualities")

    def keep_speeds(self, found: dict[str, Speed | SlmopsError]) -> None:
        """Leave them for the next job, unless one is an error or was disturbed."""
        whole = {name: one for name, one in found.items() if isinstance(one, Speed) and not summary.disturbed(one)}
        if len(whole) == len(found):
            self._write(self._speeds, variants=whole)

    def keep_qualities(self, found: dict[str, Quality], checkpoint: Quality | None) -> None:
        """Leave them for the next job, unless one is missing or has answers that nobody could judge."""
        answers = [answer for one in (*found.values(), checkpoint) if one for answer in one.answers]
        if len(found) == len(self._keys) and all(answer.correct is not None for answer in answers):
            self._write(self._qualities, variants=found, checkpoint=checkpoint)

    def _read(self, kind: type[RawResults[Raw]], path: Path, what: str) -> RawResults[Raw] | None:
        if self._anew or not path.exists():
            return None
        found = kind.from_file(path)
        if found is None:
            log.warning("%s is damaged: the %s are measured anew", path, what)
        else:
            log.info("%s as measured %s; --remeasure measures them anew", what, f"{found.measured:%Y-%m-%d %H:%M} UTC")
        return found

    def _write(self, path: Path, **kept: Any) -> None:
        write_atomic(path, RawResults(measured=datetime.now(UTC), keys=self._keys, **kept).model_dump_json())


def _files(variant: Variant, registration: Registration) -> dict[str, str]:
    """What is measured: the files by their digests, and what Foundry Local is told about them."""
    told = {name: (registration.path / name).read_text(encoding="utf-8") for name in (GENAI_CONFIG, INFERENCE_MODEL)}
    if registration.not_run:  # edge cases are then not tried, and the CPU answers the questions
        told["not run"] = ""
    return {**{file.name: file.sha256 for file in variant.files}, **told}
