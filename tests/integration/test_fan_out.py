"""A job in parts: what travels through MLflow, what a part does on its machine, and what is done about lost ones."""

import contextvars
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, State, StateType

from flows import fan_out
from flows.running import ProgressBar
from flows.variant import variant
from slmops.cluster import parts
from slmops.cluster.parts import Part, PartResult
from slmops.conversion import store
from slmops.core.errors import CheckpointError, ConversionError, PrerequisiteError, TrackingError, WorkError
from slmops.core.files import sha256, write_atomic
from slmops.core.job import Job, JobContext
from slmops.core.settings import Pool, Settings
from slmops.core.values import Recipe, VariantFile
from slmops.tracking.exchange import Exchange
from tests import making
from tests.shown import flow_runs
from tests.tracked import Book

pytestmark = pytest.mark.integration

POOL = "farm"
BROKEN = Recipe(name="half", config={"passes": {"export": {"type": "ModelBuilder", "precision": "fp16"}}})


@pytest.fixture
def exchange(book: Book, tmp_path: Path) -> Exchange:
    return Exchange.open(book.tracker.uri, book.start(), Settings(home=tmp_path / "sender"))[0]


def elsewhere(exchange: Exchange, folder: Path) -> Exchange:
    """The same on a machine that has nothing yet, and this home."""
    return Exchange(exchange.uri, exchange.run_id, Settings(home=folder / "there"))


def files(folder: Path, **contents: str) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {f"below/{name}": folder / name for name in contents}


def stored(exchange: Exchange, digest: str) -> Path:
    """Where the artifact store has a file."""
    place = MlflowClient(exchange.uri).get_run(exchange.run_id).info.artifact_uri
    return Path(place.removeprefix("file://")) / "files" / digest


def test_files_arrive_and_are_sent_once(exchange: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = files(tmp_path / "sent", one="1", two="22", empty="")
    described = exchange.put(sent)
    assert described == tuple(
        VariantFile(name=name, size=path.stat().st_size, sha256=sha256(path)) for name, path in sent.items()
    )
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *_: pytest.fail("it is there"))
        assert exchange.put(sent) == described
    stored(exchange, described[1].sha256).write_text("2")  # an upload that broke off: it is sent again
    assert exchange.put(sent) == described
    elsewhere(exchange, tmp_path).bring(described, tmp_path / "got")
    got = {path.name: path.read_text() for path in (tmp_path / "got" / "below").iterdir()}
    assert got == {"one": "1", "two": "22", "empty": ""}


@pytest.mark.parametrize(("altered", "kind"), [("wrong", TrackingError), (None, WorkError)])
def test_what_the_store_altered_or_lost_is_refused(
    exchange: Exchange, tmp_path: Path, altered: str | None, kind: type[Exception]
) -> None:
    [file] = exchange.put(files(tmp_path / "sent", one="right"))
    path = stored(exchange, file.sha256)
    path.unlink() if altered is None else path.write_text(altered)
    with pytest.raises(kind, match="below/one") as caught:
        elsewhere(exchange, tmp_path).bring([file], tmp_path / "got")
    assert type(caught.value) is kind  # a TrackingError would be tried again
    assert not list((tmp_path / "got").rglob("one"))
    assert exchange.result("int4-convert-1") is None


def test_files_of_jobs_that_have_ended_go(book: Book, tmp_path: Path) -> None:
    uri, settings = book.tracker.uri, Settings(home=tmp_path)
    killed, first = book.start(), book.start()  # the second says that the first was killed
    of_killed, _ = Exchange.open(uri, killed, settings)
    of_first, stale = Exchange.open(uri, first, settings)
    assert stale == [of_killed.run_id]
    again, stale = Exchange.open(uri, first, settings)
    assert stale == [of_first.run_id]
    again.close()
    gone = [book.run(one.run_id).info.lifecycle_stage for one in (of_killed, of_first, again)]
    assert gone == ["deleted"] * 3
    assert [book.run(run).info.lifecycle_stage for run in (killed, first)] == ["active", "active"]


