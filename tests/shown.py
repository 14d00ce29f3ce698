"""What Prefect shows of the flows that a test ran, and its REST API."""

from collections import Counter
from typing import Any

import httpx
from prefect.client.base import PrefectHttpxSyncClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort


def api(url: str) -> httpx.Client:
    """A client of the API at ``url``, to which paths are relative; a server whose SQLite is busy is asked again."""
    return PrefectHttpxSyncClient(base_url=url, timeout=30, raise_on_all_errors=False)


def flow_runs(flow: str) -> list[FlowRun]:
    """The runs of a flow, oldest first."""
    with get_client(sync_client=True) as client:
        named = FlowFilter(name=FlowFilterName(any_=[flow]))
        return client.read_flow_runs(flow_filter=named, sort=FlowRunSort.START_TIME_ASC)


def artifacts(run: FlowRun, processes: int = 1) -> dict[str, Any]:
    """Key to data, which each of the processes of a resumed run may write; what has no key is the flow's result."""
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        made = client.read_artifacts(artifact_filter=of_run, limit=50)
    keyed = [artifact for artifact in made if artifact.key is not None]
    assert max(Counter(artifact.key for artifact in keyed).values(), default=0) <= processes
    return {str(artifact.key): artifact.data for artifact in keyed}
