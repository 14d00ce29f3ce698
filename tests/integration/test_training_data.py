"""Training data from MLflow and from a web server, good and bad, and their checks with a real tokenizer."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import DataError, PrerequisiteError, SlmopsError, TrackingError, UsageError
from slmops.core.files import sha256
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from slmops.tracking.training import TrainingTracker
from slmops.training import checks, data, examples, sources
from slmops.training.values import LoraSettings, Retrain, TrainingData
from tests import making, tiny, values
from tests.answering import answering
from tests.retraining import HELD_OUT, WORDS, fetch, lines, nothing, pair, put, refused, turns

pytestmark = pytest.mark.integration


def tokenizer(folder: Path, template: str | None = tiny.CHATML) -> Checkpoint:
    made = tiny.tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    return values.checkpoint(path=folder, digest=folder.name)


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """The worker does without torch, which transformers knows of in the test's process: it is put back at the end."""
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", torch)
        patch.setattr(making, "IN_PROCESS", ("slmops.training.tokens_worker",))
        making.work_in_process(patch)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tokenizer(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def prepared(home: Settings, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    items = [pair(f"My {one} and {two} broke.", "ok") for one, two in permutations(WORDS[:6], 2)]
    repeated = [items[0], pair("my PRINTER and invoice broke!", "bad\u2028news")]
    return prepare(put(tmp_path_factory.mktemp("data"), train=items + repeated), checkpoint, home)


def prepare(source: Path, checkpoint: Checkpoint, settings: Settings, **changes: Any) -> TrainingData:
    asked = {"training": LoraSettings(max_tokens=128), **changes}
    request = Retrain(model="tiny", data=str(source), **asked)
    return data.prepare(fetch(source, settings), request, checkpoint, settings, "tiny")


def test_prepared_files(prepared: TrainingData, home: Settings) -> None:
    training, validation = lines(prepared.train), lines(prepared.validation)
    assert prepared.train.parent.parent == home.trainings / "data"
    assert {path.stem for path in prepared.train.parent.iterdir()} == {"train", "validation", "evaluation", "report"}
    assert validation
    assert len(training) + len(validation) == prepared.report.items == 31
    assert turns("My printer and password broke.", "ok") in training + validation
    assert prepared.evaluation_digest == sha256(prepared.evaluation)
    assert not home.work("tiny").joinpath("data").exists()
    found = prepared.report
    assert (found.files, found.evaluation_items, found.dropped) == ({"train.jsonl": 32}, 1, 1)
    assert [(problem.line, problem.kind) for problem in found.problems] == [(31, "duplicate"), (32, "near_duplicate")]
    assert data.summary(prepared).endswith("1 duplicates dropped")
    assert "bad\\\\u2028news" in data.markdown(prepared)
    tokens = partial(tiny.tokenizer().apply_chat_template, return_dict=True)
    counts = [len(tokens(item["messages"])["input_ids"]) for item in training + validation]
    assert (found.tokens["total"], found.tokens["max"]) == (sum(counts), max(counts))
    assert 20 < found.tokens["min"] <= found.tokens["p50"] <= found.tokens["p99"] <= found.tokens["max"] < 60


def test_prepared_data_are_made_once(
    prepared: TrainingData, checkpoint: Checkpoint, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "unique", nothing)
    assert prepare(Path(prepared.source), checkpoint, home) == prepared
    other = checkpoint.model_copy(update={"digest": "other"})
    for change in ({"training": LoraSettings(seed=1)}, {"leak_similarity": 0.7}, {"checkpoint": other}):
        with pytest.raises(AssertionError):
            prepare(Path(prepared.source), **{"checkpoint": checkpoint, "settings": home, **change})


def test_altered_files_are_made_again(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path / "home")
    source = put(tmp_path / "data", train=[pair("How are you?"), pair("Who are you?"), pair("Where are you?")])
    (source / "evaluation.jsonl").unlink()
    (source / "evaluation.csv").write_bytes(b"\xef\xbb\xbfprompt,expected\r\nIs it held out?,yes\r\n")
    first = prepare(source, checkpoint, settings)
    assert first.evaluation.name == "evaluation.csv"
    assert first.evaluation.read_bytes() == (source / "evaluation.csv").read_bytes()
    kept = first.train.read_bytes()
    first.train.write_bytes(kept[:-1])
    assert prepare(source, checkpoint, settings) == first
    assert first.train.read_bytes() == kept
    moved = Settings(home=settings.home.rename(tmp_path / "moved"))
    monkeypatch.setattr(checks, "unique", nothing)
    again = prepare(source, checkpoint, moved)
    assert again.train.read_bytes() == kept
    assert moved.trainings in again.train.parents


def test_all_that_is_wrong_is_told_at_once(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    long = " ".join(["endless"] * 200)
    good = pair("What is this about?")
    source = put(
        tmp_path,
        a=[good, {"prompt": "x"}, pair("is it held out"), pair(long), {"messages": []}, pair("a", " ")],
        b=[pair(f"Bad {number}", "") for number in range(9)],
    )
    with pytest.raises(DataError) as caught:
        prepare(source, checkpoint, home)
    first, *listed, more = caught.value.message.splitlines()
    assert str(source) in first
    places = [("a", line) for line in range(2, 7)] + [("b", line) for line in range(1, 6)]
    assert [line.split(": ")[0] for line in listed] == [f"  - {name}.jsonl:{line}" for name, line in places]
    assert "evaluation item 1" in listed[1]
    assert "128 are allowed (--training.max-tokens)" in listed[2]
    assert "4 more" in more
    file = home.logs / "tiny" / "data-problems.txt"
    assert str(file) in (caught.value.fix or "")
    assert len(file.read_text().splitlines()) == 14
    assert not list((home.trainings / "data").glob(".*"))


def test_too_few_items_and_a_bad_evaluation_set(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    for number, items in enumerate(([], [pair("a")] * 3)):
        with pytest.raises(DataError, match=f"{number} different items"):
            prepare(put(tmp_path, train=items), checkpoint, home)
    with pytest.raises(UsageError, match=r"evaluation\.jsonl .*\n.*line 2\b"):
        prepare(put(tmp_path, HELD_OUT + "{", train=[pair("a"), pair("b")]), checkpoint, home)


def test_a_template_that_is_not_there_or_cannot_be_trained_with(home: Settings, tmp_path: Path) -> None:
    # Each of the first three items fails in a way of its own.
    template = (
        "{% for message in messages %}{{ message.role }}: "
        "{% if 'refuse' in message.content %}{{ raise_exception('no\x1b such thing') }}{% endif %}"
        "{% if 'unstable' in message.content %}{{ messages | length }}{% endif %}"
        "{% if message.content != 'left out' %}{{ message.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    items = [pair("refuse"), pair("unstable"), pair("c", "left out"), pair("d"), pair("e")]
    source = put(tmp_path / "data", train=items)
    with pytest.raises(DataError, match=r"(?s)bare.*chat_template\.jinja"):
        prepare(source, tokenizer(tmp_path / "bare", None), home)
    with pytest.raises(DataError, match=r"no\\x1b such thing") as caught:
        prepare(source, tokenizer(tmp_path / "odd", template), home)
    places = [line.split(": ")[0] for line in caught.value.message.splitlines()[1:]]
    assert places == [f"  - train.jsonl:{line}" for line in (1, 2, 3)]


def test_mlflow_artifacts(book: Any, home: Settings, tmp_path: Path) -> None:
    client, download = book.client, book.tracker.download
    run_id = client.create_run(client.create_experiment("data")).info.run_id
    client.log_artifacts(run_id, str(put(tmp_path / "data", train=[pair("a")], validation=[pair("b")])), "data")
    fetched = fetch(f"runs:/{run_id}/data", home, download=download)
    assert fetched.source == f"runs:/{run_id}/data"
    assert [file.name for file in fetched.files] == ["train.jsonl", "validation.jsonl"]
    assert fetched.evaluation.read_text() == HELD_OUT
    assert fetch(f"runs:/{run_id}/data/train.jsonl", home, download=download).evaluation.read_text() == HELD_OUT
    with pytest.raises(TrackingError):
        fetch(f"runs:/{run_id}/absent", home, download=download)


@pytest.fixture
def made(book: Any, database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # set and removed by what follows
    mlflow.set_tracking_uri(database)  # what merge_records writes to
    yield lambda name, records: book.client.create_dataset(name).merge_records(records)
    mlflow.set_tracking_uri(None)


def test_mlflow_datasets(made: Callable[..., None], database: str, home: Settings, held_out: Path) -> None:
    import mlflow

    question = [{"role": "user", "content": "U"}]
    made("it's mine", [{"inputs": {"messages": question}, "expectations": {"expected_response": "old"}}])
    records: list[dict[str, Any]] = [
        {"inputs": {"messages": question}, "expectations": {"expected_response": "A"}},
        *({"inputs": {"prompt": f"P{n}"}, "expectations": {"expected_response": "B"}} for n in range(1200)),
        {"inputs": {"question": "Q"}},
    ]
    made('say "hi"', records)
    for _ in range(2):
        made("twice", [{"inputs": {"prompt": "P"}}])
    mlflow.set_tracking_uri("sqlite:////nowhere/mlflow.db")  # the address that is given counts
    given = {"dataset": TrainingTracker(database).records}
    read = examples.read(fetch('mlflow-dataset:say "hi"', home, held_out, **given).files)
    assert len(read.examples) == 1201
    assert tuple(turns("U", "A")["messages"]) in [example.messages for example in read.examples]
    assert [problem.detail.partition(";")[0] for problem in read.problems] == ["the key 'question' is unknown"]
    assert len(examples.read(fetch("mlflow-dataset:it's mine", home, held_out, **given).files).examples) == 1
    for name in ("twice", "absent", "x' OR name != '", "'\"", "%"):
        with pytest.raises(DataError, match=re.escape(name)):
            TrainingTracker(database).records(name)


ITEM = b'{"prompt": "How are you?", "completion": "Well."}\n'
ANSWERS: dict[str, tuple[int, bytes, dict[str, str]]] = {
    "/good.jsonl": (200, ITEM, {}),
    "/page.jsonl": (200, b"<html>Sign in</html>", {"Content-Type": "text/html; charset=utf-8"}),
    "/moved.jsonl": (302, b"", {"Location": "/good.jsonl"}),
    "/round.jsonl": (302, b"", {"Location": "/round.jsonl"}),
    "/elsewhere.jsonl": (302, b"", {"Location": "file:///etc/hostname"}),
    "/forbidden.jsonl": (403, b"", {}),
    "/short.jsonl": (200, ITEM, {"Content-Length": "1000"}),
}
ENDLESS = {"/large.jsonl": (b"x" * 65536, 0.0), "/slow.jsonl": (b"x", 0.02)}  # blocks, and seconds between them


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A web server that does what the path says."""

    def respond(request: BaseHTTPRequestHandler, _: Any) -> tuple[int, bytes, dict[str, str]]:
        path = request.path.partition("?")[0]
        if path in ENDLESS:
            block, pause = ENDLESS[path]
            with suppress(OSError):  # the client hangs up
                request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
                while request.wfile.write(block):
                    time.sleep(pause)
            request.wfile = BytesIO()  # nobody hears the rest
        if path == "/silent.jsonl":
            time.sleep(1)
        return ANSWERS.get(path, (404, b"no", {}))

    with answering(respond) as address:
        yield address


@pytest.mark.parametrize("path", ["/good.jsonl", "/moved.jsonl", "/good.jsonl?key=secret#secret"])
def test_a_url(url: str, path: str, held_out: Path, home: Settings) -> None:
    fetched = fetch(url + path, home, held_out)
    assert fetched.source == url + path.partition("?")[0]
    assert [file.read_bytes() for file in fetched.files] == [ITEM]
    assert fetched.evaluation.name == "questions.jsonl"
    error = refused(url + path, home, fetched.source)  # a URL has nothing beside it
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/absent.jsonl", DataError, "404"),
        ("/forbidden.jsonl", DataError, "403"),
        ("/page.jsonl", DataError, "web page"),
        ("/round.jsonl", DataError, "TooManyRedirects"),
        ("/elsewhere.jsonl", PrerequisiteError, "UnsupportedProtocol"),
        ("/large.jsonl", DataError, "1 MB"),
        ("/short.jsonl", PrerequisiteError, "RemoteProtocolError"),
        ("/silent.jsonl", PrerequisiteError, "does not answer"),
        ("/slow.jsonl", PrerequisiteError, "longer than 0 s"),
        ("http://me:secret@127.0.0.1:1/a.jsonl", DataError, "http://127.0.0.1:1/a.jsonl"),
        ("http://127.0.0.1:1/a.jsonl?secret", PrerequisiteError, "ConnectError"),
        ("http://[::1/a.jsonl?secret", DataError, "not a URL"),
        ("http://127.0.0.1:99999/a.jsonl?secret", PrerequisiteError, "http://127.0.0.1:99999/a.jsonl"),
        ("http:///a.jsonl?secret", PrerequisiteError, "UnsupportedProtocol"),
    ],
)
def test_a_url_that_gives_nothing(
    url: str, path: str, error: type[SlmopsError], said: str, home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGEST", 1_000_000)
    monkeypatch.setattr(sources, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(sources, "DOWNLOAD_TIMEOUT_S", 0.4 if path == "/slow.jsonl" else 60)
    address = f"{url}{path}?key=secret" if path.startswith("/") else path
    caught = refused(address, home, said, error=error)
    assert "secret" not in str(caught)
    assert address == path or caught.message.startswith(f"{url}{path} ")
