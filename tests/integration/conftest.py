"""What several modules need and takes a while to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.settings import Settings
from tests import making


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that answers."""
    return making.talkative("llama-tied", tmp_path_factory.mktemp("talkative") / "tiny")


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home for variants that are converted once; nothing is registered there, and nobody alters it."""
    return Settings(home=tmp_path_factory.mktemp("stock"))
