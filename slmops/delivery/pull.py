"""Bring a version from the registry onto this device: fitting, verified file by file, registered, answering.

Names in a manifest come from elsewhere: they become paths only after they were checked.
"""

import errno
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from slmops.core import blobs, machine
from slmops.core.errors import PrerequisiteError, RegistrationError, SlmopsError, TrackingError, UsageError
from slmops.core.files import (
    folder_appears_whole,
    intact,
    link_or_copy,
    move,
    remove_scratch,
    stays_below,
    write_atomic,
)
from slmops.core.names import is_name
from slmops.core.settings import Settings
from slmops.core.targets import CPU, TARGETS, target_of
from slmops.core.validation import problems
from slmops.core.values import VariantFile, is_weights
from slmops.delivery import installed, trouble
from slmops.foundry import cli, layout, register, register_worker
from slmops.foundry.register_worker import PROMPTS
from slmops.foundry.versions import FILES, VERSION_MANIFEST, Installed, ModelVersion, VersionManifest
from slmops.processes import children
from slmops.tracking import download
from slmops.tracking.download import Origin, part_of, size_of

if TYPE_CHECKING:
    from slmops.tracking.registry import Registry

log = logging.getLogger(__name__)


def split(reference: str) -> tuple[str, str | None]:
    """Name, and alias or version number, of ``NAME``, ``NAME@ALIAS`` or ``NAME@VERSION``; else a UsageError."""
    name, at, which = reference.partition("@")
    if not is_name(name) or (at and not is_name(which)):
        fix = "Write NAME, NAME@ALIAS (such as bot@int8) or NAME@VERSION (such as bot@3)."
        raise UsageError(f"{reference!r} does not name a model.", fix)
    return name, which or None


def fitting(registry: "Registry", name: str, which: str | None, settings: Settings) -> ModelVersion:
    """The version to have on this device: the one that ``which``, an alias or a number, names; a UsageError if none is.

    By default it is that of the champion's release whose target this device has, a GPU before the CPU. If none fits, it
    is the largest of the other versions of its job that does. A PrerequisiteError says that nothing fits this device.
    """
    if which is not None:
        version = registry.find(name, which)
        return _check_fits(version, _problem(version, settings), f"`slmops pull {name}` takes the largest that fits.")
    champion = registry.champion(name)
    if champion is None:
        raise UsageError(f"Nothing of {name} is promoted.", f"Run `slmops promote {name}` on the machine that made it.")
    release = _best_first(registry.release(champion))
    others = [one for one in registry.versions(name) if one.job_id == champion.job_id and one.uploaded]
    others = [one for one in others if one not in release]
    problems: dict[str, str] = {}
    for version in (*release, *sorted(others, key=lambda one: (-one.size_mb, -one.version))):
        problem = _problem(version, settings)
        if problem is not None:
            problems[version.label] = problem
            continue
        if version in others:
            said = "the champion, %s, does not fit this device: %s. Taking the largest of the same job that fits: %s"
            log.warning(said, champion.label, problems[champion.label], version.label)
        return version
    said = "".join(f" {label}: {problem}." for label, problem in problems.items())
    fix = "Promote a smaller variant, run its job with --upload, or use a larger device."
    raise PrerequisiteError(f"No version of {name} fits this device.{said}", fix)


def of_release(release: list[ModelVersion], settings: Settings) -> ModelVersion | None:
    """The version of a release whose target this device has, a GPU before the CPU; None if none fits."""
    return next((one for one in _best_first(release) if _problem(one, settings) is None), None)


def _best_first(release: list[ModelVersion]) -> list[ModelVersion]:
    return sorted(release, key=lambda one: -[*TARGETS].index(target_of(one.variant)))


def _check_fits(version: ModelVersion, problem: str | None, fix: str) -> ModelVersion:
    if problem is not None:
        raise PrerequisiteError(f"{version.label} does not fit this device: {problem}.", fix)
    return version


def _problem(version: ModelVersion, settings: Settings) -> str | None:
    """Why this device cannot run a version; None if it can."""
    problem = _too_large(version)
    if problem is not None or version.device == "cpu":
        return problem
    request = register_worker.ProviderRequest(home=settings.deployed, provider=version.provider)
    log_file = settings.logs / version.name / f"{version.variant}.provider.log"
    try:
        found, _ = children.call(
            register_worker.look_for, request, log=log_file, timeout_s=register.PROVIDER_S, error=RegistrationError
        )
    except RegistrationError as error:  # such as a driver that crashes: the CPU is still there
        return f"it is made for {version.device}, and looking for {version.provider} failed: {error.message}"
    return f"it is made for {version.device}, and {found.missing}" if found.missing else None


