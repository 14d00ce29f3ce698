"""How MLflow's errors reach a user."""

import time
from functools import partial

from slmops.tracking.client import talking

import pytest
from mlflow.exceptions import MlflowException
from requests.exceptions import ConnectionError as NoConnection

from slmops.core.errors import TrackingError
from slmops.tracking.registry import Registry
from slmops.tracking.training import TrainingTracker
from tests import values

URI = "https://me:secret@mlflow.example:5000"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MlflowException("the server went away\nand more"), "the server went away"),
        (
            MlflowException(f"API request to {URI}/api failed"),
            "API request to https://***@mlflow.example:5000/api failed",
        ),
        (NoConnection("HTTPSConnectionPool(host='mlflow.example', port=5000): Max retries"), "it cannot be reached"),
        (
            NoConnection(
                "HTTPConnectionPool(host='m', port=5000): (Caused by ResponseError('too many 500 error responses'))"
            ),
            "each time it had an error of its own, which its log tells, such as a full disk",
        ),
        (NoConnection("('Connection broken: IncompleteRead(0 bytes read)'"), "the connection broke"),
        (OSError(), "OSError"),
        (MlflowException("x" * 1000), "x" * 300),
    ],
)
def test_the_first_line_without_passwords(error: Exception, said: str) -> None:
    with pytest.raises(TrackingError) as caught, talking(URI):
        raise error
    assert caught.value.message == f"MLflow at https://***@mlflow.example:5000 failed: {said}"


def test_the_address_of_a_page_has_no_password() -> None:
    page = Registry(f"{URI}/").page(values.model_version(3))
    assert page == "https://mlflow.example:5000/#/models/bot/versions/3"


def test_a_dead_server_is_an_error_of_its_own_and_noticed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    started, dead = time.monotonic(), Registry("http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="slmops up"):
        dead.models()
    assert time.monotonic() - started < 30
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    data = TrainingTracker("http://127.0.0.1:9")
    of_model = (dead.champion, dead.versions, lambda name: dead.find(name, "1"), data.records)
    for ask in (dead.models, *(partial(one, "x") for one in of_model)):
        with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9"):
            ask()
