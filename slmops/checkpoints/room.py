"""Memory and disk that a job takes, and the baseline and the work pool that fit."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from slmops.core import machine
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.job import BASELINE, CHECKPOINT, Job
from slmops.core.settings import Pool, Settings
from slmops.core.values import Checkpoint, Recipe, Room
from slmops.processes import children

log = logging.getLogger(__name__)

GB = 1e9
BYTES_PER_WEIGHT = {32: 4.0, 16: 2.0, 8: 1.1, 4: 0.75, None: 4.0}
"""Bytes of one weight in an ONNX variant, scales included, by the bits that its recipe promises; None: no promise."""
GGUF_BYTES = 4 + 1.1 + 0.8  # of one weight in llama.cpp's files: fp32, Q8_0, Q4_K_M
UNTIED = 1.35  # the model builder unties embeddings: the fp32 export of a tied 135 M model is 1.21 times its checkpoint
SMALL, SHARE = 2 * GB, 1 / 8
"""Memory that an fp32 baseline may take unless it is asked for: so much, or such a share of the machine's."""


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
    recipes: Iterable[Recipe], checkpoint: Checkpoint, job: Job, settings: Settings, *, converts: bool = True
) -> Room | None:
    """Refuse a job that the disk or the memory cannot hold; else return what it takes of them, unless others convert.

    Disk: the sum of ``parameters x bytes per weight x 1.35`` over the recipes and the fp32 baseline,
    plus twice the largest of them for unfinished work, plus one more fp32 if one is in 16 bits, which is made from it.
    Memory, unless others convert: that of one conversion. With the checkpoint as baseline see :func:`of_checkpoint`.
    """
    own = job.baseline == CHECKPOINT
    planned = list(recipes)
    bits = {recipe.name: recipe.bits for recipe in planned} | ({} if own else {BASELINE: 32})
    sizes = {name: checkpoint.parameters * BYTES_PER_WEIGHT[of] * UNTIED for name, of in bits.items()}
    memory, work = of_checkpoint(checkpoint.size_mb * 1e6)
    if any(step.get("choose") for recipe in planned for step in recipe.config.get("passes", {}).values()):
        memory = of_checkpoint(4 * checkpoint.parameters)[0]  # BlockQuantize chooses layers on gradients, in fp32
    if not own:
        memory = conversion_memory(checkpoint)
        work = 2 * max(sizes.values()) + (sizes[BASELINE] if 16 in bits.values() else 0)
    work += GGUF_BYTES * checkpoint.parameters * (job.peer is not None)
    what = f"{', '.join(sorted(sizes))} of {checkpoint.name}"
    demand(what, memory * converts, sum(sizes.values()) + work, settings, fewer=" ask for fewer precisions,")
    return Room(memory_estimated_mb=memory / 1e6, disk_estimated_mb=work / 1e6) if converts else None


def of_checkpoint(size: float) -> tuple[float, float]:
    """Bytes of memory and of disk that unfinished work takes without fp32, for ``size`` bytes of weights."""
    return 1.5 * size + 3 * GB, 3 * size  # benchmarks/real_shapes.py measures both


def demand(what: str, memory: float, disk: float, settings: Settings, *, fewer: str = "") -> None:
    """Refuse work that takes more bytes than there are, before it has gone on for an hour; else say what it takes."""
    free = machine.disk_free(settings.home)
    if disk > free:
        raise PrerequisiteError(
            f"Not enough disk for {what}: about {disk / GB:.1f} GB are needed, and {free / GB:.1f} GB are free at "
            f"{settings.home}.",
            f"Make room,{fewer} or set SLMOPS_HOME to a folder on a larger disk.",
        )
    _, available = machine.memory()
    if memory > available:
        raise PrerequisiteError(
            f"Not enough memory for {what}: about {memory / GB:.1f} GB are needed, and {available / GB:.1f} GB are "
            "available.",
            "Stop other programs, or use a machine with more memory or a smaller model.",
        )
    log.info(
        "%s: up to %.1f GB of memory, of %.1f available, and %.1f GB of disk, of %.1f free",
        what,
        *(bytes_ / GB for bytes_ in (memory, available, disk, free)),
    )


@contextmanager
def watched(settings: Settings) -> Iterator[dict[str, float]]:
    """Yield the most that is taken from now on, as fields of :class:`Room`: looked at as often as children's memory."""
    began_with, next_look = _beyond_variants(settings), 0.0
    peaks = {"memory_peak_mb": 0.0, "disk_peak_mb": 0.0}

    def look(child_mb: float) -> None:
        nonlocal next_look
        own_mb = psutil.Process().memory_info().rss / 1e6
        peaks["memory_peak_mb"] = max(peaks["memory_peak_mb"], own_mb + child_mb)
        if (now := time.monotonic()) >= next_look:
            peaks["disk_peak_mb"] = max(peaks["disk_peak_mb"], _beyond_variants(settings) - began_with)
            next_look = now + (time.monotonic() - now) / children.LOOKING

    children.watchers.append(look)
    try:
        yield peaks
    finally:
        children.watchers.remove(look)


def _beyond_variants(settings: Settings) -> float:
    """MB of the home's files, each once, but for variants and for what has a name elsewhere: links take no disk."""
    sizes: dict[int, int] = {}
    elsewhere: dict[int, int] = {}
    for part in (settings.work(""), settings.checkpoints, settings.blobs, settings.foundry, settings.variants):
        for folder, _, names in os.walk(part):
            for name in names:
                with suppress(OSError):  # it is gone
                    file = Path(folder, name).lstat()
                    sizes[file.st_ino] = 0 if part == settings.variants else file.st_size
                    elsewhere[file.st_ino] = elsewhere.get(file.st_ino, file.st_nlink) - 1
    return sum(size for inode, size in sizes.items() if not elsewhere[inode]) / 1e6


def conversion_memory(checkpoint: Checkpoint) -> float:
    """Bytes that one conversion needs, estimated high: the checkpoint in fp32, the graph made from it, and torch."""
    return checkpoint.parameters * 4 * 2.2


def choose_pool(pools: Sequence[Pool], checkpoint: Checkpoint, device: str) -> Pool:
    """The smallest pool for the device whose machines can hold a conversion; of several of one size the first.

    It is a PrerequisiteError if none is large enough, or none is for the device.
    """
    need = conversion_memory(checkpoint) / GB
    fitting = [pool for pool in pools if pool.device == device and pool.memory_gb >= need]
    if not fitting:
        known = ", ".join(f"{pool.name} ({pool.memory_gb:g} GB, {pool.device})" for pool in pools)
        raise PrerequisiteError(
            f"No work pool can convert {checkpoint.name}: about {need:.1f} GB of memory on a {device} machine are "
            f"needed, and there are {known}.",
            "Name a pool of larger machines in SLMOPS_POOLS, or use a smaller model.",
        )
    return min(fitting, key=lambda pool: pool.memory_gb)
