"""Versions, aliases and what holds between them, in a real MLflow database."""

import contextlib
import multiprocessing
import os
import platform
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from slmops.core.errors import PromotionError, TrackingError, UsageError
from slmops.core.settings import Settings
from slmops.delivery.overview import overview
from slmops.foundry.layout import RELEASED_CONFIG
from slmops.foundry.versions import RELEASE, VERSION_MANIFEST, ModelVersion, VersionManifest, reigns
from tests import values
from tests.pulled import contents, digest, names
from tests.tracked import Book, Made

pytestmark = pytest.mark.integration


class Job(Book):
    """A job whose variants can be made versions."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        super().__init__(uri, name, folder)
        self.parent = self.start()

    def make(self, variant: str, weights: str = "weights", **more: str) -> ModelVersion:
        made = Made(self.folder / f"{variant}-{weights}-{self.parent}", variant, memory_peak_mb=900.4)
        self.made_in = made.registration.path
        (self.made_in / "deeper").mkdir()
        files = {"model.onnx": weights, "model.onnx.data": weights * 9, "deeper/vocab.txt": "words", **more}
        for name, text in files.items():
            (self.made_in / name).write_text(text)
        return self.add(made, self.parent)

    def find(self, which: str) -> ModelVersion:
        return self.registry.find(self.name, which)

    def promote(self, *versions: ModelVersion) -> None:
        for version in versions:
            version = self.registry.upload(version, self.made_in)
            self.registry.promote(version, self.registry.champion(self.name), {"slmops.promoted_by": "me"})

    @property
    def aliases(self) -> tuple[int | None, int | None]:
        champion, previous = self.registry.champion(self.name), self.registry.previous(self.name)
        return champion and champion.version, previous and previous.version


@pytest.fixture
def job(book: Book, database: str) -> Job:
    return Job(database, book.name, book.folder)


def test_an_accepted_variant_becomes_a_version_with_its_files(job: Job) -> None:
    able = {"genai_config.json": '{"model": {"bot_token_id": 3, "eot_token_id": 4}}'}
    made = job.make("int8", **able, **{RELEASED_CONFIG: '{"threads": "of whatever machine"}'})
    assert (made.name, made.version, made.variant, made.aliases) == (job.name, 1, "int8", ("int8",))
    assert (made.memory_mb, made.device, made.job_id) == (900, "cpu", job.parent)
    stored = job.client.get_model_version(job.name, "1")
    here = f"on {platform.node()} only"
    assert (stored.run_id, stored.description) == (made.run_id, f"int8, 0.0 MB, passed 0 of 0 gates, {here}")
    assert (made.uploaded, made.tags["slmops.files"]) == (False, here)
    assert {"slmops.recipe", "slmops.gates", "slmops.checkpoint_digest", "slmops.size_mb"} <= set(stored.tags)
    assert stored.tags["slmops.abilities"] == "tools"

    manifest = VersionManifest.model_validate_json((job.stored / VERSION_MANIFEST).read_text())
    assert manifest.sha256 == made.manifest_sha256
    small, weights = {"deeper/vocab.txt", "genai_config.json"}, {"model.onnx", "model.onnx.data"}
    assert {file.name for file in manifest.files} == small | weights
    assert names(job.stored) == {*small, VERSION_MANIFEST}
    assert (job.stored / "genai_config.json").read_text() == '{"threads": "of whatever machine"}'
    assert digest(contents(job.stored)["genai_config.json"]) in {file.sha256 for file in manifest.files}
    assert "Name" not in manifest.inference_model  # it carries a number that only the registry gives


def test_weights_are_uploaded_for_a_promotion_and_one_that_breaks_off_counts_for_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job.make("int8")
    with pytest.raises(PromotionError, match=rf"version 1 \(int8\).* on {platform.node()} only"):
        job.registry.promote(made, None, {})
    sent: list[str] = []
    upload = MlflowClient.log_model_artifact

    def log(self: MlflowClient, model_id: str, path: str, folder: str | None = None) -> None:
        sent.append(Path(path).name)
        in_child = multiprocessing.parent_process() is not None
        if len(sent) == (2 if in_child else 1):
            (job.stored / sent[-1]).write_text("half")
            if in_child:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("gone")
        upload(self, model_id, path, folder)

    monkeypatch.setattr(MlflowClient, "log_model_artifact", log)
    child = multiprocessing.get_context("fork").Process(target=job.registry.upload, args=(made, job.made_in))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(TrackingError, match="gone"):
        job.registry.upload(made, job.made_in)
    assert b"half" in contents(job.stored).values()
    assert not job.find("1").uploaded
    assert job.aliases == (None, None)
    whole = job.registry.upload(made, job.made_in)
    assert (whole.uploaded, len(sent)) == (True, 2)  # the first was there
    assert contents(job.stored).items() > contents(job.made_in).items() - {("inference_model.json", b'{"Name": "n:1"}')}
    assert job.client.get_model_version(job.name, "1").description == "int8, 0.0 MB, passed 0 of 0 gates"
    job.promote(whole)
    assert (job.aliases, len(sent)) == ((1, None), 2)
    job.parent = job.start()
    assert job.make("int8").uploaded  # the next job makes the same files


def test_the_same_files_stay_the_same_version_and_others_are_a_new_one(job: Job) -> None:
    first, before = job.make("int8"), job.parent
    job.parent = job.start()
    second = job.make("int8")
    assert (second.version, second.job_id) == (1, job.parent)
    assert second.run_id != first.run_id
    assert len(job.registry.versions(job.name)) == 1
    (job.stored / VERSION_MANIFEST).unlink()
    job.parent = job.start()
    assert job.make("int8").version == 2  # the files of the first are gone
    job.parent = before
    assert job.make("int8", "better").version == 3
    assert job.find("int8").version == job.registry.newest(job.name, "int8").version == 3
    assert job.find("2").aliases == ()


@pytest.mark.parametrize("variant", ["champion", "Previous", "latest", "v2", "2"])
def test_a_variant_whose_name_means_something_else_gets_no_alias(job: Job, variant: str) -> None:
    assert job.make(variant).aliases == ()
    assert job.aliases == (None, None)


def test_a_number_is_a_version_although_a_variant_is_called_by_it(job: Job) -> None:
    job.make("int8")
    called = job.make("1")  # of an Olive file 1.json
    assert (called.version, called.aliases) == (2, ())
    assert job.registry.newest(job.name, "1") == called
    for number in ("1", "3"):  # as before there was this rule
        job.client.set_registered_model_alias(job.name, number, "2")
    assert job.find("1").variant == "int8"
    with pytest.raises(UsageError, match="'3'"):
        job.find("3")
    with pytest.raises(UsageError, match="'7'"):
        job.registry.newest(job.name, "7")


def test_who_cannot_serve_what_is_for_its_target_withdraws_the_release(job: Job) -> None:
    first, second, other = job.make("int8"), job.make("int4"), job.make("fp16")
    job.promote(first)
    job.promote(second)
    job.client.set_model_version_tag(job.name, str(second.version), RELEASE, str(other.version))
    assert job.registry.withdraw(other, "its GPU refuses it") == job.find(str(first.version))
    assert job.aliases == (first.version, None)


def test_promotions_rollbacks_and_withdrawals_move_the_aliases(job: Job) -> None:
    first, second, third = job.make("int8"), job.make("int4"), job.make("fp16")
    assert job.registry.withdraw(first, "never was") is None
    job.promote(first)
    assert job.registry.withdraw(first, "broken") is None  # there is nothing to go back to
    assert job.aliases == (1, None)
    for version, aliases in ((second, (2, 1)), (third, (3, 2))):
        job.promote(version)
        assert job.aliases == aliases
    for reason in ("it answers nothing", "another device says so"):  # the second time it is not the champion any more
        now = job.registry.withdraw(third, reason)
        assert now.version == 2
        assert job.aliases == (2, 1)  # and not back to the one that failed
        assert job.find("3").tags["slmops.withdrawn"] == reason
    job.promote(third, second)  # in the end a rollback
    assert job.aliases == (2, 3)
    assert job.find("champion").tags["slmops.promoted_by"] == "me"
    with pytest.raises(PromotionError, match=r"version 2 \(int4\)"):
        job.registry.promote(job.find("3"), first, {})  # judged against what is no longer the champion
    history = reigns(job.registry.versions(job.name))
    assert [one.version for one in history] == [2, 3, 2, 3, 2, 1]
    assert [one.until for one in history] == [None, *(one.since for one in history[:-1])]
    assert [one.run for one in history] == ["me", "me", "", "me", "me", "me"]
    by, why = "the watch over version 3", "version 3 was withdrawn: it answers nothing"
    assert (history[2].promoter, history[2].reason) == (by, why)
    job.client.delete_model_version(job.name, "3")
    assert job.aliases == (2, None)


def test_a_release_may_change_while_its_version_stays_and_lacks_what_was_deleted(job: Job) -> None:
    job.promote(job.make("fp16"), job.make("int8"))
    job.make("int8-webgpu")
    champion = job.find("champion")
    job.registry.promote(champion, champion, {RELEASE: "3"})
    champion = job.find("champion")
    assert (job.aliases, champion.tags["slmops.replaced"]) == ((2, 1), "1")
    assert [one.version for one in job.registry.release(champion)] == [2, 3]
    job.client.delete_model_version(job.name, "3")
    assert job.registry.release(champion) == [champion]


@pytest.mark.parametrize(
    ("changes", "champion", "outcome", "expected"),
    [
        (0, "2", pytest.raises(TrackingError, match="gone"), (1, None)),  # a crash before the first change
        (1, "2", pytest.raises(TrackingError, match="gone"), (1, 1)),
        (2, "2", contextlib.nullcontext(), (2, 1)),
        (2, "3", pytest.raises(PromotionError, match=r"version 3 \(fp16\)"), (3, 1)),  # somebody else was later
    ],
)
def test_no_promotion_leaves_an_alias_that_points_at_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch, changes: int, champion: str, outcome: Any, expected: Any
) -> None:
    job.name += f"-{changes}-{champion}"
    first, second, _ = job.make("int8"), job.make("int4"), job.make("fp16")
    job.promote(first)
    second = job.registry.upload(second, job.made_in)
    done: list[str] = []
    set_alias = MlflowClient.set_registered_model_alias

    def alter(self: MlflowClient, name: str, alias: str, version: str) -> None:
        if len(done) == changes:
            raise ConnectionError("gone")
        done.append(alias)
        set_alias(self, name, alias, champion if alias == "champion" else version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", alter)
    with outcome:
        job.registry.promote(second, first, {})
    assert job.aliases == expected


def test_what_is_not_there_is_named(job: Job) -> None:
    job.make("int8")
    with pytest.raises(UsageError, match=f"(?s)'nothing'.*{job.name}"):
        job.registry.find("nothing", "champion")
    for which in ("champion", "7", "int2", "v1", "'; drop", ""):
        with pytest.raises(UsageError, match=rf"(?s){job.name}.*1 \(int8\)"):
            job.find(which)
    assert job.registry.champion("nothing") is None
    assert job.registry.versions("it's") == []
    assert job.name in job.registry.models()


def test_what_others_registered_or_altered_is_named_and_left_alone(job: Job) -> None:
    job.make("int8")
    job.client.delete_model_version_tag(job.name, "1", "slmops.size_mb")
    with pytest.raises(UsageError, match=r"slmops\.size_mb"):
        job.find("int8")
    assert job.registry.versions(job.name) == []

    job.name += "-foreign"
    job.client.create_registered_model(job.name)
    job.client.create_model_version(job.name, str(job.folder), await_creation_for=0)
    job.client.set_registered_model_alias(job.name, "champion", "1")
    for ask in (lambda: job.registry.champion(job.name), lambda: job.make("int4")):
        with pytest.raises(UsageError, match=job.name):
            ask()
    assert job.registry.versions(job.name) == []
    assert job.name not in job.registry.models()


def test_the_overview_has_all_models_with_their_last_run_and_their_disk(job: Job, database: str) -> None:
    settings = Settings(home=job.folder / "home")
    made = job.make("int8", big="w" * 1_000_000)
    job.promote(made)
    job.finish(job.parent, values.result("int8", 1), chosen="int8")
    again = job.start()
    # What Foundry Local reads here, with a link to the store, and a model whose name begins in the same way.
    placed = settings.foundry / "models" / "slmops" / f"{job.name}-int8-generic-cpu-1"
    variant = values.write_variant(placed, "int8", {"model.onnx.data": "x" * 3_000_000})
    (placed / "linked").hardlink_to(variant.path / "model.onnx.data")
    values.write_variant(placed.with_name(f"{job.name}-2-int8-generic-cpu-1"), "int8", {"w": "x" * 1_000_000})
    found = {one.name: one for one in overview(settings, database, {"new": ["retrain at 0 2 * * * (UTC)"]}).models}
    new, mine = found["new"], found[job.name]
    assert (new.champion, new.last_run, new.home_mb, len(new.schedules)) == (None, None, 0, 1)
    assert (mine.champion, mine.variant, mine.schedules) == (1, "int8", ())
    assert mine.last_run is not None
    assert (mine.last_run.kind, mine.last_run.state, mine.last_run.chosen) == ("job", "running", "int8")
    assert again in mine.last_run.url
    assert mine.home_mb == pytest.approx(3, abs=0.1)
    assert mine.registry_mb == pytest.approx(1, abs=0.1)
