"""MLflow's managed datasets: the records that people gather on its pages or with ``mlflow.genai.datasets``."""

from __future__ import annotations

from typing import Any

from slmops.tracking.client import talking, without_password  # first: it sets the environment that MLflow reads

# isort: split
from mlflow import MlflowClient

from slmops.core.errors import DataError


def records(uri: str, name: str) -> list[dict[str, Any]]:
    """Every record of a dataset: its ``dataset_record_id``, ``inputs`` and ``expectations``, in MLflow's order.

    That order is by time, and by chance among the records that were added together. ``mlflow.genai.datasets`` itself
    knows no address but that of the whole process, hence the client's store.

    Args:
        uri: MLflow's tracking URI.
        name: The dataset's.

    Raises:
        DataError: There is no dataset with this name, or more than one: MLflow allows that.
        TrackingError: MLflow cannot be reached.
    """
    quote = "'" if '"' in name else '"'
    if quote in name:
        raise _not_found(uri, name)  # MLflow's filters cannot spell such a name
    with talking(uri):
        client = MlflowClient(tracking_uri=uri)
        found = client.search_datasets(filter_string=f"name = {quote}{name}{quote}", max_results=2)
        if not found:
            raise _not_found(uri, name)
        if len(found) > 1:
            raise DataError(
                f"MLflow at {without_password(uri)} has more than one dataset of the name {name!r}.",
                "Delete all but one.",
            )
        loaded, _ = client._tracking_client.store._load_dataset_records(found[0].dataset_id, max_results=None)
        return [
            {"dataset_record_id": one.dataset_record_id, "inputs": one.inputs, "expectations": one.expectations or {}}
            for one in loaded
        ]


def _not_found(uri: str, name: str) -> DataError:
    return DataError(
        f"MLflow at {without_password(uri)} has no dataset of the name {name!r}.",
        "Its page 'Datasets' lists them, each with its experiment.",
    )
