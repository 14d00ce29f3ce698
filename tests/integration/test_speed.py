"""Timing variants in Foundry Local's runtime for real."""

import json
import os
import shutil
from pathlib import Path

import pytest

from slmops.core.errors import EvaluationError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Registration, Variant
from slmops.evaluation import prompts, speed, summary
from slmops.evaluation.speed import Speed, Turn
from slmops.foundry.layout import stage
from slmops.processes import children
from tests import making
from tests.measured import answer, quality
from tests.tiny import VOCABULARY

pytestmark = pytest.mark.integration

NAME = "tiny"
LENGTHS = [32, 128, 400]  # of which a quick job takes the first two
Made = tuple[Variant, Registration]
Measured = dict[str, Speed]


@pytest.fixture(scope="module")
def job(talkative: Path) -> Job:
    return making.job(talkative, prompt_lengths=LENGTHS)


def altered(made: Made, name: str, folder: Path) -> Made:
    """A copy of a variant that can be altered, under another name."""
    variant, registration = made
    copy = folder / registration.path.name
    shutil.copytree(registration.path, copy)
    recipe = variant.recipe.model_copy(update={"name": name})
    return variant.model_copy(update={"recipe": recipe}), registration.model_copy(update={"path": copy})


@pytest.fixture(scope="module")
def hasty(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A variant that ends its answer with whatever it says first."""
    variant, registration = altered(made["int8"], "hasty", tmp_path_factory.mktemp("hasty"))
    config = json.loads((registration.path / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = list(range(VOCABULARY - 1))
    (registration.path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return variant, registration


def files(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of all files."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.fixture(scope="module")
def measured(made: dict[str, Made], hasty: Made, job: Job, home: Settings) -> Measured:
    """What a quick job measures, of which nothing is left; what is deployed is as it was."""
    before = files(home.foundry)
    found = speed.measure([*made.values(), hasty], NAME, job, home)
    assert files(home.foundry) == before
    assert not list(home.work(NAME).glob("*-speed"))
    logs = {path.name.split(".")[0] for path in (home.logs / NAME).glob("*.speed.log")}
    assert logs == found.keys() == {"fp32", "int8", "hasty"}
    return found


@pytest.fixture(scope="module")
def thorough(made: dict[str, Made], job: Job, home: Settings) -> Speed:
    """What a job that is not quick measures of one variant."""
    asked = job.model_copy(update={"quick": False, "prompt_lengths": [32, 64, 400], "output_lengths": [4, 24]})
    return speed.measure([made["int8"]], NAME, asked, home)["int8"]


def check_repetitions(turn: Turn, cells: int) -> None:
    """The headline cell as often as a second allows, each of the others once."""
    numbers = [timed.cell for timed in turn.measured.timed]
    headline = [timed.total_s for timed in turn.measured.timed if timed.cell == 0]
    assert numbers == [0] * len(headline) + list(range(1, cells))
    assert len(headline) > speed.HEADLINE_REPETITIONS  # a tiny model answers in far less than a third of a second
    began, ended = turn.measured.measured
    assert sum(headline[:-1]) < speed.HEADLINE_S < ended - began  # the last one began before it was over


def check_windows(turn: Turn, *, unloaded: bool) -> None:
    """One after the other, and memory was sampled in each."""
    result = turn.measured
    assert (result.unloaded is not None) == unloaded
    windows = [one for one in (result.before, result.loaded, result.measured, result.unloaded) if one is not None]
    for window, after in zip(windows, [*windows[1:], None], strict=True):
        assert window[0] < window[1]
        assert after is None or window[1] <= after[0]
        samples = turn.memory_in(window)
        assert samples
        assert all(20 < mb < 1000 for mb in samples)  # no torch: the runtime and a tiny model


@pytest.mark.parametrize("name", ["fp32", "int8", "hasty"])
def test_prompts_have_the_lengths_asked_for_and_what_the_process_showed(
    measured: Measured, made: dict[str, Made], name: str
) -> None:
    found = measured[name]
    assert [(cell.prompt_tokens, cell.output_tokens) for cell in found.cells] == [(128, 16), (32, 16)]
    assert found.cells == measured["fp32"].cells  # the same texts for all
    count = prompts.counter(made["fp32"][1].path)
    [turn] = found.turns
    check_repetitions(turn, cells=2)
    for timed in turn.measured.timed:
        cell = found.cells[timed.cell]
        assert timed.prompt_tokens == count(cell.text)  # the runtime counts what is counted here
        assert 0.9 * cell.prompt_tokens <= timed.prompt_tokens <= cell.prompt_tokens
        assert 0 < timed.tokenize_s < timed.first_s < timed.last_s <= timed.total_s < 60
    check_windows(turn, unloaded=True)
    assert min(turn.calibration_s) > 0
    began, ended = turn.measured.measured
    assert 0 < turn.measured.cpu_s <= 1.1 * found.cores * (ended - began)
    assert 0 < turn.measured.load_s < 60
    assert not turn.measured.cold
    assert turn.measured.throughput == {}  # a quick job has a single user
    assert {timed.completion_tokens for timed in turn.measured.timed} == {16}
    assert turn.measured.energy_tokens == sum(timed.prompt_tokens + 16 for timed in turn.measured.timed)


def test_answers_that_end_at_once_cannot_be_timed(hasty: Made, home: Settings, measured: Measured) -> None:
    cell = measured["hasty"].cells[0].model_copy(update={"output_tokens": 40, "repetitions": 2, "seconds": 0})

    def timed(*, fixed_length: bool) -> speed.SpeedResult:
        staged = stage(hasty[1], home.work(NAME) / "alone", fixed_length=fixed_length).model_dump()
        result, _ = children.call(
            speed.handle,
            speed.SpeedRequest(**staged, cells=(cell,)),
            log=home.logs / "alone.log",
            timeout_s=60,
            error=EvaluationError,
        )
        return result

    with pytest.raises(EvaluationError, match="less than two tokens of text") as raised:
        timed(fixed_length=False)
    assert "chat template" in (raised.value.fix or "")
    # It is the fixed length that makes it go on.
    found = timed(fixed_length=True)
    assert [one.completion_tokens for one in found.timed] == [40, 40]
    assert found.throughput == {}


THOROUGH_UNITS = {
    **making.UNITS,
    **({"load_cold_s": "s"} if hasattr(os, "posix_fadvise") else {}),
    **{f"throughput_tok_s_c{sessions}": "tokens/s" for sessions in (1, 2, 4)},
    "edge_cases_passed": "1",
}


@pytest.mark.parametrize("name", ["int8", "hasty", "thorough"])
def test_there_are_samples_for_each_figure(
    measured: Measured, thorough: Speed, made: dict[str, Made], name: str
) -> None:
    raw = thorough if name == "thorough" else measured[name]
    answered = quality(answered=(answer(0), answer(1, category="capitals")))
    if name != "thorough":
        answered = answered.model_copy(update={"cases": ()})  # as in a quick job
    found = summary.evaluation(made["int8"][0], raw, answered, None, None)
    units = THOROUGH_UNITS if name == "thorough" else making.UNITS
    assert {metric: one.unit for metric, one in found.measurements.items()} == units
    assert len(found.samples) == sum(len(turn.measured.timed) for turn in raw.turns)
    # The model has one MB, and the share of the libraries falls by much more when other processes load them meanwhile.
    assert 0 < found.metrics["memory_before_mb"] < 2 * found.metrics["memory_loaded_mb"]
    assert found.metrics["memory_loaded_mb"] <= found.metrics["memory_peak_mb"]
    curve = [one.prompt_tokens for one in found.curves if one.name == "ttft_ms"]
    assert curve == ([32, 64, 400] if name == "thorough" else LENGTHS[:2])


def test_a_job_that_is_not_quick(thorough: Speed) -> None:
    grid = [(prompt, output) for prompt in (64, 32, 400) for output in (4, 24)]
    assert [(cell.prompt_tokens, cell.output_tokens) for cell in thorough.cells] == grid
    assert [turn.measured.cold for turn in thorough.turns] == [hasattr(os, "posix_fadvise"), False, False]
    assert [set(turn.measured.throughput) for turn in thorough.turns] == [{1, 2, 4}, set(), set()]
    assert all(rate > 0 for rate in thorough.turns[0].measured.throughput.values())
    for number, turn in enumerate(thorough.turns):
        check_repetitions(turn, cells=6)
        check_windows(turn, unloaded=number > 0)  # several sessions leave more behind than a single user
        for timed in turn.measured.timed:
            cell = thorough.cells[timed.cell]
            assert timed.completion_tokens == cell.output_tokens
            assert 0.9 * cell.prompt_tokens <= timed.prompt_tokens <= cell.prompt_tokens


def test_one_that_breaks_does_not_stop_the_others(
    made: dict[str, Made], job: Job, home: Settings, tmp_path: Path
) -> None:
    broken = altered(made["int8"], "broken", tmp_path / "broken")
    os.truncate(broken[1].path / "model.onnx.data", 1000)
    mute = altered(made["int8"], "mute", tmp_path / "mute")
    (mute[1].path / "chat_template.jinja").write_text("{{ messages[0].content }}" + "x" * 3000)
    found = speed.measure([broken, mute, made["fp32"]], NAME, job, home)
    for name, said in (("broken", "no result"), ("mute", "No prompt length of 32, 128, 400 can be measured")):
        assert isinstance(found[name], EvaluationError)
        assert said in str(found[name])
    assert found["fp32"].turns
    assert not list(home.work(NAME).glob("*-speed"))
