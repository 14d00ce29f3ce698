"""Which measurements of an earlier job are taken over, and which are not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.core import machine
from slmops.core.errors import EvaluationError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration, Variant
from slmops.evaluation import earlier
from slmops.evaluation.earlier import Earlier
from tests import measured, values

QUIET = measured.speed(measured.turn(measured.timed(0.1, 0.9)))
BUSY = measured.speed(measured.turn(measured.timed(0.1, 0.9), loops=measured.BUSY))
Made = list[tuple[Variant, Registration]]


@pytest.fixture
def made(settings: Settings) -> Made:
    found = []
    for name in ("fp32", "int4"):
        variant = values.write_variant(settings.variants / name, name)
        (variant.path / "inference_model.json").write_text("{}")
        found.append((variant, Registration(foundry_id=f"bot-{name}:1", path=variant.path, answer="Yes.")))
    return found


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "set.jsonl").write_text('{"prompt": "Q", "expected": "A"}')
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "mine.py").write_text("def right(expected, answer): return True")
    files = {"evaluation_set": tmp_path / "set.jsonl", "perplexity_text": tmp_path / "text.txt"}
    return Job(model="m", matcher=f"{tmp_path / 'mine.py'}:right", **files)


@pytest.fixture
def kept(made: Made, job: Job, settings: Settings) -> Earlier:
    """What a job has left."""
    left = Earlier(made, job, settings)
    left.keep_speeds({"fp32": QUIET, "int4": QUIET})
    left.keep_qualities({"fp32": measured.quality(), "int4": measured.quality()}, measured.quality((3.0, 4.0)))
    return left


def known(made: Made, job: Job, settings: Settings) -> tuple[bool, bool]:
    found = Earlier(made, job, settings)
    return found.speeds() is not None, found.qualities() is not None


@pytest.mark.usefixtures("kept")
def test_an_unchanged_job_takes_over_all_of_it(made: Made, job: Job, settings: Settings) -> None:
    policy = job.model_copy(update={"policy": Path("other.toml"), "upload": True, "name": "other"})
    for asked in (job, policy):  # gates and choice are made anew
        found = Earlier(made, asked, settings)
        speeds, qualities = found.speeds(), found.qualities()
        assert speeds
        assert qualities
        assert speeds.variants == {"fp32": QUIET, "int4": QUIET}
        assert qualities.variants == {"fp32": measured.quality(), "int4": measured.quality()}
        assert qualities.checkpoint == measured.quality((3.0, 4.0))
    for asked in ({"remeasure": True}, {"peer": "llama.cpp"}):  # which is measured in the same rounds
        assert known(made, job.model_copy(update=asked), settings) == (False, False)


@pytest.mark.parametrize(
    ("change", "still"),
    [
        ({"quick": True}, (False, False)),
        ({"prompt_lengths": [32]}, (False, True)),
        ({"output_lengths": [8]}, (False, True)),
        ({"minutes": 5.0}, (True, False)),
        ({"baseline": "checkpoint"}, (True, False)),
        ({"evaluation_set": None}, (True, False)),
        ({"perplexity_text": None}, (True, False)),
        ({"matcher": None}, (True, False)),
    ],
)
@pytest.mark.usefixtures("kept")
def test_another_question_is_measured(
    made: Made, job: Job, settings: Settings, change: dict[str, Any], still: tuple[bool, bool]
) -> None:
    assert known(made, job.model_copy(update=change), settings) == still


@pytest.mark.usefixtures("kept")
def test_another_machine_package_variant_or_file_is_measured(
    made: Made, job: Job, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = machine.hardware().model_copy(update={"processor": "another"})
    for name, value in (("hardware", lambda: other), ("versions", lambda: {"foundry-local-sdk": "9"})):
        with monkeypatch.context() as patch:
            patch.setattr(machine, name, value)
            assert known(made, job, settings) == (False, False)
    with monkeypatch.context() as patch:
        patch.setattr(earlier, "MEASURED_AS", 0)
        assert known(made, job, settings) == (False, False)
    assert known(made[:1], job, settings) == (False, False)  # it was not measured side by side with these alone
    here = [(variant, one.model_copy(update={"not_run": "there is no device"})) for variant, one in made]
    assert known(here, job, settings) == (False, False)  # a device that comes or goes
    judged = settings.model_copy(update={"judge_url": "http://127.0.0.1:1/v1", "judge_model": "j"})
    assert known(made, job, judged) == (True, False)
    (made[0][1].path / "genai_config.json").write_text('{"search": {"chunk_size": 1}}')
    assert known(made, job, settings) == (False, False)


@pytest.mark.usefixtures("kept")
def test_a_function_that_was_edited_judges_again(made: Made, job: Job, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def right(expected, answer): return False")
    assert known(made, job, settings) == (True, False)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("spoil", [lambda text: text[:-9], lambda _: "[]", lambda text: text.replace("nll", "n")])
def test_what_is_damaged_is_measured_anew_and_said(
    made: Made, job: Job, settings: Settings, caplog: pytest.LogCaptureFixture, spoil: Callable[[str], str]
) -> None:
    [file] = settings.measurements.glob("quality-*.json")
    file.write_text(spoil(file.read_text()))
    assert known(made, job, settings) == (True, False)
    assert f"{file} is damaged: the qualities are measured anew" in caplog.text


def test_errors_and_disturbed_figures_and_answers_without_a_judge_are_not_kept(
    made: Made, job: Job, settings: Settings
) -> None:
    left, good = Earlier(made, job, settings), measured.quality()
    for bad in (BUSY, EvaluationError("It broke.")):
        left.keep_speeds({"fp32": QUIET, "int4": bad})
    left.keep_qualities({"fp32": good}, None)  # int4 failed
    left.keep_qualities({"fp32": good, "int4": measured.quality(answered=measured.answers(True, None))}, None)
    assert known(made, job, settings) == (False, False)
    # A disturbed turn beside quiet ones is left out of the figures.
    left.keep_speeds({"fp32": QUIET, "int4": measured.speed(*QUIET.turns, *BUSY.turns)})
    assert known(made, job, settings) == (True, False)