def _too_large(version: ModelVersion) -> str | None:
    memory_mb = machine.hardware().memory_gb * 1000
    needed_mb = version.memory_mb or version.size_mb  # where it was not measured, at least its files
    if needed_mb > memory_mb:
        return f"it needs {needed_mb:.0f} MB of memory, and there are {memory_mb:.0f} MB"
    return None


def pull(name: str, which: str | None, settings: Settings, uri: str) -> Installed:
    """Install the version that :func:`fitting` finds and make it the current one; see there for the errors."""
    from slmops.tracking.registry import Registry

    try:
        with installed.locked(name, settings):
            done = _install(fitting(Registry(uri), name, which, settings), settings, uri)
            installed.make_current(done, settings)
    except SlmopsError as error:
        trouble.tell(name, error.message, settings)
        raise
    return done


def install(version: ModelVersion, settings: Settings, uri: str) -> Installed:
    """Bring a version onto this device, whole and verified, and register it in Foundry Local; twice is harmless.

    The next attempt goes on with what a broken one has brought. Other versions are not touched. One that is for another
    device is not asked. It is a PrerequisiteError if it is too large, was not uploaded and is not here, or the disk is
    full; a TrackingError if the registry cannot be reached, or its files are gone or altered; and a RegistrationError
    if Foundry Local refuses it, or it answers nothing. A new version is then removed again.
    """
    with installed.locked(version.name, settings):
        return _install(version, settings, uri)


def _install(version: ModelVersion, settings: Settings, uri: str) -> Installed:
    _check_fits(version, _too_large(version), "Use a larger device, or promote a smaller variant.")
    if not is_name(version.variant) or not re.fullmatch("[0-9a-f]{64}", version.manifest_sha256):
        raise TrackingError(f"{version.label} was not made by slmops: its tags make no sense.")
    done = installed.place(version.name, version.variant, version.version, settings)
    folder = done.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_scratch(folder.parent)
        here = VersionManifest.from_file(folder / VERSION_MANIFEST)
        if here is not None and here.model != version.name:
            said = f"{folder} holds a version of {here.model}, whose name and variant together read the same."
            raise RegistrationError(said, "Give one of the two models another name.")
        if here is not None and _is_whole(done, here, version.manifest_sha256):
            log.info("%s is on this device already", version.label)
            layout.fit(folder)  # it may have been installed with fewer cores
            _register(done, settings)
            return done
        downloads = installed.downloads_of(settings) / version.manifest_sha256
        manifest = _bring(version, settings, Origin(uri, version.location, version.label), downloads)
        with _replacing(folder, settings):
            with folder_appears_whole(folder) as scratch:
                for file in [*(file.name for file in manifest.files), VERSION_MANIFEST]:
                    (scratch / file).parent.mkdir(parents=True, exist_ok=True)
                    move(part_of(downloads, file), scratch / file)
                described = json.dumps(_inference_model(done, manifest), indent=2, ensure_ascii=False)
                write_atomic(scratch / layout.INFERENCE_MODEL, described)
                layout.fit(scratch)
            shutil.rmtree(downloads, ignore_errors=True)
            _register(done, settings)
    except OSError as error:
        problem = f"{error.filename or settings.deployed} cannot be written: {error.strerror or error}."
        writable = "Make it writable, or set SLMOPS_HOME to another folder."
        raise PrerequisiteError(problem, children.FREE_SPACE if error.errno == errno.ENOSPC else writable) from error
    log.info("%s: in Foundry Local as %s", version.label, done.foundry_id)
    return done


