"""Whether Foundry Local reads a checkpoint's conversations as the checkpoint does, asked before any work."""

import logging
from pathlib import Path

from slmops.core.errors import CheckpointError, RegistrationError
from slmops.core.files import scratch_folder
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Agreement
from slmops.foundry import agreement_worker
from slmops.foundry.agreement_worker import OTHER_TEMPLATE, AgreementRequest
from slmops.processes import children

log = logging.getLogger(__name__)

TIMEOUT_S = 300


def agree(folder: Path, template: str | None, job: Job, settings: Settings) -> Agreement:
    """Compare tokens and rendered conversations of a checkpoint in a child process, and say what differs.

    ``template`` is the chat template that it is to have; None: its own. It is a CheckpointError if they differ where it
    matters, or if the runtime cannot read the tokenizer or the template.
    """
    with scratch_folder(settings.home, "agreement") as work:
        trusted, copy = job.trust_remote_code, work / "tokenizer"
        request = AgreementRequest(folder=folder, template=template, trust_remote_code=trusted, work=copy)
        try:
            result, _ = children.call(
                agreement_worker.handle,
                request,
                log=settings.logs / "agreement.log",
                timeout_s=TIMEOUT_S,
                error=RegistrationError,
                # A template may write the date, and nobody is to wait for midnight.
                env={"TZ": "UTC", "HF_HUB_OFFLINE": "1"},
            )
        except RegistrationError as error:
            said = f"Foundry Local's runtime does not survive the tokenizer or the chat template: {error.message}"
            raise CheckpointError(said, OTHER_TEMPLATE) from None
    if result.why is not None:
        why = "whose own rendering of it is another"
        log.info("the chat template is rewritten for Foundry Local, %s: %s", why, result.why)
    if result.files:
        log.info("the tokenizer is rewritten for Foundry Local, which reads and writes its blanks otherwise")
    for what, differences in (("texts", result.tokenizer_mismatches), ("conversations", result.template_mismatches)):
        if differences:
            log.warning("Foundry Local takes %d odd %s otherwise: %s", len(differences), what, differences[0])
    return result
