"""Memory and disk that a job takes, and the baseline that fits them."""

import logging
from collections.abc import Iterable

from slmops.core import machine
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.job import BASELINE, CHECKPOINT, Job
from slmops.core.pools import GB, conversion_memory
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint

log = logging.getLogger(__name__)

BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.1, "int4": 0.75}
"""Bytes of one weight in an ONNX variant, scales included; anything else counts as fp32."""
UNTIED = 1.35
"""The model builder unties embeddings: the fp32 export of a tied 135 M model is 1.21 times its checkpoint."""
SMALL, SHARE = 2 * GB, 1 / 8
"""Memory that an fp32 baseline may take unless it is asked for: so much, or such a share of the machine's."""
COPIES, BESIDE = 2.5, 2 * GB
"""A job takes so many times the checkpoint of memory, and so much for servers and libraries, without fp32."""


def with_baseline(job: Job, checkpoint: Checkpoint, settings: Settings) -> Job:
    """The job with the baseline that it asks for, or else with fp32 if that is small for this machine.

    A UsageError if the checkpoint is to be the baseline of a job that other machines do.
    """
    if settings.pools and job.baseline == CHECKPOINT:
        raise UsageError("A job on work pools needs an fp32 baseline.", "Leave out --baseline, or unset SLMOPS_POOLS.")
    if job.baseline or settings.pools:
        return job.model_copy(update={"baseline": job.baseline or BASELINE})
    memory = conversion_memory(checkpoint)
    fits = memory <= max(SMALL, SHARE * machine.memory()[0])
    fits = fits and 4 * UNTIED * checkpoint.parameters <= machine.disk_free(settings.home) / 4
    if not fits:
        log.info(
            "the checkpoint itself is the baseline: with one in fp32 this would take %.1f GB of memory or too much "
            "disk; fp32 and fp16 are not made (--baseline fp32 makes them)",
            memory / GB,
        )
    return job.model_copy(update={"baseline": BASELINE if fits else CHECKPOINT})


def check(
    precisions: Iterable[str], checkpoint: Checkpoint, job: Job, settings: Settings, *, converts: bool = True
) -> None:
    """Refuse a job that the disk or the memory cannot hold, before it has worked for an hour; else say what it takes.

    Disk: the sum of ``parameters x bytes per weight x 1.35`` over the precisions asked for and the fp32 baseline,
    plus twice the largest of them for unfinished work, plus one more fp32 if fp16 is asked for, which is made from it.
    If the checkpoint is the baseline, unfinished work is three times the checkpoint.
    Memory, unless others convert: ``parameters x 4 bytes x 2.2`` for one conversion at a time, or 2.5 times the
    checkpoint and 2 GB if it is the baseline. All are estimates on the safe side, in GB.
    """
    own = job.baseline == CHECKPOINT
    names = {*precisions} if own else {BASELINE, *precisions}
    sizes = {name: checkpoint.parameters * BYTES_PER_WEIGHT.get(name, 4.0) * UNTIED for name in names}
    work = (
        3 * checkpoint.size_mb * 1e6 if own else 2 * max(sizes.values()) + (sizes[BASELINE] if "fp16" in sizes else 0)
    )
    disk = sum(sizes.values()) + work
    free = machine.disk_free(settings.home)
    if disk > free:
        raise PrerequisiteError(
            f"Not enough disk for {', '.join(sorted(sizes))} of {checkpoint.name}: about {disk / GB:.1f} GB are "
            f"needed, and {free / GB:.1f} GB are free at {settings.home}.",
            "Make room, ask for fewer precisions, or set SLMOPS_HOME to a folder on a larger disk.",
        )
    memory = 0.0
    if converts:
        memory = COPIES * checkpoint.size_mb * 1e6 + BESIDE if own else conversion_memory(checkpoint)
    _, available = machine.memory()
    if memory > available:
        raise PrerequisiteError(
            f"Not enough memory to convert {checkpoint.name}: about {memory / GB:.1f} GB are needed, and "
            f"{available / GB:.1f} GB are available.",
            "Stop other programs, or use a machine with more memory or a smaller model.",
        )
    log.info(
        "this takes up to %.1f GB of memory, of %.1f available, and %.1f GB of disk, of %.1f free",
        *(bytes_ / GB for bytes_ in (memory, available, disk, free)),
    )
