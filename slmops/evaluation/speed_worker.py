"""Child process: one round of one variant in Foundry Local's runtime: load, time a grid of prompts, unload."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slmops.core.errors import EvaluationError
from slmops.core.values import Frozen
from slmops.foundry.layout import Staged

REST_S = 0.2  # long enough for the sampler in the parent to see the process at rest
WARM_UP_MOST = 6
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


def handle(request: SpeedRequest) -> SpeedResult:
    """Load, warm up, time each cell, time several sessions at once, unload."""
    from slmops.core import machine
    from slmops.evaluation import prompts
    from slmops.foundry import runtime

    count = prompts.counter(request.folder)
    catalog = runtime.local_catalog(request.home)
    model = runtime.add(catalog, request.folder, request.foundry_id, "measurement")
    before = _rest()
    cold = request.drop_cache and _drop_cache(request.folder)
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


def _ask(model: Any, cell: Cell) -> Any:
    from slmops.foundry import runtime

    return runtime.ask(model, [{"role": "user", "content": cell.text}], max_tokens=cell.output_tokens)


def _warm_up(model: Any, cell: Cell) -> None:
    """Ask until two requests in a row take about as long; the first ones touch fresh memory."""
    last = float("inf")
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
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # pages not written yet would stay
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True
