"""What the home holds, what refers to it, and the removal of what nothing refers to.

MLflow says what is referred to: versions with an alias, which are those that are or were deployed and the newest of
each variant, and the variants of the latest comparison of each model. So nothing is removed if it does not answer.
"""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from slmops.core import blobs, locks
from slmops.core.errors import UsageError
from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Frozen, Variant
from slmops.delivery import installed
from slmops.evaluation.earlier import Qualities, Speeds
from slmops.foundry import layout
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker

REGISTERED = "in Foundry Local"
NOT_OURS = "whoever put it there"


class Thing(Frozen):
    """A file or folder of the home. A file that several things link to counts for the first of them."""

    kind: str
    path: Path
    mb: float
    referred_by: tuple[str, ...] = ()


class Pruned(Frozen):
    """What there is, and whether what nothing refers to was removed. Scripts rely on the JSON form."""

    home: Path
    things: tuple[Thing, ...]
    removed: bool
    freed_mb: float

    @property
    def text(self) -> str:
        from tabulate import tabulate

        rows = [
            (one.kind, one.path.name, f"{one.mb:,.1f}", ", ".join(one.referred_by) or "nothing") for one in self.things
        ]
        align = ("left", "left", "right", "left")
        table = tabulate(rows, ("kind", "name", "MB", "referred to by"), disable_numparse=True, colalign=align)
        if self.removed:
            return f"{table}\n\nWhat nothing refers to is removed: {self.freed_mb:,.1f} MB are free."
        return f"{table}\n\n`slmops prune --yes` removes what nothing refers to, and frees {self.freed_mb:,.1f} MB."


def prune(settings: Settings, uri: str, *, remove: bool) -> Pruned:
    """Look at the home, and ``remove`` what nothing refers to.

    It is a TrackingError if MLflow does not answer, and with ``remove`` a BusyError while anything works in this home,
    such as a job: then nothing is removed.
    """
    with ExitStack() as held:
        for path in sorted(settings.locks.glob("*.lock")) if remove else ():
            if path.name != "stack.lock":  # of the servers' start
                held.enter_context(locks.exclusive(path, f"{path.stem} in this home", wait=False))
        things = tuple(_things(settings, *_referred(uri)))
        doomed = [one for one in things if not one.referred_by]
        doomed = _unregistered(doomed, settings) if remove else doomed
        freed = _freed(doomed, settings)
        if remove:
            _remove(doomed, settings)
    return Pruned(home=settings.home, things=things, removed=remove, freed_mb=freed)


def _referred(uri: str) -> tuple[dict[str, list[str]], set[str]]:
    """The keys of variants that MLflow refers to, each with how; and the names of all models that it knows."""
    found: dict[str, list[str]] = defaultdict(list)
    registry, tracker = Registry(uri), Tracker(uri)
    registered, compared = registry.models(), tracker.models()
    for name in registered:
        for version in registry.versions(name):
            if version.aliases and (key := version.tags.get("slmops.key")):
                found[key].append(f"{name} version {version.version} ({', '.join(version.aliases)})")
    for name in compared:
        with suppress(UsageError):  # no job of it has finished
            for result in tracker.latest(name).variants:
                if result.path is not None:
                    found[result.path.name].append(f"the latest comparison of {name}")
    return found, {*registered, *compared}


def _things(settings: Settings, referred: dict[str, list[str]], names: set[str]) -> Iterator[Thing]:
    counted: set[int] = set()

    def thing(kind: str, path: Path, by: Iterable[str] = ()) -> Thing:
        sizes = {stat.st_ino: stat.st_size for stat in _files(path) if stat.st_ino not in counted}
        counted.update(sizes)
        return Thing(kind=kind, path=path, mb=sum(sizes.values()) / 1e6, referred_by=tuple(by))

    made_of: dict[str, Path] = {}  # the checkpoint of each variant that stays
    for folder in _in(settings.variants):
        if folder.name in referred and (variant := Variant.from_file(folder / MANIFEST, path=folder)):
            made_of[folder.name] = variant.checkpoint.path
        yield thing("variant", folder, referred.get(folder.name, ()))
    for folder in _in(settings.foundry / "models" / layout.PUBLISHER):
        made = Variant.from_file(folder / MANIFEST, path=folder)
        yield thing(REGISTERED, folder, referred.get(made.key, ()) if made else (NOT_OURS,))
    for folder in _in(settings.checkpoints):
        yield thing("checkpoint", folder, (key for key, path in made_of.items() if path.is_relative_to(folder)))
    for file in _in(settings.measurements):
        kept = Speeds.from_file(file) or Qualities.from_file(file)
        yield thing("measurements", file, kept.keys if kept and made_of.keys() >= {*kept.keys} else ())
    for folder in _in(settings.work("")):
        yield thing("unfinished work", folder)
    for folder in _in(settings.logs):
        yield thing("logs", folder, () if folder.is_dir() and folder.name not in names else ("MLflow",))
    unused = sum(stat.st_size for stat in _files(settings.blobs) if stat.st_nlink == 1)
    yield Thing(kind="unused blobs", path=settings.blobs, mb=unused / 1e6)
    for folder, by in ((settings.trainings, "retraining"), (settings.deployed, "this device's users")):
        yield thing("folder", folder, (by,))
    for name in ("mlflow", "prefect"):
        yield thing("folder", settings.home / name, ("the local servers",))


def _unregistered(doomed: Iterable[Thing], settings: Settings) -> list[Thing]:
    """The same without the models that Foundry Local holds on to: its catalog would keep them without their folders."""
    ids = {one.path: ":".join(one.path.name.rsplit("-", 1)) for one in doomed if one.kind == REGISTERED}
    gone = installed.forget([*ids.values()], settings.foundry, settings) if ids else ()
    return [one for one in doomed if one.path not in ids or ids[one.path] in gone]


def _remove(doomed: Iterable[Thing], settings: Settings) -> None:
    for path in {one.path for one in doomed} - {settings.blobs}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    blobs.prune(settings, unused_s=0)  # the others have left it more of them


def _in(folder: Path) -> list[Path]:
    """What is in a folder, hidden files apart, which are being written."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _files(path: Path) -> Iterator[os.stat_result]:
    for file in (path, *path.rglob("*")):
        with suppress(OSError):  # it is gone
            if file.is_file() and not file.is_symlink():
                yield file.stat()


def _freed(doomed: Iterable[Thing], settings: Settings) -> float:
    """MB that are free without them and the blobs that nothing else links to."""
    links: Counter[int] = Counter()
    files: dict[int, os.stat_result] = {}
    for path in {settings.blobs, *(one.path for one in doomed)}:
        for stat in _files(path):
            links[stat.st_ino] += 1
            files[stat.st_ino] = stat
    return sum(stat.st_size for inode, stat in files.items() if stat.st_nlink == links[inode]) / 1e6
