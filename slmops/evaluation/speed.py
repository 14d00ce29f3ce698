"""Speed and memory of all variants of a job, in rounds: each variant has its turn in each round, in a fresh process.

So a noisy minute does not punish one variant only. A fixed calibration loop runs on all cores before and after each
turn. If it took much longer than the fastest of the job, the turn was disturbed: it is repeated once, and flagged if it
is disturbed again. A turn runs in a child process, which runs this module: it loads the variant in Foundry Local's
runtime, times a grid of prompts and unloads it.
"""

import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slmops.core import locks, machine
from slmops.core.errors import EvaluationError, SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Frozen, Registration, Variant
from slmops.evaluation import prompts
from slmops.foundry.layout import Staged, sessions_that_fit, stage
from slmops.processes import children

log = logging.getLogger(__name__)

ROUNDS, QUICK_ROUNDS = 3, 1
QUICK_LENGTHS = 2
HEADLINE_TOKENS = 128  # prompt length of the figures that are one number; the nearest length of the grid is taken
HEADLINE_REPETITIONS, HEADLINE_S = 3, 1.0  # at least, in each turn; the other cells have one repetition
SESSIONS = (1, 2, 4)
DISTURBED = 1.25  # times the fastest calibration loop of the job
CALIBRATION_BYTES = 16 * 2**20
REST_S = 0.2  # long enough for the sampler in the parent to see the process at rest
WARM_UP_MOST, WARM_UP_TOKENS = 6, 4
SESSION_TOKENS = 8
STABLE = 0.1  # a model is warm if a request takes as long as the one before, to within this share
Window = tuple[float, float]  # start and end by time.monotonic()


class Cell(Frozen):
    """A point of the grid, to be timed for so many repetitions and so many seconds at least."""

    prompt_tokens: int
    output_tokens: int
    text: str
    repetitions: int
    seconds: float = 0.0


class SpeedRequest(Staged):
    """What to time. The folder is staged to give answers of a fixed length."""

    cells: tuple[Cell, ...]
    sessions: tuple[int, ...] = ()
    drop_cache: bool = False
    gguf: Path | None = None  # the weights, for llama.cpp; the folder has the tokenizer and the template


class Timed(Frozen):
    """One request: seconds from its start, and tokens by the runtime's count."""

    cell: int
    prompt_tokens: int
    completion_tokens: int
    first_s: float
    last_s: float
    total_s: float
    tokenize_s: float

    @property
    def gap_s(self) -> float | None:
        """Mean time from token to token; None if the text came in one piece."""
        tokens = self.completion_tokens
        return (self.last_s - self.first_s) / (tokens - 1) if tokens > 1 and self.last_s > self.first_s else None


class SpeedResult(Frozen):
    """Raw figures; :mod:`slmops.evaluation.speed` makes metrics of them."""

    load_s: float
    cold: bool
    before: Window
    loaded: Window
    unloaded: Window | None  # None after several sessions, which leave more behind than a single user
    measured: Window
    cpu_s: float
    energy_j: float | None
    energy_tokens: int
    timed: tuple[Timed, ...]
    throughput: dict[int, float]


class Turn(Frozen):
    """One variant in one round, with the memory of its process: (seconds of ``time.monotonic()``, MB)."""

    measured: SpeedResult
    memory: tuple[tuple[float, float], ...]
    calibration_s: tuple[float, float]
    disturbed: bool = False

    def memory_in(self, window: Window) -> list[float]:
        """The samples in MB that were taken within a window."""
        return [mb for at, mb in self.memory if window[0] <= at <= window[1]]


class Speed(Frozen):
    cells: tuple[Cell, ...]
    turns: tuple[Turn, ...]
    cores: int


class Peer(Frozen):
    """A GGUF file of the checkpoint, which is measured beside the variants."""

    name: str
    file: Path
    folder: Path  # of the checkpoint, for its tokenizer and chat template
    context_length: int

    def asked(self, home: Path) -> SpeedRequest:
        """What to time, without the cells."""
        where = {"home": home, "folder": self.folder, "foundry_id": self.name, "context_length": self.context_length}
        return SpeedRequest.model_validate({**where, "cells": (), "gguf": self.file})


