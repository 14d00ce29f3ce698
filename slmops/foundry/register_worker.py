"""Child process: register a folder in Foundry Local's local catalog, and check that it is listed and answers.

Also the way back: the catalog keeps models when their folders are removed.
"""

from pathlib import Path
from typing import Any

from slmops.core.errors import RegistrationError
from slmops.core.targets import of_model
from slmops.core.values import Frozen

PROMPTS = ("What is the capital of France?", "Say hello.", "Count from one to ten.")
MAX_TOKENS = 24


class RegisterRequest(Frozen):
    home: Path
    folder: Path
    foundry_id: str
    display_name: str
    answer: str | None = None  # known from before: then it is not asked


class RegisterResult(Frozen):
    answer: str
    not_run: str | None = None  # why it was not asked


def handle(request: RegisterRequest) -> RegisterResult:
    """Register, list, load, ask. A model that fails is taken out of the catalog again, with a RegistrationError."""
    from slmops.foundry import runtime

    catalog = runtime.local_catalog(request.home)
    try:
        model = runtime.add(catalog, request.folder, request.foundry_id, request.display_name)
        if request.foundry_id not in {one.id for listed in catalog.list_models() for one in (listed, *listed.variants)}:
            raise RegistrationError(f"Foundry Local does not list {request.foundry_id} after it was registered.")
        if (why := runtime.missing(runtime.started(request.home), of_model(request.foundry_id).provider)) is not None:
            return RegisterResult(answer="", not_run=why)
        if request.answer is not None:
            return RegisterResult(answer=request.answer)
        model.load()
        for prompt in PROMPTS:
            reply = runtime.ask(model, [{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS)
            if reply.completion_tokens > 0:
                break
        model.unload()
        if reply.completion_tokens == 0:
            raise RegistrationError(f"{request.foundry_id} answers nothing to {' nor '.join(map(repr, PROMPTS))}.")
    except (runtime.Fault, RegistrationError) as error:
        forget(catalog, request.foundry_id)
        if isinstance(error, RegistrationError):
            raise
        raise RegistrationError(f"Foundry Local refuses {request.foundry_id}: {error}") from error
    return RegisterResult(answer=reply.text or reply.reasoning)


class ProviderRequest(Frozen):
    home: Path
    provider: str


class ProviderResult(Frozen):
    missing: str | None  # why it is not here


def look_for(request: ProviderRequest) -> ProviderResult:
    """Whether this device has an execution provider, which is fetched if Foundry Local can do that."""
    from slmops.foundry import runtime

    return ProviderResult(missing=runtime.missing(runtime.started(request.home), request.provider))


class ForgetRequest(Frozen):
    home: Path
    foundry_ids: tuple[str, ...]


class ForgetResult(Frozen):
    """The models that the catalog no longer has, or never had."""

    forgotten: tuple[str, ...]


def forget_all(request: ForgetRequest) -> ForgetResult:
    """Unregister models; a failure is only printed."""
    from slmops.foundry import runtime

    catalog = runtime.local_catalog(request.home)
    for foundry_id in request.foundry_ids:
        forget(catalog, foundry_id)
    gone = (foundry_id for foundry_id in request.foundry_ids if catalog.get_model_variant(foundry_id) is None)
    return ForgetResult(forgotten=tuple(gone))


def forget(catalog: Any, foundry_id: str) -> None:
    """Take a model out of the catalog if it is there; a failure is only printed."""
    from slmops.foundry import runtime

    try:
        if (model := catalog.get_model_variant(foundry_id)) is not None:
            if model.is_loaded:
                model.unload()
            catalog.unregister_model(foundry_id)
    except runtime.Fault as error:
        print(f"could not take {foundry_id} out of the catalog: {error}")
