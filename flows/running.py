"""How a run of a flow appears in Prefect: what it is called, what it waits for, how far it is, and how it ends."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import ParamSpec, TypeVar, cast
from uuid import UUID

from prefect import runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.context import refresh_global_settings_context
from prefect.exceptions import Pause
from prefect.logging.configuration import setup_logging
from prefect.states import Failed

from slmops.core import locks
from slmops.core.errors import BusyError, SlmopsError, TrackingError
from tasks.stage import artifact_key

P = ParamSpec("P")
R = TypeVar("R")

_FRUIT = """
apple apricot banana blackberry blueberry cherry cranberry currant fig grape grapefruit grapes kiwi kumquat lemon lime
melon nectarine orange peach pear persimmon pineapple plum pomegranate prune raspberry strawberry tangerine watermelon
goldfish hamster hippopotamus kitten puppy
"""
"""What the form on the Prefect page names runs after, besides the animals that the server names them after."""


def named(template: str) -> Callable[[], str]:
    """The ``flow_run_name`` of a template such as ``"optimize {job.label}"``; a name that a person gave stays."""

    def name() -> str:
        given = str(runtime.flow_run.name or "")
        return template.format(**runtime.flow_run.parameters) if is_made_up(given) else given

    return name


def is_made_up(name: str) -> bool:
    """Whether it looks like a name that Prefect made up, such as ``amber-fox``: adjectives and an animal or a fruit."""
    *adjectives, noun = name.split("-")
    lists = (files("coolname") / "data" / f"{kind}.txt" for kind in ("animal", "animal_breed", "animal_legendary"))
    nouns = {*_FRUIT.split(), *(word for words in lists for word in words.read_text(encoding="utf-8").split())}
    return not name or (bool(adjectives) and noun in nouns)


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """Let a run end with an error of ours in one message, without a traceback; its caller gets the error."""

    @wraps(function)
    def ended(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except SlmopsError as error:
            return cast(R, Failed(message=str(error), data=error))  # Prefect raises its data at the caller

    return ended


@contextmanager
def turn(path: Path, what: str) -> Iterator[None]:
    """As :func:`locks.exclusive`; a run that has to wait shows that on its page as its state, "Waiting"."""
    with ExitStack() as held:
        try:
            held.enter_context(locks.exclusive(path, what, wait=False))
        except BusyError as busy:
            _show_state("Waiting", busy.message)
            held.enter_context(locks.exclusive(path, what, wait=True))
            _show_state("Running", None)
        yield


def _show_state(name: str, message: str | None) -> None:
    flow_run = UUID(runtime.flow_run.id)
    with get_client(sync_client=True) as client:
        now = client.read_flow_run(flow_run).state
        if now is not None and now.type == StateType.RUNNING:  # and not being cancelled
            state: State[None] = State(type=now.type, name=name, message=message, state_details=now.state_details)
            client.set_flow_run_state(flow_run, state, force=True)


@contextmanager
def aborted_on_error(abort: Callable[[str], None]) -> Iterator[None]:
    """If the block is interrupted or breaks, ``abort`` what it has open in MLflow, with what went wrong."""
    try:
        yield
    except Pause:  # it waits for approval
        raise
    except BaseException as error:
        with suppress(TrackingError):  # MLflow does not answer either
            abort(error.message if isinstance(error, SlmopsError) else f"{type(error).__name__}: {error}")
        raise


def reread_environment() -> None:
    """Let Prefect, imported before its variables were set, take them into account."""
    refresh_global_settings_context()
    setup_logging()


class ProgressBar:
    def __init__(self, name: str, steps: int) -> None:
        self._steps = steps
        self._done = 0
        created = create_progress_artifact(0.0, key=artifact_key("progress", name), description=f"{name}: variants")
        self._id = UUID(str(created))

    def step(self, steps: int = 1) -> None:
        self._done += steps
        update_progress_artifact(artifact_id=self._id, progress=min(100.0, 100 * self._done / self._steps))