class _Contestant:
    def __init__(self, which: str, asked: SpeedRequest, name: str, job: Job, settings: Settings) -> None:
        self.name = which
        self.log = settings.logs / name / f"{which}.speed.log"
        self.asked = asked.model_copy(update={"cells": grid(asked, job)})
        self.turns: list[Turn] = []


def measure(
    made: list[tuple[Variant, Registration]], name: str, job: Job, settings: Settings, peers: Sequence[Peer] = ()
) -> dict[str, Speed | SlmopsError]:
    """Measure all variants and peers in interleaved rounds; by name their turns, or the error that ended them."""
    contestants: list[_Contestant] = []
    results: dict[str, Speed | SlmopsError] = {}
    with locks.machine(settings):
        for variant, registration in made:
            try:
                staged = stage(registration, settings.work(name) / f"{variant.name}-speed", fixed_length=True)
                asked = SpeedRequest(**staged.model_dump(), cells=())
                contestants.append(_Contestant(variant.name, asked, name, job, settings))
            except SlmopsError as error:
                results[variant.name] = error
        for peer in peers:
            try:
                contestants.append(_Contestant(peer.name, peer.asked(settings.work(name)), name, job, settings))
            except SlmopsError as error:
                results[peer.name] = error
        rounds = QUICK_ROUNDS if job.quick else ROUNDS
        fastest = min(calibrate() for _ in range(3))
        for number in range(rounds):
            log.info("measuring speed and memory: round %d of %d", number + 1, rounds)
            # A single round shows a warm load, and what a single user leaves behind after unloading.
            first = number == 0 and rounds > 1
            for one in [*contestants]:
                try:
                    fastest = _take_turn(one, fastest, settings, first=first)
                except SlmopsError as error:
                    results[one.name] = error
                    contestants.remove(one)
    cores = machine.hardware().cores
    for one in contestants:
        # Again, now that the fastest loop of the whole job is known.
        limit = DISTURBED * fastest
        turns = (turn.model_copy(update={"disturbed": max(turn.calibration_s) > limit}) for turn in one.turns)
        results[one.name] = Speed(cells=one.asked.cells, turns=tuple(turns), cores=cores)
    for variant, _ in made:
        shutil.rmtree(settings.work(name) / f"{variant.name}-speed", ignore_errors=True)
    return results


def _take_turn(one: _Contestant, fastest: float, settings: Settings, *, first: bool) -> float:
    """Measure once, and once more if that was disturbed. Returns the fastest calibration loop so far."""
    most = 0 if one.asked.gguf else sessions_that_fit(one.asked.folder, max(SESSIONS))
    for _ in range(2):
        before = calibrate()
        measured, finished = children.call(
            handle,
            one.asked.model_copy(
                update={
                    "sessions": tuple(sessions for sessions in SESSIONS if sessions <= most) if first else (),
                    "drop_cache": first,
                }
            ),
            log=one.log,
            timeout_s=settings.evaluation_timeout_s,
            error=EvaluationError,
        )
        loops = (before, calibrate())
        fastest = min(fastest, *loops)
        turn = Turn(measured=measured, memory=tuple(finished.memory), calibration_s=loops)
        if max(loops) <= DISTURBED * fastest:
            break
        log.info("%s: this machine was busy with something else", one.name)
    one.turns.append(turn)
    return fastest


def grid(staged: Staged, job: Job) -> tuple[Cell, ...]:
    """The cells to time, the headline cell first; EvaluationError if no wanted length fits the model."""
    outputs = job.output_lengths[:1] if job.quick else job.output_lengths
    lengths = prompts.of_lengths(job.prompt_lengths, staged.context_length - max(outputs), staged.folder)
    if job.quick:
        lengths = dict(list(lengths.items())[:QUICK_LENGTHS])
    headline = min(lengths, key=lambda tokens: abs(tokens - HEADLINE_TOKENS))
    order = sorted(lengths, key=lambda tokens: (tokens != headline, tokens))
    first, *others = (
        Cell(prompt_tokens=tokens, output_tokens=output, text=lengths[tokens], repetitions=1)
        for tokens in order
        for output in outputs
    )
    return first.model_copy(update={"repetitions": HEADLINE_REPETITIONS, "seconds": HEADLINE_S}), *others


