"""Which versions of a model are on this device, and which of them its users get."""

import logging
import os
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from slmops.core import locks
from slmops.core.errors import RegistrationError, SlmopsError
from slmops.core.files import move, remove_scratch, write_atomic
from slmops.core.settings import Settings
from slmops.core.validation import check_name
from slmops.core.values import Frozen
from slmops.foundry import layout, register_worker
from slmops.foundry.versions import VERSION_MANIFEST, Installed, VersionManifest
from slmops.processes import children
from slmops.tracking.download import part_of

log = logging.getLogger(__name__)

FORGET_S = 120


class _State(Frozen):
    """Foundry ids of what the users of a model get now, and what they got before that."""

    current: str
    previous: str | None = None


def folder_of(settings: Settings) -> Path:
    """Where versions are installed, one folder each."""
    return settings.deployed / "models" / layout.PUBLISHER


def downloads_of(settings: Settings) -> Path:
    """What unfinished pulls have so far: one folder for each, named by the SHA-256 of the manifest."""
    return settings.deployed / "downloads"


def place(name: str, variant: str, number: int, settings: Settings) -> Installed:
    """A version as it is called on this device, whether it is there or not."""
    called = layout.model_name(name, variant)
    folder = folder_of(settings) / f"{called}-{number}"
    return Installed(name=name, version=number, variant=variant, foundry_id=f"{called}:{number}", folder=folder)


def versions(name: str, settings: Settings) -> list[Installed]:
    """The versions of a model that are here, newest first. A folder that is not whole does not count."""
    found = [_whole(name, folder, settings) for folder in folder_of(settings).glob(f"{check_name(name)}-*")]
    return sorted((one for one in found if one is not None), key=lambda one: one.version, reverse=True)


def current(name: str, settings: Settings) -> Installed | None:
    """The version that users of this device get, or the one before if that is gone; None: neither is here."""
    state = _State.from_file(_file(name, settings))
    if state is None:
        return None
    here = {one.foundry_id: one for one in versions(name, settings)}
    if state.current not in here:
        log.warning("%s is no longer on this device, or is not whole", state.current)
    return here.get(state.current) or here.get(state.previous or "")


def make_current(version: Installed, settings: Settings) -> None:
    """Note, when :func:`locked`, that users get ``version`` now; remove all but it and the one that they had before."""
    state = _State.from_file(_file(version.name, settings))
    if state is None or state.current != version.foundry_id:
        state = _State(current=version.foundry_id, previous=state.current if state else None)
        write_atomic(_file(version.name, settings), state.model_dump_json(indent=2) + "\n")
    _keep(version.name, {state.current, state.previous}, settings)
    for folder in downloads_of(settings).glob("*"):
        manifest = VersionManifest.from_file(part_of(folder, VERSION_MANIFEST))
        if manifest is not None and manifest.model == version.name:  # of a version that was given up
            shutil.rmtree(folder, ignore_errors=True)


def tidy(name: str, foundry_ids: Collection[str], settings: Settings) -> None:
    """Remove the versions of a model that are neither among ``foundry_ids`` nor what users of this device get."""
    with locked(name, settings):
        state = _State.from_file(_file(name, settings))
        _keep(name, {*foundry_ids, *((state.current, state.previous) if state else ())}, settings)


def locked(name: str, settings: Settings) -> AbstractContextManager[None]:
    """Hold the lock under which versions of a model are installed and removed."""
    return locks.exclusive(settings.locks / f"pull-{check_name(name)}.lock", f"the installation of {name!r}", wait=True)


def catalog_locked(settings: Settings) -> AbstractContextManager[None]:
    """Hold the lock of Foundry Local's catalog in ``settings.deployed``."""
    return locks.exclusive(settings.locks / "deployed.lock", "the catalog of installed versions", wait=True)


def forget(foundry_ids: Sequence[str], home: Path, settings: Settings) -> tuple[str, ...]:
    """Take models, which it would keep without their folders, out of the catalog of a Foundry home, whose lock is held.

    Returned are those that are not in it any more; a failure is only logged.
    """
    try:
        result, _ = children.call(
            register_worker.forget_all,
            register_worker.ForgetRequest(home=home, foundry_ids=tuple(foundry_ids)),
            log=settings.logs / "installed.forget.log",
            timeout_s=FORGET_S,
            error=RegistrationError,
        )
    except SlmopsError as error:
        log.warning("%s stay in Foundry Local's catalog: %s", ", ".join(foundry_ids), error.message)
        return ()
    return result.forgotten


def move_aside(folder: Path, settings: Settings) -> Path:
    """Move an installed version to where no runtime finds it, or raise an OSError, if a file of it is in use.

    The next call removes what a dead process left there.
    """
    aside = settings.deployed / "aside"
    aside.mkdir(parents=True, exist_ok=True)
    remove_scratch(aside)
    target = aside / f".{folder.name}.{os.getpid()}.part"
    shutil.rmtree(target, ignore_errors=True)
    return move(folder, target)


def _whole(name: str, folder: Path, settings: Settings) -> Installed | None:
    """The version of a model in a folder; None: it is not one, or not all of it is there."""
    manifest = VersionManifest.from_file(folder / VERSION_MANIFEST)
    number = folder.name.rpartition("-")[2]
    if manifest is None or not re.fullmatch(r"[1-9][0-9]*", number):
        return None
    found = place(name, manifest.variant, int(number), settings)
    there = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    whole = all(there.get(layout.released(folder, file.name)) == file.size for file in manifest.files)
    return found if found.folder == folder and whole and folder / layout.INFERENCE_MODEL in there else None


def _keep(name: str, foundry_ids: Collection[str | None], settings: Settings) -> None:
    superseded = [one for one in versions(name, settings) if one.foundry_id not in foundry_ids]
    if not superseded:
        return
    with catalog_locked(settings):
        gone = forget([one.foundry_id for one in superseded], settings.deployed, settings)
    for one in superseded:
        if one.foundry_id not in gone:
            continue
        # Whole or not at all: some systems would remove all files but one that is in use.
        try:
            aside = move_aside(one.folder, settings)
        except OSError as error:
            log.warning("%s cannot be removed yet: %s", one.folder, error.strerror)
            continue
        shutil.rmtree(aside, ignore_errors=True)
        log.info("%s is removed: it is neither the current version nor the one before", one.foundry_id)


def _file(name: str, settings: Settings) -> Path:
    return settings.deployed / f"{check_name(name)}.json"
