"""Put a variant into Foundry Local: laid out, registered, listed and answering, or not at all."""

import logging
import shutil
from pathlib import Path

from slmops.checkpoints import chat_template
from slmops.core import locks, machine
from slmops.core.errors import CheckpointError, RegistrationError, SlmopsError
from slmops.core.files import remove_scratch, write_atomic
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.targets import CPU, TARGETS, of_model
from slmops.core.values import Frozen, Registration, Variant
from slmops.foundry import cli, layout, prompt_template, register_worker
from slmops.foundry.register_worker import RegisterRequest, RegisterResult
from slmops.processes import children

log = logging.getLogger(__name__)

PROVIDER_S = 1800  # to find an execution provider, and to fetch it if it is to be had


class Answered(Frozen):
    """What a registered folder has answered, and with which packages."""

    answer: str
    versions: dict[str, str]


def register(
    variant: Variant, name: str, job: Job, settings: Settings, within: children.Child | None = None
) -> Registration:
    """Register a variant as ``<name>-<precision>-generic-cpu:<version>``; doing it twice is harmless.

    It is done ``within`` a child that others share, or one of its own. What has answered before is not asked again,
    unless other packages are installed now. Where there is no device for its target, it is only listed.

    A RegistrationError if Foundry Local refuses or does not list it, or it answers nothing. Nothing is left behind.
    """
    template = chat_template.load(variant.path)
    if template is None:
        raise CheckpointError(f"{variant.path} has no chat template.", "Give one with --chat-template FILE.")
    strings = prompt_template.derive(template)
    models = settings.foundry / "models"
    with locks.exclusive(settings.locks / "foundry.lock", "Foundry Local's registry", wait=True):
        remove_scratch(models / layout.PUBLISHER)
        folder, version, new = layout.place(variant, name, job, strings, settings.foundry)
        called = layout.model_name(name, variant.name)
        foundry_id = f"{called}:{version}"
        try:
            cli.confirm(called, models)
            placed = settings.foundry, folder, foundry_id, f"{name} {variant.name}"
            log_file = settings.logs / name / f"{variant.name}.register.log"
            proof = settings.foundry / "answered" / f"{folder.name}.json"
            before = None if new or job.remeasure else Answered.from_file(proof)
            known = before.answer if before and before.versions == machine.versions() else None
            done = register_folder(*placed, log=log_file, within=within, known=known)
            if done.not_run is None:
                write_atomic(proof, Answered(answer=done.answer, versions=machine.versions()).model_dump_json())
        except SlmopsError:
            if new:
                shutil.rmtree(folder, ignore_errors=True)
            raise
    log.info("%s: %s in Foundry Local as %s", variant.name, "registered" if new else "still registered", foundry_id)
    if done.not_run is not None:
        log.warning("%s: made, not measured here: %s", variant.name, done.not_run)
    return Registration(foundry_id=foundry_id, path=folder, answer=done.answer, not_run=done.not_run)


def register_folder(
    home: Path,
    folder: Path,
    foundry_id: str,
    display_name: str,
    *,
    log: Path,
    within: children.Child | None = None,
    known: str | None = None,
) -> RegisterResult:
    """Register a folder in Foundry's layout in a child process; its answer to a prompt, or a RegistrationError.

    It is not asked if its answer is ``known``, or if the execution provider that it needs is not here.
    """
    of = {"home": home, "folder": folder, "foundry_id": foundry_id, "display_name": display_name}
    timeout_s = 600 if of_model(foundry_id) == TARGETS[CPU] else PROVIDER_S
    request = RegisterRequest(**of, answer=known)
    result, _ = children.call(
        register_worker.handle, request, log=log, timeout_s=timeout_s, error=RegistrationError, within=within
    )
    return result
