"""Speed and memory of all variants of a job, in rounds: each variant has its turn in each round, in a fresh process.

So a noisy minute does not punish one variant only. A fixed calibration loop runs on all cores before and after each
turn. If it took much longer than the fastest of the job, the turn was disturbed: it is repeated once, and flagged if it
is disturbed again.
"""

import hashlib
import logging
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

from slmops.core import locks, machine
from slmops.core.errors import EvaluationError, SlmopsError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Frozen, Registration, Variant
from slmops.evaluation import prompts, speed_worker
from slmops.evaluation.speed_worker import Cell, Window
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


class Turn(Frozen):
    """One variant in one round, with the memory of its process: (seconds of ``time.monotonic()``, MB)."""

    measured: speed_worker.SpeedResult
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


class _Contestant:
    def __init__(self, variant: Variant, registration: Registration, name: str, job: Job, settings: Settings) -> None:
        self.name = variant.name
        self.log = settings.logs / name / f"{variant.name}.speed.log"
        home = settings.work(name) / f"{variant.name}-speed"
        self.staged: Staged = stage(registration, home, fixed_length=True)
        self.cells = grid(self.staged, job)
        self.turns: list[Turn] = []


def measure(
    made: list[tuple[Variant, Registration]], name: str, job: Job, settings: Settings
) -> dict[str, Speed | SlmopsError]:
    """Measure all variants in interleaved rounds; by name their turns, or the error that made a variant drop out."""
    contestants: list[_Contestant] = []
    results: dict[str, Speed | SlmopsError] = {}
    with locks.machine(settings):
        for variant, registration in made:
            try:
                contestants.append(_Contestant(variant, registration, name, job, settings))
            except SlmopsError as error:
                results[variant.name] = error
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
        results[one.name] = Speed(cells=one.cells, turns=tuple(turns), cores=cores)
    for variant, _ in made:
        shutil.rmtree(settings.work(name) / f"{variant.name}-speed", ignore_errors=True)
    return results


def _take_turn(one: _Contestant, fastest: float, settings: Settings, *, first: bool) -> float:
    """Measure once, and once more if that was disturbed. Returns the fastest calibration loop so far."""
    most = sessions_that_fit(one.staged.folder, max(SESSIONS))
    for _ in range(2):
        before = calibrate()
        measured, finished = children.call(
            speed_worker.handle,
            speed_worker.SpeedRequest(
                **one.staged.model_dump(),
                cells=one.cells,
                sessions=tuple(one for one in SESSIONS if one <= most) if first else (),
                drop_cache=first,
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
