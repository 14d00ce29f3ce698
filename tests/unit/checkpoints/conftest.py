"""A checkpoint, a home, and a way to resolve the one in the other."""

from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import source
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from tests import making
from tests.checkpoint_folders import Resolve, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "My.Model-v2")


@pytest.fixture
def resolve(settings: Settings) -> Resolve:
    def call(model: object, download: source.Download = making.no_download, **job: Any) -> Checkpoint:
        return source.resolve(Job(model=str(model), **job), settings, download=download)

    return call
