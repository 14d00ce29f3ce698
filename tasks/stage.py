"""How a stage of a flow becomes a Prefect task."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from slmops.core.errors import TrackingError
from slmops.core.names import to_name

# The library's records go to the Prefect page too (PREFECT_LOGGING_EXTRA_LOGGERS); Prefect sets no level for them.
logging.getLogger("slmops").setLevel(logging.INFO)

P = ParamSpec("P")
R = TypeVar("R")

_PAUSES_S = [2.0, 5.0, 15.0, 30.0, 60.0]
"""A server may be away for a minute or two: restarted, or moved to another machine."""

_seconds: ContextVar[defaultdict[str, float] | None] = ContextVar("seconds", default=None)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yield the seconds that each stage within the block has taken so far in all its runs, by the task's name."""
    found: defaultdict[str, float] = defaultdict(float)
    before = _seconds.set(found)
    try:
        yield found
    finally:
        _seconds.reset(before)


def artifact_key(kind: str, name: str) -> str:
    """The key of one of Prefect's artifacts, which takes lower case, digits and dashes only."""
    return f"{kind}-{to_name(name).replace('_', '-')}"


def stage(run_name: str | None = None, *, tracking: bool = False) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a task that is named after it: ``find_version`` becomes "find version".

    Prefect neither keeps nor caches results, because a content-addressed store keeps what is worth keeping, and checks
    that the files are still there, which a cache hit does not.

    Args:
        run_name: What its runs are called, with arguments in braces, such as ``"convert {recipe.name}"``; the name of
            the task by default.
        tracking: It talks to MLflow, and a retry helps: a server that restarts is back in seconds. No other stage is
            retried: Olive, the runtime and the measurements fail the same way twice.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        name = function.__name__.replace("_", " ")

        @wraps(function)
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                if (seconds := _seconds.get()) is not None:
                    seconds[name] += time.monotonic() - began

        return task(
            name=name,
            task_run_name=run_name or name,
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=len(_PAUSES_S) if tracking else 0,
            retry_delay_seconds=_PAUSES_S if tracking else None,
            retry_condition_fn=_may_pass if tracking else None,
        )(counted)

    return decorate


def _may_pass(_task: object, _run: object, state: State[Any]) -> bool:
    """What the server did not take may be taken a moment later; a question that makes no sense stays so."""
    return isinstance(state.result(raise_on_failure=False), TrackingError)
