"""What of a recorded evaluation can be measured again."""

from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import PrerequisiteError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.delivery import remeasurement
from slmops.evaluation import dataset
from tests import making
from tests.measured import HERE, recorded

ELSEWHERE = "recorded on another kind of machine (a small one; not this machine)"


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [({}, None), ({"hardware_kind": "a small one"}, f"were {ELSEWHERE}"), ({"measurements": {}}, "were not recorded")],
)
def test_everything_that_was_recorded_here_is_measured(
    settings: Settings, changes: dict[str, Any], left_out: str | None
) -> None:
    plan = remeasurement.plan(recorded(**changes), HERE, settings)
    assert plan.speed == (left_out is None)
    assert plan.left_out == ((f"speed and memory, which {left_out}",) if left_out else ())
    assert plan.questions == dataset.load(None)
    assert plan.text == dataset.perplexity_text(None)[0]


def files(folder: Path) -> dict[str, Any]:
    """An evaluation set and a text, with their digests, as a job was told of them."""
    questions, text = making.evaluation_set(folder), folder / "text.txt"
    text.write_text("A text of some words.")
    return {
        "job": Job(model="demo", evaluation_set=questions, perplexity_text=text),
        "evaluation_set_digest": dataset.load(questions).digest,
        "text_digest": dataset.perplexity_text(text)[1],
    }


@pytest.mark.parametrize("lost", ["unlink", "write_text"], ids=["gone", "altered"])
def test_the_jobs_copies_stand_in_for_lost_files(lost: str, settings: Settings, tmp_path: Path) -> None:
    asked = files(tmp_path)
    copies = {"evaluation_set": tmp_path / "copy.jsonl", "text": tmp_path / "copy.txt"}
    originals = {"evaluation_set": asked["job"].evaluation_set, "text": asked["job"].perplexity_text}
    for field, copy in copies.items():
        copy.write_bytes(originals[field].read_bytes())
    whole = remeasurement.plan(recorded(**asked), HERE, settings)
    assert whole.left_out == ()
    for path in originals.values():
        getattr(path, lost)(*(["{}"] if lost == "write_text" else []))
    plan = remeasurement.plan(recorded(**asked, **copies), HERE, settings)
    assert (plan.left_out, plan.text) == ((), whole.text)
    assert plan.questions.items == whole.questions.items

    without = remeasurement.plan(recorded(**asked), HERE, settings)
    assert (without.questions, without.text, without.speed) == (None, None, True)
    reasons = {"unlink": "cannot be read", "write_text": "has bad lines"}
    assert without.left_out[0].startswith("accuracy, because its evaluation set cannot be used: ")
    assert reasons[lost] in without.left_out[0]
    assert without.left_out[1:] == ("perplexity, because its text is gone or altered",)
    # A copy that is not what the digest is over does not count.
    copies["evaluation_set"].write_text(making.EVALUATION_SET.replace("France", "Spain"))
    altered = remeasurement.plan(recorded(**asked, **copies), HERE, settings)
    assert altered.questions is None
    with pytest.raises(PrerequisiteError, match=r"(?s)compared: speed and memory, which were.*slmops run"):
        remeasurement.plan(recorded(**asked, hardware_kind="another"), HERE, settings)
    originals["evaluation_set"].write_text(copies["evaluation_set"].read_text())  # it reads well, and is another
    another = remeasurement.plan(recorded(**asked), HERE, settings)
    assert another.left_out[0] == "accuracy, because its evaluation set is gone or altered"


def test_a_matcher_that_is_not_here(settings: Settings, tmp_path: Path) -> None:
    job = Job(model="demo", matcher=f"{tmp_path / 'mine.py'}:same")
    plan = remeasurement.plan(recorded(job=job), HERE, settings)
    assert plan.questions is None
    assert plan.left_out == (f"accuracy, because its matcher {job.matcher} is not on this machine",)
    (tmp_path / "mine.py").write_text("")
    assert remeasurement.plan(recorded(job=job), HERE, settings).questions is not None
