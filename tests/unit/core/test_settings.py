"""Settings as they come from the environment."""

from pathlib import Path

import pytest

from slmops.core.settings import Settings

pytestmark = pytest.mark.usefixtures("no_settings")

NAMES = {"tracking_uri": "MLFLOW_TRACKING_URI", "prefect_api_url": "PREFECT_API_URL"}


@pytest.mark.parametrize("field", NAMES)
def test_an_empty_variable_is_not_set_and_gives_way_to_the_name_that_others_use(
    field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ours, given, taken in (
        *(("", None, None), (" ", None, None), ("", "", None), (" ", " ", None)),
        *(("", "http://given", "http://given"), ("http://ours", "http://given", "http://ours")),
    ):
        monkeypatch.setenv(f"SLMOPS_{field.upper()}", ours)
        monkeypatch.delenv(NAMES[field], raising=False) if given is None else monkeypatch.setenv(NAMES[field], given)
        assert getattr(Settings(), field) == taken


def test_an_empty_line_of_the_env_file_is_not_set(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SLMOPS_TRACKING_URI=\nMLFLOW_TRACKING_URI=http://given\nSLMOPS_HOME=\n")
    assert Settings().tracking_uri == "http://given"
    assert Settings().home == tmp_path / ".slmops"
