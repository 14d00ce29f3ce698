"""What the worker and its flow runs see of the settings."""

from pathlib import Path

import pytest

from slmops.core.pools import Pool
from slmops.core.settings import Settings
from slmops.local import stack
from slmops.local.stack import Stack

STACK = Stack(prefect_url="http://p", prefect_api_url="http://p/api", tracking_uri="http://m")


@pytest.mark.usefixtures("no_settings")
@pytest.mark.parametrize("name", ["plain", "B\u00fccher \u4e66", 'with "quotes" and \\'])
def test_a_worker_reads_the_settings_that_started_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        home=tmp_path / name,
        mlflow_port=5001,
        evaluation_timeout_s=1.5,
        judge_api_key=name,  # type: ignore[arg-type]
        pools=(Pool(name="big", memory_gb=64), Pool(name="b\u00fc", memory_gb=8)),
    )
    for variable, value in stack._worker_environment(settings, STACK).items():
        monkeypatch.setenv(variable, value)
    seen = Settings()
    # The servers are not settings of the worker's: what it is told is where they are.
    assert seen.model_copy(update={"prefect_api_url": None}) == settings