def _bring(version: ModelVersion, settings: Settings, origin: Origin, downloads: Path) -> VersionManifest:
    """Complete the download folder: files that this device has are linked, the others are fetched."""
    read = download.fetch(origin, VERSION_MANIFEST, None, version.manifest_sha256, downloads).read_bytes()
    try:
        manifest = VersionManifest.model_validate_json(read)
    except ValidationError as error:
        said = f"{VERSION_MANIFEST} of {version.label} is not understood: {problems(error)[0]}."
        raise TrackingError(said, "A newer slmops may have made it: update the one on this device.") from error
    _check(manifest, version)
    missing: list[VariantFile] = []
    for file in manifest.files:
        part = part_of(downloads, file.name)
        if intact(part, file.size, file.sha256):
            continue
        twin = blobs.find(file, settings, settings.variants / manifest.key / file.name)
        if twin is None:
            missing.append(file)
        else:
            part.unlink(missing_ok=True)
            link_or_copy(twin, part)
    if lost := [] if version.uploaded else [file.name for file in missing if is_weights(file.name)]:
        said = f"{', '.join(lost)} of {version.label} are not on this machine, and not in the registry:"
        again = f"`slmops run --model {version.tags.get('slmops.source')} --name {version.name}`"
        fix = f"Promote it there. If it is gone there, {again} makes it anew; with --upload any machine can promote it."
        raise PrerequisiteError(f"{said} they were {version.tags[FILES]}.", fix)
    needed = sum(file.size - size_of(part_of(downloads, file.name)) for file in missing)
    free = machine.disk_free(downloads)
    if needed > free:
        said = f"{needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB are free at {settings.deployed}"
        raise PrerequisiteError(f"Not enough disk for {version.label}: {said}.", children.FREE_SPACE)
    here = len(manifest.files) - len(missing)
    log.info("%s: %d files to fetch (%.0f MB), %d are here", version.label, len(missing), needed / 1e6, here)
    for file in missing:
        blobs.keep(download.fetch(origin, file.name, file.size, file.sha256, downloads), file, settings)
    return manifest


def _check(manifest: VersionManifest, version: ModelVersion) -> None:
    said = f"{VERSION_MANIFEST} of {version.label}"
    if (manifest.model, manifest.variant) != (version.name, version.variant) or not stays_below(manifest.key):
        raise TrackingError(f"{said} is that of {manifest.model} ({manifest.variant}, {manifest.key}).")
    taken = {VERSION_MANIFEST, layout.INFERENCE_MODEL, layout.RELEASED_CONFIG}
    folders: set[str] = set()
    for file in manifest.files:
        name = file.name.casefold()  # some file systems ignore case
        if not stays_below(name) or name in taken:
            fix = "Nothing of it was installed. Whoever put it into the registry has to promote it again."
            raise TrackingError(f"{said} names a file {file.name!r}, which is not a possible name.", fix)
        taken.add(name)
        folders |= {str(parent) for parent in PurePosixPath(name).parents}
    if taken & folders:
        raise TrackingError(f"{said} names {min(taken & folders)!r} as a file and as a folder.")


@contextmanager
def _replacing(folder: Path, settings: Settings) -> Iterator[None]:
    """Move aside what lies in the place of a version, and move it back if the block fails."""
    aside = None
    if folder.exists():
        log.warning("%s is not what the registry has: replacing it", folder)
        aside = installed.move_aside(folder, settings)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if aside is not None:
            move(aside, folder)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(done: Installed, manifest: VersionManifest, digest: str) -> bool:
    """Whether the installed version with this manifest is the one of the registry, down to each byte."""
    try:
        described = json.loads((done.folder / layout.INFERENCE_MODEL).read_bytes())
    except (OSError, ValueError):
        return False
    return (
        described == _inference_model(done, manifest)
        and intact(done.folder / VERSION_MANIFEST, None, digest)
        and all(intact(layout.released(done.folder, one.name), one.size, one.sha256) for one in manifest.files)
    )


def _inference_model(done: Installed, manifest: VersionManifest) -> dict[str, Any]:
    return {**manifest.inference_model, "Name": done.foundry_id, "Version": str(done.version)}


def _register(done: Installed, settings: Settings) -> None:
    """See that Foundry Local lists it, and that it answers, if its device is here."""
    called, cache = layout.model_name(done.name, done.variant), settings.deployed / "models"
    placed = settings.deployed, done.folder, done.foundry_id, f"{done.name} {done.variant}"
    with installed.catalog_locked(settings):
        cli.confirm(called, cache)
        if target_of(done.variant) == CPU:
            cli.ask(called, cache, PROMPTS[0])
        try:
            log_file = settings.logs / done.name / f"{done.variant}.pull.log"
            register.register_folder(*placed, log=log_file)
        except SlmopsError:
            installed.forget([done.foundry_id], settings.deployed, settings)  # a child that crashed has not
            raise
