"""Where training data come from, their digest, when they are new, and what people are told of them."""

import errno
import json
import os
import re
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from slmops.core.errors import PrerequisiteError, TrackingError
from slmops.core.settings import Settings
from slmops.evaluation import dataset
from slmops.training import checks, data, examples, sources
from slmops.training.sources import Fetched
from slmops.training.values import DAY_S, FIRST_REPEAT_S, DataProblem, Seen, TrainingData
from tests.retraining import HELD_OUT, checked, fetch, put, refused, turns, write_lines


def line(number: int) -> str:
    return json.dumps({"prompt": f"Question {number}?", "completion": f"Answer {number}."}) + "\n"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return Settings(home=tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = put(tmp_path / "data")
    (made / "train.jsonl").write_text(line(1) + line(2))
    return made


def texts(fetched: Fetched) -> dict[str, str]:
    return {file.name: file.read_text() for file in fetched.files}


def download(uri: str, target: Path) -> Path:
    """MLflow with the files of the folder as artifacts."""
    try:
        return Path(shutil.copy(Path("data", uri.rpartition("/")[2]), target))
    except FileNotFoundError:
        raise TrackingError("no such artifact") from None


def test_a_folder(folder: Path, settings: Settings) -> None:
    (folder / "a.JSONL").write_text(line(3))
    for name in ("notes.txt", ".hidden.jsonl", "evaluation.csv"):
        (folder / name).write_text("not read")
    (folder / "sub.jsonl").mkdir()
    fetched = fetch(folder, settings)
    for name in ("train.jsonl", "evaluation.jsonl"):
        (folder / name).write_text("changed later")
    assert fetched.source == str(folder)
    assert texts(fetched) == {"a.JSONL": line(3), "train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.read_text() == HELD_OUT
    assert all(settings.trainings in file.parents for file in (*fetched.files, fetched.evaluation))
    # An evaluation set of the user's own is not trained on.
    (folder / "a.JSONL").rename(folder / "held-out.jsonl")
    fetched = fetch(folder, settings, Path("~/data/../data/held-out.jsonl"))
    assert (list(texts(fetched)), fetched.evaluation.read_text()) == (["train.jsonl"], line(3))


def test_the_demo(settings: Settings) -> None:
    Path("demo").mkdir()  # a folder of that name is ./demo
    fetched = fetch("demo", settings)
    assert list(texts(fetched)) == ["train.jsonl"]
    read, items = examples.read(fetched.files), dataset.load(fetched.evaluation).items
    assert not read.problems
    assert not checks.leaks(read.examples, items, 0.2)
    assert all(item.format_valid(item.expected) for item in items)
    answers = [example.messages[-1]["content"] for example in read.examples], [item.expected for item in items]
    # Each pair of a category and a priority is there as often as any other.
    assert [(len(counts), set(counts.values())) for counts in map(Counter, answers)] == [(18, {24}), (18, {4})]


@pytest.mark.parametrize("source", ["data/train.jsonl", "runs:/abc/train.jsonl", "mlflow-dataset:x"])
def test_without_an_evaluation_set(folder: Path, settings: Settings, source: str) -> None:
    (folder / "evaluation.jsonl").unlink()
    error = refused(source, settings, source, download=download, dataset=lambda _: [])
    assert all(name in (error.fix or "") for name in ("--evaluation-set", "evaluation.jsonl", "evaluation.csv"))
    for evaluation in (folder / "absent.jsonl", folder):  # given, but it cannot be read
        refused("demo", settings, str(evaluation), evaluation=evaluation)


def test_there_is_nothing_or_mlflow_refuses(settings: Settings) -> None:
    put(Path("empty"))
    put(Path("gone")).joinpath("gone.jsonl").symlink_to("nowhere.jsonl")
    Path("evaluation.txt").write_text("x")
    for source in ("nowhere", "evaluation.txt", "empty"):
        refused(source, settings, source)
    refused("gone", settings, "gone.jsonl")
    refused("~nobody-at-all/data", settings, "~nobody-at-all")
    refused("no\nwhere\x00", settings, r"no\nwhere\x00")
    refused("x" * 5000, settings, "too long")
    refused("runs:/abc/data", settings, "bucket", download=mock.Mock(side_effect=KeyError("bucket")))
    away = TrackingError("MLflow is away", "Start it.")
    refused("runs:/abc/data", settings, away.message, error=TrackingError, download=mock.Mock(side_effect=away))


def test_too_much(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(line(1)) * 3
    (folder / "more.jsonl").write_text(line(3))
    monkeypatch.setattr(sources, "LARGEST", whole)
    assert len(fetch(folder, settings).files) == 2
    monkeypatch.setattr(sources, "LARGEST", whole - 1)
    refused(folder, settings, "too large")


def test_a_line_that_never_ends_is_not_copied(folder: Path, settings: Settings) -> None:
    with (folder / "train.jsonl").open("ab") as out:
        out.truncate(200_000_000)  # sparse: it takes no room
    fetched = fetch(folder, settings)
    assert fetched.files[0].stat().st_size < 1_100_000
    read = examples.read(fetched.files)
    assert len(read.examples) == 2
    detail = "longer than 1,000,000 bytes; the file was not read from here on"
    assert read.problems == [DataProblem(file="train.jsonl", line=3, kind="oversized", detail=detail)]


def test_a_full_disk(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(sources, "_copy", mock.Mock(side_effect=full))
    refused(folder, settings, str(settings.home), error=PrerequisiteError)


def test_folders_of_the_dead_are_removed(folder: Path, settings: Settings) -> None:
    dead, alive = (settings.trainings / f".12345678.{pid}.part" for pid in (2**22 + 1, os.getpid()))
    dead.mkdir(parents=True)
    alive.mkdir()
    fetch(folder, settings)
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.parametrize("place", ["", "~/", "runs:/abc/", "mlflow-artifacts:/abc/", "models:/abc/1/"])
def test_a_file_and_what_is_beside_it(folder: Path, settings: Settings, place: str) -> None:
    (folder / "evaluation.jsonl").rename(folder / "evaluation.csv")
    fetched = fetch(f"{place}data/train.jsonl", settings, download=download)
    assert texts(fetched) == {"train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.name == "evaluation.csv"


def record(number: int, inputs: dict[str, Any], **expectations: Any) -> dict[str, Any]:
    return {"dataset_record_id": f"dr-{number}", "inputs": inputs, "expectations": expectations}


def test_an_mlflow_dataset(folder: Path, settings: Settings) -> None:
    question = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    records = [
        record(1, {"prompt": "P"}, expected_response="A", guidelines=["short"]),
        record(2, {"messages": question}, expected_response="B"),
        record(3, {"question": "Q"}, expected_response="C"),
        record(4, {"messages": question}),
        record(5, {"messages": "U"}, expected_response="D"),
        record(6, {}),
    ]
    dataset = {"my tickets": records}.__getitem__
    fetched = fetch("mlflow-dataset: my tickets", settings, folder / "evaluation.jsonl", dataset=dataset)
    read = examples.read(fetched.files)
    said = sorted("".join(turn["content"] for turn in example.messages) for example in read.examples)
    assert said == ["PA", "SUB"]
    assert {problem.detail for problem in read.problems} == {
        "the key 'question' is unknown; known are messages, prompt, completion, id (id dr-3)",
        "messages[2].content is not a text (id dr-4)",
        "has both 'messages' and 'prompt' or 'completion' (id dr-5)",
        "needs either 'messages', or 'prompt' and 'completion' (id dr-6)",
    }
    copy = [{**one, "dataset_record_id": f"copy-{number}"} for number, one in enumerate(records[1::-1])]
    given = {"x": records[:2], "y": copy}.__getitem__
    one, other = (fetch(f"mlflow-dataset:{x}", settings, folder / "evaluation.jsonl", dataset=given) for x in "xy")
    assert data.digest(one) == data.digest(other)


def test_the_digest_is_of_the_items_alone(folder: Path, settings: Settings) -> None:
    one = data.digest(fetch(folder, settings))
    assert len(one) == 64
    written = json.dumps({"id": "x", **turns("Question 2?", "Answer 2.")}, separators=(" , ", " : "))
    (folder / "a.jsonl").write_text(f"\ufeff{line(1)}\r\n")
    (folder / "train.jsonl").write_text(f"\n{written}")
    assert data.digest(fetch(folder, settings)) == one
    (folder / "a.jsonl").unlink()
    for other in line(2) + line(1), line(1), line(1) + line(2) + line(2), line(1) + line(3), line(1) + line(2) + "{":
        (folder / "train.jsonl").write_text(other)
        assert data.digest(fetch(folder, settings)) != one


def test_data_are_new_until_a_retraining_has_used_them() -> None:
    assert Seen(version=3).look_at_data("a", None, 0) == (Seen(version=3, data="a"), False)  # nothing at the first look
    seen, is_told = Seen(data="a").look_at_data("b", "a", 0)
    assert (is_told, seen.data, seen.told) == (True, "a", "b")
    # That retraining was cancelled or failed.
    seen, is_told = seen.look_at_data("b", "a", 3600)
    assert is_told
    assert seen.look_at_data("b", "b", DAY_S) == (Seen(data="b"), False)
    # Back to the old ones: the last retraining did not use those.
    assert Seen(data="b").look_at_data("a", "b", DAY_S)[1]


def test_an_event_that_leads_to_nothing_is_repeated_more_and_more_rarely() -> None:
    seen, times = Seen(data="a"), []
    for now in range(0, 7 * DAY_S, 300):
        seen, is_told = seen.look_at_data("b", None, now)
        if is_told:
            times.append(now)
    pauses = [after - before for before, after in pairwise(times)]
    other, is_told = seen.look_at_data("c", None, times[-1] + 1)  # other new data are told at once
    assert (is_told, other.times) == (True, 1)
    assert pauses[:4] == [FIRST_REPEAT_S * 2**n for n in range(4)]
    assert set(pauses[6:]) == {DAY_S}


def test_percentiles() -> None:
    assert list(data._percentiles([3, 1, 2]).values()) == [1, 2, 3, 3, 3, 6]
    expected = {"min": 1, "p50": 50, "p90": 90, "p99": 99, "max": 100, "total": 5050}
    assert data._percentiles(range(100, 0, -1)) == expected


def prepared(folder: Path, **found: Any) -> TrainingData:
    write_lines(folder / "validation.jsonl", "ab")
    return checked(folder, **found)


def test_summary_and_markdown(tmp_path: Path) -> None:
    said = "8 items to train and 2 to validate with, 5 to evaluate; 30 tokens each, 60 at most"
    assert data.summary(prepared(tmp_path)) == f"{said}; 2 duplicates dropped"
    assert data.summary(prepared(tmp_path, dropped=0)) == said
    text = data.markdown(prepared(tmp_path))
    rows = {re.sub(" +", " ", line.strip("| ")) for line in text.splitlines() if line.startswith("|")}
    assert {
        *("source | tickets", "training items | 8", "validation items | 2", "evaluation items | 5"),
        *("exact duplicates, dropped | 2", "train.jsonl | 12"),
        *(f"SHA-256 of the items | {'d' * 16}", f"SHA-256 of the evaluation set | {'e' * 16}"),
        *("min | p50 | p90 | p99 | max | total", "20 | 30 | 40 | 50 | 60 | 300"),
    } <= rows
    assert text.endswith("## Worth a look\n\nNothing.\n")


def test_what_items_say_is_no_markup(tmp_path: Path) -> None:
    detail = "<script>alert(1)</script> [x](javascript:y) `a` | b *c* _d_ \\ &amp;"
    problem = DataProblem(file="a|b.jsonl", line=3, kind="near_duplicate", detail=detail)
    text = data.markdown(prepared(tmp_path, problems=(problem,)))
    [line] = [line for line in text.splitlines() if "alert" in line]
    assert line.startswith("| a\\|b.jsonl:3 | near duplicate | &lt;script&gt;alert(1)&lt;/script&gt; ")
    assert "\\[x\\](javascript:y) \\`a\\` \\| b \\*c\\* \\_d\\_ \\\\ &amp;amp; |" in line