def calibrate() -> float:
    """Seconds until all cores have hashed something side by side, so one busy core is noticed; the best of three."""
    data = bytes(CALIBRATION_BYTES)
    cores = machine.hardware().cores
    seconds = []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(lambda _: hashlib.sha256(data).digest(), range(cores)))
            seconds.append(time.perf_counter() - started)
    return min(seconds)


# --- in the child process


def handle(request: SpeedRequest) -> SpeedResult:
    """Load, warm up, time each cell, time several sessions at once, unload."""
    count = prompts.counter(request.folder)
    model = _model(request)
    before = _rest()
    cold = request.drop_cache and _drop_cache(request.gguf.parent if request.gguf else request.folder)
    started = time.perf_counter()
    model.load()
    load_s = time.perf_counter() - started
    loaded = _rest()
    shortest = min(request.cells, key=lambda cell: cell.prompt_tokens)
    _warm_up(model, shortest)
    began, energy, cpu = time.monotonic(), machine.energy_j(), time.process_time()
    timed = []
    for number, cell in enumerate(request.cells):
        count(cell.text)  # the first call compiles the template
        started = time.perf_counter()
        count(cell.text)
        tokenize_s = time.perf_counter() - started
        done, until = 0, time.perf_counter() + cell.seconds
        while done < cell.repetitions or time.perf_counter() < until:
            done += 1
            reply = _ask(model, cell)
            if reply.first_s is not None:
                figures = {name: value for name, value in vars(reply).items() if name in Timed.model_fields}
                timed.append(Timed(cell=number, tokenize_s=tokenize_s, **figures))
    measured, cpu_s, energy_end = (began, time.monotonic()), time.process_time() - cpu, machine.energy_j()
    if not any(one.gap_s for one in timed):
        raise EvaluationError(
            "The model answers each of the speed prompts with less than two tokens of text, so nothing can be timed.",
            "Is its chat template right? See the answers in the log of its registration.",
        )
    # Several sessions come last: they take memory that a single user never sees. Their rates include prefill.
    throughput = {}
    for sessions in request.sessions:
        with ThreadPoolExecutor(sessions) as pool:
            started = time.perf_counter()
            cell = shortest.model_copy(update={"output_tokens": SESSION_TOKENS})
            replies = list(pool.map(_ask, [model] * sessions, [cell] * sessions))
            generated = sum(reply.completion_tokens for reply in replies)
            throughput[sessions] = generated / (time.perf_counter() - started)
    model.unload()
    return SpeedResult(
        load_s=load_s,
        cold=cold,
        before=before,
        loaded=loaded,
        unloaded=None if request.sessions else _rest(),
        measured=measured,
        cpu_s=cpu_s,
        energy_j=energy_end - energy if energy is not None and energy_end is not None else None,
        energy_tokens=sum(one.prompt_tokens + one.completion_tokens for one in timed),
        timed=tuple(timed),
        throughput=throughput,
    )


def _model(request: SpeedRequest) -> Any:
    """What is loaded, asked and unloaded."""
    if request.gguf:
        from slmops.evaluation.gguf_model import GgufChat

        return GgufChat(request.gguf, request.folder, request.context_length)
    from slmops.foundry import runtime

    catalog = runtime.local_catalog(request.home, request.foundry_id)
    return runtime.add(catalog, request.folder, request.foundry_id, "measurement")


def _ask(model: Any, cell: Cell) -> Any:
    if ask := getattr(model, "ask", None):  # llama.cpp's
        return ask(cell.text, cell.output_tokens)
    from slmops.foundry import runtime

    return runtime.ask(model, [{"role": "user", "content": cell.text}], max_tokens=cell.output_tokens)


def _warm_up(model: Any, cell: Cell) -> None:
    """Ask until two requests in a row take about as long; the first ones touch fresh memory."""
    cell, last = cell.model_copy(update={"output_tokens": WARM_UP_TOKENS}), float("inf")
    for _ in range(WARM_UP_MOST):
        now = _ask(model, cell).total_s
        if abs(now - last) <= STABLE * now:
            return
        last = now


def _rest() -> Window:
    start = time.monotonic()
    time.sleep(REST_S)
    return start, time.monotonic()


def _drop_cache(folder: Path) -> bool:
    """Have the system forget the files' pages, to load them from the disk next; False: it cannot."""
    if sys.platform != "linux":
        return False
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # pages not written yet would stay
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
