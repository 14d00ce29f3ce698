"""A device for the tests of what comes to it."""

from pathlib import Path

import pytest

from tests.pulled import Device


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(tmp_path, monkeypatch)
