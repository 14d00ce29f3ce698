"""The private catalog as a client sees it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from slmops.foundry.private_catalog import app
from tests.catalogs import ENTRIES


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """Raises what the application does not catch."""
    with TestClient(app(lambda: ENTRIES)) as opened:
        yield opened
