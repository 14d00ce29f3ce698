"""MLflow's managed datasets: the records that people gather on its pages or with ``mlflow.genai.datasets``."""

from __future__ import annotations

import os
from typing import Any

from slmops.tracking.client import Client, talking, without_password

import mlflow

from slmops.core.errors import DataError


def records(uri: str, name: str) -> list[dict[str, Any]]:
    """Every record of a dataset: its ``dataset_record_id``, ``inputs`` and ``expectations``, in MLflow's order.

    That order is by time, and by chance among the records that were added together.

    Args:
        uri: MLflow's tracking URI.
        name: The dataset's name.

    Raises:
        DataError: There is no dataset with this name, or more than one: MLflow allows that.
        TrackingError: MLflow cannot be reached.
    """
    shown = without_password(uri)
    absent = DataError(
        f"MLflow at {shown} has no dataset of the name {name!r}.",
        "Its page 'Datasets' lists them, each with its experiment.",
    )
    quote = "'" if '"' in name else '"'
    if quote in name:
        raise absent  # MLflow's filters cannot spell such a name
    before = os.environ.get("MLFLOW_TRACKING_URI")
    with talking(uri):
        same = Client(uri).search_datasets(filter_string=f"name = {quote}{name}{quote}")
        if not same:
            raise absent
        if len(same) > 1:
            raise DataError(f"MLflow at {shown} has more than one dataset of the name {name!r}.", "Delete all but one.")
        # A dataset loads its records from the address of the whole process.
        mlflow.set_tracking_uri(uri)
        try:
            loaded = same[0].records
        finally:
            mlflow.set_tracking_uri(before)
    return [
        {"dataset_record_id": one.dataset_record_id, "inputs": one.inputs, "expectations": one.expectations or {}}
        for one in loaded
    ]
