"""The command that looks after what is deployed: remeasure."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from slmops.cli.flows import prefect_running, say
from slmops.evaluation import drift
from slmops.evaluation.drift import DriftError, Remeasure, Remeasured


def remeasure(request: Annotated[Remeasure, Parameter(name="*")], /, *, json: bool = False) -> int:
    """Measure what is deployed once more, as a device gets it; start the local servers if needed.

    Ends with 3 if it is slower, larger in memory or worse than what was recorded when it was evaluated.

    Parameters
    ----------
    json
        Print the result as JSON.
    """
    with prefect_running() as servers:
        from flows.remeasure import remeasure

        try:
            _show(remeasure(request), servers.tracking_uri, json=json)
        except DriftError as error:
            _show(error.result, servers.tracking_uri, json=json)
            raise
    return 0


def _show(result: Remeasured, tracking_uri: str, *, json: bool) -> None:
    from slmops.tracking.tracker import Tracker

    print(result.model_dump_json(indent=2) if json else drift.text(result), flush=True)
    if result.run_id is not None:
        say(f"\nin MLflow: {Tracker(tracking_uri).run_url(result.run_id)}")
