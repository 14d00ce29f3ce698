"""The servers of docker-compose.yml, for every test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose import Compose

PASSWORD = "p@ss:/w#rd %41'$x"
"""With all that breaks a URL, a shell or a variable."""


@pytest.fixture(scope="session")
def servers() -> Iterator[Compose]:
    """PostgreSQL, Prefect and MLflow, healthy. Whoever stops one starts it again."""
    with Compose({"POSTGRES_PASSWORD": PASSWORD}) as compose:
        compose.up("prefect", "mlflow")
        yield compose
