"""Child process: run one Olive workflow."""

from typing import Any

from slmops.conversion import builder_fixes, olive_fixes
from slmops.core.values import Frozen


class Workflow(Frozen):
    """A complete Olive workflow config."""

    config: dict[str, Any]


def handle(request: Workflow) -> Frozen:
    """Run the workflow; it leaves its model in a folder that it names."""
    from olive import run

    builder_fixes.apply()
    olive_fixes.apply()
    run(request.config)
    return Frozen()
