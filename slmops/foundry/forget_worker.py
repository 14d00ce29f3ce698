"""Child process: take models out of Foundry Local's local catalog, which keeps them when their folders are removed."""

from pathlib import Path

from slmops.core.values import Frozen
from slmops.foundry import register_worker


class ForgetRequest(Frozen):
    home: Path
    foundry_ids: tuple[str, ...]


class ForgetResult(Frozen):
    """The models that the catalog no longer has, or never had."""

    forgotten: tuple[str, ...]


def handle(request: ForgetRequest) -> ForgetResult:
    """Unregister the models; a failure is only printed."""
    from slmops.foundry import runtime

    catalog = runtime.local_catalog(runtime.manager(request.home))
    for foundry_id in request.foundry_ids:
        register_worker.forget(catalog, foundry_id)
    gone = (foundry_id for foundry_id in request.foundry_ids if catalog.get_model_variant(foundry_id) is None)
    return ForgetResult(forgotten=tuple(gone))