class Asked:
    """A job that has gone as far as its parts."""

    def __init__(self, job: Job, model: str, settings: Settings) -> None:
        uri = settings.tracking_uri or ""
        parent = Book(uri, model, settings.home).start()
        self.context = JobContext(job, model, making.resolve(job, settings), settings, uri, parent)
        self.exchange = Exchange.open(uri, parent, settings)[0]
        self.sent = parts.send_job(self.context, self.exchange)

    def part(self, recipe: Recipe) -> Part:
        return Part(id=f"{recipe.name}-convert-1", stage="convert", recipe=recipe, **dict(self.sent))


def test_a_part_has_the_files_of_the_user_where_it_works(settings: Settings, talkative: Path, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("def same(expected, answer): return 1")
    (tmp_path / "t.txt").write_text("A text.")
    (tmp_path / "c.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    job = making.job(
        talkative,
        evaluation_set=making.evaluation_set(tmp_path),
        perplexity_text=tmp_path / "t.txt",
        matcher=f"{tmp_path / 'm.py'}:same",
        chat_template=tmp_path / "c.jinja",
        output_path=tmp_path / "out",
    )
    asked = Asked(job, "inputs", settings)
    own = Recipe(name="own", config={"passes": {}, "reads": str(asked.context.checkpoint.path)})
    part = Part.model_validate_json(asked.part(own).model_dump_json())  # as Prefect passes it on
    there = Settings(home=tmp_path / "there")
    exchange = elsewhere(asked.exchange, tmp_path)
    place, recipe = parts.prepare(part, exchange, there)
    work = place.work
    assert place.job.evaluation_set == work / "inputs" / "evaluation_set" / "three.jsonl"
    assert place.job.evaluation_set.read_text(encoding="utf-8") == making.EVALUATION_SET
    assert place.job.perplexity_text.read_text() == "A text."
    assert place.job.matcher == f"{work / 'inputs' / 'matcher' / 'm.py'}:same"
    assert (place.job.chat_template, place.job.output_path) == (None, None)
    assert place.checkpoint.path == there.checkpoints / asked.context.checkpoint.digest
    assert "m.content" in (place.checkpoint.path / "chat_template.jinja").read_text()  # it has gone in before
    assert recipe.config["reads"] == str(place.checkpoint.path)
    write_atomic(place.checkpoint.path / "config.json", "{}")
    parts.prepare(part, exchange, there)
    assert (place.checkpoint.path / "config.json").read_text() != "{}"
    parts.clear(part, there)
    assert not work.exists()


def test_a_checkpoint_that_changes_is_noticed(settings: Settings, tmp_path: Path) -> None:
    changing = making.talkative("llama-tied", tmp_path / "changing")
    asked = Asked(making.job(changing), "changing", settings)
    (changing / "generation_config.json").write_text('{"do_sample": true}')
    with pytest.raises(CheckpointError, match="changing"):
        parts.send_job(asked.context, asked.exchange)


def test_a_part_that_fails_says_why_and_leaves_its_log(
    settings: Settings, talkative: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, there = Asked(making.job(talkative), "failing", settings), tmp_path / "there"
    part = asked.part(BROKEN)
    monkeypatch.setenv("SLMOPS_HOME", str(there))
    monkeypatch.setenv("SLMOPS_CONVERSION_TIMEOUT_S", "0.1")
    with pytest.raises(ConversionError, match="took longer"):
        variant(part.model_dump_json())
    result = PartResult.model_validate_json(asked.exchange.result(part.id) or "")
    assert isinstance(result.failure.error, ConversionError)
    assert [log.name for log in result.logs] == ["half.olive.log"]
    assert (result.key, result.variant, result.figures) == (None, (), None)
    assert [list(folder.iterdir()) for folder in (there / "work", there / "logs")] == [[], []]


def test_what_was_converted_elsewhere_takes_the_place_of_what_was_made_here(
    settings: Settings, talkative: Path, stock: Settings, tmp_path: Path
) -> None:
    job = making.job(talkative)
    made = making.variant("fp32", job, stock)
    asked = Asked(job, "replaced", settings)
    sent = parts.send_variant(made, asked.exchange)
    there = Settings(home=tmp_path / "there")
    exchange = elsewhere(asked.exchange, tmp_path)
    assert parts.fetch_variant(made.key, sent, exchange, there).files == made.files
    # Another conversion of the same: other times in its log, and so another file.
    folder = there.variants / made.key
    write_atomic(folder / "olive.log", "another")
    manifest = made.model_copy(update={"files": store.files_of(folder)})
    write_atomic(folder / "variant.json", manifest.model_dump_json())
    assert store.load(folder) is not None
    assert parts.fetch_variant(made.key, sent, exchange, there).files == made.files
    with pytest.raises(WorkError, match="not what its manifest says"):
        parts.fetch_variant("fp32-other", sent, exchange, there)


@pytest.fixture(scope="module")
def farm(settings: Settings) -> Settings:
    """A pool in which nobody works."""
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    return settings.model_copy(update={"pools": (Pool(name=POOL, memory_gb=1),)})


@flow(name="parent", validate_parameters=False)
def outcomes(context: JobContext, recipes: list[Recipe]) -> dict[str, object]:
    """What the job makes of its parts."""
    progress = ProgressBar("lost", steps=2 * len(recipes))
    return dict(fan_out.fan_out(fan_out.find_workers(context), recipes, context, progress))


def end_parts(state: StateType, message: str, job: Future[Any]) -> list[FlowRun]:
    """End each part that is started, as Prefect does with one whose machine is lost, until the job ends; returns the
    runs."""
    seen: dict[UUID, FlowRun] = {}
    with get_client(sync_client=True) as client:
        while not job.done():
            for run in flow_runs("variant"):
                if run.state is not None and not run.state.is_final():
                    client.set_flow_run_state(run.id, State(type=state, message=message), force=True)
                    seen[run.id] = run
            time.sleep(0.1)
    return list(seen.values())


@pytest.mark.parametrize(
    ("state", "attempts", "how"), [(StateType.CRASHED, 3, "lost 3 times"), (StateType.CANCELLED, 1, "cancelled")]
)
def test_a_lost_part_is_begun_again_and_a_cancelled_one_is_not(
    farm: Settings, talkative: Path, monkeypatch: pytest.MonkeyPatch, state: StateType, attempts: int, how: str
) -> None:
    monkeypatch.setattr(fan_out, "POLL_S", 0.1)
    asked = Asked(making.job(talkative), f"lost-{state.value.lower()}", farm)
    recipes = [making.recipe("fp32", asked.context.job, asked.context.checkpoint), BROKEN]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(contextvars.copy_context().run, outcomes, replace(asked.context, name="lost"), recipes)
        runs = end_parts(state, "The plug was pulled.", job)
        made = job.result()
    said = f"on the pool {POOL} was {how}: The plug was pulled."
    assert {name: str(error) for name, error in made.items()} == {r.name: f"convert {r.name} {said}" for r in recipes}
    submitted = [Part.model_validate_json(run.parameters["part"]) for run in runs]
    wanted = {f"{recipe.name}-convert-{n}": recipe for recipe in recipes for n in range(1, attempts + 1)}
    assert {part.id: part.recipe for part in submitted} == wanted
    assert len({run.parent_task_run_id for run in runs}) == len(runs) == len(wanted)
    [own] = {part.exchange for part in submitted}
    assert MlflowClient(farm.tracking_uri).get_run(own).info.lifecycle_stage == "deleted"


def test_a_pool_that_is_not_there_is_named(settings: Settings, talkative: Path) -> None:
    asked = making.job(talkative)
    unknown = settings.model_copy(update={"pools": (Pool(name="nowhere", memory_gb=1),)})
    with pytest.raises(PrerequisiteError, match=r"(?s)'nowhere'.*prefect worker start --pool nowhere"):
        fan_out.find_workers(JobContext(asked, "nowhere", making.resolve(asked, settings), unknown))
