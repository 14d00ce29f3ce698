"""Settings as they come from the environment and go on to a worker, and the work pool that a job fans out to."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from slmops.checkpoints.room import choose_pool, conversion_memory
from slmops.core.errors import PrerequisiteError
from slmops.core.settings import Pool, Settings
from slmops.local import stack
from tests import values

pytestmark = pytest.mark.usefixtures("no_settings")

NAMES = {"tracking_uri": "MLFLOW_TRACKING_URI", "prefect_api_url": "PREFECT_API_URL"}
SMALL, LARGE, HUGE = (Pool(name=name, memory_gb=gb) for name, gb in (("small", 8), ("large", 64), ("huge", 512)))


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
    servers = stack.Stack(
        prefect_url="http://p", mlflow_url="http://m", prefect_api_url="http://p/api", tracking_uri="http://m"
    )
    for variable, value in stack._worker_environment(settings, servers).items():
        monkeypatch.setenv(variable, value)
    # The servers are not settings of the worker's: what it is told is where they are.
    assert Settings().model_copy(update={"prefect_api_url": None}) == settings


@pytest.mark.parametrize(
    ("parameters", "taken"), [(135_000_000, SMALL), (909_000_000, SMALL), (910_000_000, LARGE), (8_000_000_000, HUGE)]
)
def test_the_smallest_pool_that_is_large_enough_is_taken(parameters: int, taken: Pool) -> None:
    checkpoint = values.checkpoint(parameters=parameters)
    assert conversion_memory(checkpoint) == pytest.approx(8.8 * parameters)  # of one conversion in fp32
    twin = Pool(name="a", memory_gb=8)  # of two of one size the first is taken
    assert choose_pool([HUGE, SMALL, LARGE, twin], checkpoint, "cpu") == taken


@pytest.mark.parametrize(("parameters", "device"), [(70_000_000_000, "cpu"), (1000, "gpu")])
def test_need_and_pools_are_named_where_none_fits(parameters: int, device: str) -> None:
    with pytest.raises(PrerequisiteError, match="No work pool can convert tiny") as caught:
        choose_pool([SMALL, LARGE], values.checkpoint(parameters=parameters), device)
    assert f"about {parameters * 8.8 / 1e9:.1f} GB of memory on a {device} machine" in caught.value.message
    assert "small (8 GB, cpu), large (64 GB, cpu)" in caught.value.message
    assert "SLMOPS_POOLS" in (caught.value.fix or "")


def test_pools_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, pools in (("", ()), ("  ", ()), ('[{"name": "small", "memory_gb": 8}]', (SMALL,))):
        monkeypatch.setenv("SLMOPS_POOLS", text)
        assert Settings().pools == pools


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("small", "is not JSON"),
        ('{"name": "small"}', "valid tuple"),
        ('[{"name": "small", "memory_gb": 0}]', "greater than 0"),
        ('[{"name": "a/b", "memory_gb": 1}]', "match pattern"),
        ('[{"name": "a", "memory_gb": 1, "device": "tpu"}]', "'cpu'"),
        ('[{"name": "a", "memory_gb": 1}, {"name": "a", "memory_gb": 2}]', "names a more than once"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setenv("SLMOPS_POOLS", text)
    with pytest.raises(ValidationError, match=said):
        Settings()
