"""Where training data come from, and their digest."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import DataError, PrerequisiteError, TrackingError
from slmops.core.settings import Settings
from slmops.training import data
from slmops.training.data import Fetched
from slmops.training.values import Retrain

HELD_OUT = '{"prompt": "Is it held out?", "expected": "yes"}\n'


def line(number: int) -> str:
    return json.dumps({"prompt": f"Question {number}?", "completion": f"Answer {number}."}) + "\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    (made / "train.jsonl").write_text(line(1) + line(2))
    (made / "evaluation.jsonl").write_text(HELD_OUT)
    return made


def nothing(*_: Any) -> Any:
    raise AssertionError("nothing should be asked of MLflow")


def fetch(source: str | Path, settings: Settings, evaluation: Path | None = None, **given: Any) -> Fetched:
    request = Retrain(model="demo", data=str(source), evaluation_set=evaluation)
    return data.fetch(request, settings, **{"download": nothing, "dataset": nothing, **given})


def texts(fetched: Fetched) -> dict[str, str]:
    return {file.name: file.read_text() for file in fetched.files}


def test_a_folder(folder: Path, settings: Settings) -> None:
    (folder / "a.JSONL").write_text(line(3))
    for name in ("notes.txt", ".hidden.jsonl", "evaluation.csv"):
        (folder / name).write_text("not read")
    (folder / "sub.jsonl").mkdir()
    fetched = fetch(folder, settings)
    assert fetched.source == str(folder)
    assert texts(fetched) == {"a.JSONL": line(3), "train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.read_text() == HELD_OUT


def test_a_file_and_what_is_beside_it(folder: Path, settings: Settings) -> None:
    (folder / "evaluation.jsonl").rename(folder / "evaluation.csv")
    fetched = fetch(folder / "train.jsonl", settings)
    assert list(texts(fetched)) == ["train.jsonl"]
    assert fetched.evaluation.name == "evaluation.csv"


def test_copies_stay_what_they_were(folder: Path, settings: Settings) -> None:
    fetched = fetch(folder, settings)
    for file in folder.iterdir():
        file.write_text("changed")
    assert texts(fetched) == {"train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.read_text() == HELD_OUT
    assert all(settings.trainings in file.parents for file in (*fetched.files, fetched.evaluation))


def test_an_evaluation_set_of_the_users_is_not_trained_on(folder: Path, settings: Settings) -> None:
    (folder / "held-out.jsonl").write_text(HELD_OUT * 2)
    fetched = fetch(folder, settings, folder / ".." / "data" / "held-out.jsonl")
    assert list(texts(fetched)) == ["train.jsonl"]
    assert fetched.evaluation.read_text() == HELD_OUT * 2


def test_home_is_expanded(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert texts(fetch("~/data", settings, Path("~/data/evaluation.jsonl")))
    with pytest.raises(DataError, match="~nobody-at-all"):
        fetch("~nobody-at-all/data", settings)


def test_the_demo(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)  # a folder of that name is ./demo
    fetched = fetch("demo", settings)
    assert list(texts(fetched)) == ["train.jsonl"]
    assert len(data.examples.read(fetched.files).examples) > 100
    assert fetched.evaluation.read_text()


def test_without_an_evaluation_set(folder: Path, settings: Settings) -> None:
    (folder / "evaluation.jsonl").unlink()
    with pytest.raises(DataError) as caught:
        fetch(folder, settings)
    assert caught.value.message == f"There is no evaluation set for {folder}: questions that are not trained on."
    assert "--evaluation-set FILE, or put evaluation.jsonl or evaluation.csv" in (caught.value.fix or "")
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read: No such file"):
        fetch(folder, settings, folder / "absent.jsonl")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        fetch(folder, settings, folder)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "There is no such file or folder: nowhere"),
        ("no\nwhere\x00", r"There is no such file or folder: no\nwhere\x00"),
        ("x" * 5000, "cannot be read: File name too long."),
        ("data/evaluation.txt", "data/evaluation.txt is no .jsonl file."),
        ("empty", "empty has no .jsonl files to train on."),
    ],
)
def test_there_is_nothing(
    folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty").mkdir()
    (folder / "evaluation.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        fetch(source, settings)
    assert said in caught.value.message
    assert caught.value.fix


def test_a_file_that_is_gone(folder: Path, settings: Settings) -> None:
    (folder / "gone.jsonl").symlink_to(folder / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        fetch(folder, settings)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path, settings: Settings) -> None:
    (folder / "train.jsonl").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        fetch(folder, settings)


def test_too_much(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(line(1)) * 3
    (folder / "more.jsonl").write_text(line(3))
    monkeypatch.setattr(data, "LARGEST", whole)
    assert len(fetch(folder, settings).files) == 2
    monkeypatch.setattr(data, "LARGEST", whole - 1)
    with pytest.raises(DataError, match="too large"):
        fetch(folder, settings)


def test_a_line_that_never_ends_is_not_copied(folder: Path, settings: Settings) -> None:
    with (folder / "train.jsonl").open("ab") as out:
        out.truncate(200_000_000)  # sparse: it takes no room
    fetched = fetch(folder, settings)
    assert fetched.files[0].stat().st_size < 1_100_000
    read = data.examples.read(fetched.files)
    assert len(read.examples) == 2
    assert [(problem.line, problem.kind) for problem in read.problems] == [(3, "oversized")]


def test_a_full_disk(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        with open("/dev/full", "w") as out:  # noqa: PTH123 - a device that is always full
            out.write("x")
        return 1

    monkeypatch.setattr(data, "_copy", full)
    with pytest.raises(PrerequisiteError, match=r"The disk of .* is full"):
        fetch(folder, settings)


def test_folders_of_the_dead_are_removed(folder: Path, settings: Settings) -> None:
    dead, alive = (settings.trainings / f".12345678.{pid}.part" for pid in (2**22 + 1, os.getpid()))
    for left in (dead, alive):
        left.mkdir(parents=True)
    fetch(folder, settings)
    assert not dead.exists()
    assert alive.exists()


def test_an_mlflow_folder(folder: Path, settings: Settings) -> None:
    asked = []

    def download(uri: str, target: Path) -> Path:
        asked.append(uri)
        return folder.rename(target / "data")

    fetched = fetch("runs:/abc/data", settings, download=download)
    assert asked == ["runs:/abc/data"]
    assert fetched.source == "runs:/abc/data"
    assert texts(fetched) == {"train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.read_text() == HELD_OUT


@pytest.mark.parametrize("scheme", ["runs:/abc", "mlflow-artifacts:/abc", "models:/abc/1"])
def test_an_mlflow_file_and_what_is_beside_it(folder: Path, settings: Settings, scheme: str) -> None:
    def download(uri: str, target: Path) -> Path:
        name = uri.removeprefix(f"{scheme}/data/")
        if not (folder / name).exists():
            raise TrackingError("no such artifact")
        return (folder / name).rename(target / name)

    (folder / "evaluation.jsonl").rename(folder / "evaluation.csv")
    fetched = fetch(f"{scheme}/data/train.jsonl", settings, download=download)
    assert texts(fetched) == {"train.jsonl": line(1) + line(2)}
    assert fetched.evaluation.name == "evaluation.csv"


def test_an_mlflow_file_without_an_evaluation_set(folder: Path, settings: Settings) -> None:
    def download(uri: str, target: Path) -> Path:
        if not uri.endswith("train.jsonl"):
            raise TrackingError("no such artifact")
        return (folder / "train.jsonl").rename(target / "train.jsonl")

    with pytest.raises(DataError, match=r"no evaluation set for runs:/abc/train\.jsonl"):
        fetch("runs:/abc/train.jsonl", settings, download=download)


def test_mlflow_refuses(settings: Settings) -> None:
    def refuses(_uri: str, _target: Path) -> Path:
        raise TrackingError("MLflow is not there.")

    def breaks(_uri: str, _target: Path) -> Path:
        raise KeyError("bucket")

    with pytest.raises(TrackingError, match=r"MLflow is not there\."):
        fetch("runs:/abc/data", settings, download=refuses)
    with pytest.raises(DataError, match="MLflow does not give runs:/abc/data: 'bucket'"):
        fetch("runs:/abc/data", settings, download=breaks)


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
    asked = []

    def dataset(name: str) -> list[dict[str, Any]]:
        asked.append(name)
        return records

    fetched = fetch("mlflow-dataset: my tickets", settings, folder / "evaluation.jsonl", dataset=dataset)
    assert asked == ["my tickets"]
    read = data.examples.read(fetched.files)
    assert sorted([turn["content"] for turn in example.messages] for example in read.examples) == [
        ["P", "A"],
        ["S", "U", "B"],
    ]
    said = {problem.detail for problem in read.problems}
    assert said == {
        "the key 'question' is unknown; known are messages, prompt, completion, id (id dr-3)",
        "messages[2].content is no text (id dr-4)",
        "has 'messages' beside 'prompt' or 'completion' (id dr-5)",
        "needs either 'messages', or 'prompt' and 'completion' (id dr-6)",
    }


def test_a_copy_of_an_mlflow_dataset_is_the_same(folder: Path, settings: Settings) -> None:
    records = [record(number, {"prompt": f"P{number}"}, expected_response="A") for number in range(5)]
    copy = [{**one, "dataset_record_id": f"copy-{-number}"} for number, one in enumerate(records)][::-1]
    held_out = folder / "evaluation.jsonl"
    one, other = (
        data.digest(fetch("mlflow-dataset:x", settings, held_out, dataset=lambda _, given=given: given))
        for given in (records, copy)
    )
    assert one == other


def test_an_mlflow_dataset_needs_an_evaluation_set(settings: Settings) -> None:
    with pytest.raises(DataError, match="no evaluation set for mlflow-dataset:x"):
        fetch("mlflow-dataset:x", settings, dataset=lambda _: [])


def digest_of(settings: Settings, folder: Path, **files: str) -> str:
    folder.mkdir()
    (folder / "evaluation.jsonl").write_text(HELD_OUT)
    for name, text in files.items():
        (folder / f"{name}.jsonl").write_text(text)
    return data.digest(fetch(folder, settings))


def test_the_digest_is_of_the_items_alone(tmp_path: Path, settings: Settings) -> None:
    one = digest_of(settings, tmp_path / "one", train=line(1) + line(2))
    assert len(one) == 64
    turns = [{"content": "Question 2?", "role": "user"}, {"content": "Answer 2.", "role": "assistant"}]
    written = json.dumps({"id": "x", "messages": turns}, indent=None, separators=(" , ", " : "))
    assert digest_of(settings, tmp_path / "two", a=f"\ufeff{line(1)}\r\n", b=f"\n{written}") == one


@pytest.mark.parametrize(
    "text", [line(2) + line(1), line(1), line(1) + line(2) + line(2), line(1) + line(3), line(1) + line(2) + "{"]
)
def test_another_digest(tmp_path: Path, settings: Settings, text: str) -> None:
    one = digest_of(settings, tmp_path / "one", train=line(1) + line(2))
    assert digest_of(settings, tmp_path / "two", train=text) != one


def test_ready_data_are_taken_only_if_intact(tmp_path: Path) -> None:
    assert data._load(tmp_path) is None
    for text in ("", "{", "[]", '{"data": 1}', "\x00"):
        (tmp_path / data.MANIFEST).write_text(text)
        assert data._load(tmp_path) is None


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([7], {"min": 7, "p50": 7, "p90": 7, "p99": 7, "max": 7, "total": 7}),
        ([3, 1, 2], {"min": 1, "p50": 2, "p90": 3, "p99": 3, "max": 3, "total": 6}),
        (list(range(1, 101)), {"min": 1, "p50": 50, "p90": 90, "p99": 99, "max": 100, "total": 5050}),
    ],
)
def test_percentiles(counts: list[int], expected: dict[str, float]) -> None:
    assert data._percentiles(counts) == expected
