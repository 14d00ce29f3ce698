"""Versions, aliases and what holds between them, in a real MLflow database."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from slmops.core.errors import PromotionError, TrackingError, UsageError
from slmops.foundry.versions import VERSION_MANIFEST, ModelVersion, VersionManifest
from slmops.tracking.registry import Registry
from tests.tracked import Book, Made

pytestmark = pytest.mark.integration


class Job:
    """A job whose variants can be made versions."""

    def __init__(self, book: Book) -> None:
        self.book, self.registry = book, book.registry
        self.parent = book.start()

    def add(self, variant: str, weights: str = "weights") -> ModelVersion:
        made = Made(self.book.folder / f"{variant}-{weights}-{self.parent}", variant, memory_peak_mb=900.4)
        (made.registration.path / "model.onnx").write_text(weights)
        (made.registration.path / "deeper").mkdir()
        (made.registration.path / "deeper" / "vocab.txt").write_text("words")
        return self.book.add(made, self.parent)

    def find(self, which: str) -> ModelVersion:
        return self.registry.find(self.book.name, which)

    def promote(self, *versions: ModelVersion) -> None:
        """One after the other."""
        for version in versions:
            self.registry.promote(version, self.registry.champion(self.book.name), {"slmops.promoted_by": "me"})

    @property
    def aliases(self) -> tuple[int | None, int | None]:
        """Champion and previous."""
        champion, previous = self.registry.champion(self.book.name), self.registry.previous(self.book.name)
        return champion and champion.version, previous and previous.version


@pytest.fixture
def job(book: Book) -> Job:
    return Job(book)


def test_an_accepted_variant_becomes_a_version_with_its_files(job: Job, client: MlflowClient) -> None:
    made = job.add("int8")
    assert (made.name, made.version, made.variant, made.aliases) == (job.book.name, 1, "int8", ("int8",))
    assert (made.memory_mb, made.device, made.job_id) == (900, "cpu", job.parent)
    stored = client.get_model_version(job.book.name, "1")
    assert stored.run_id == made.run_id
    assert stored.description == "int8, 0.0 MB, passed 0 of 0 gates"
    assert {"slmops.recipe", "slmops.gates", "slmops.checkpoint_digest", "slmops.size_mb"} <= set(stored.tags)

    folder = Path(client.get_model_version_download_uri(job.book.name, "1").removeprefix("file://"))
    manifest = VersionManifest.model_validate_json((folder / VERSION_MANIFEST).read_text())
    assert manifest.sha256 == made.manifest_sha256
    assert [file.name for file in manifest.files] == ["deeper/vocab.txt", "genai_config.json", "model.onnx"]
    assert all((folder / file.name).stat().st_size == file.size for file in manifest.files)
    assert "Name" not in manifest.inference_model  # it carries a number that only the registry gives


def test_the_same_files_stay_the_same_version_and_others_are_a_new_one(job: Job, client: MlflowClient) -> None:
    first = job.add("int8")
    again = Job(job.book)
    second = again.add("int8")
    assert (second.version, second.job_id) == (1, again.parent)
    assert second.run_id != first.run_id
    assert len(job.registry.versions(job.book.name)) == 1
    (Path(client.get_model_version_download_uri(job.book.name, "1")) / VERSION_MANIFEST).unlink()
    assert Job(job.book).add("int8").version == 2  # the files of the first are gone
    assert job.add("int8", "better").version == 3
    assert job.find("int8").version == job.registry.newest(job.book.name, "int8").version == 3
    assert job.find("2").aliases == ()


@pytest.mark.parametrize("variant", ["champion", "Previous", "latest", "v2", "2"])
def test_a_variant_whose_name_means_something_else_gets_no_alias(job: Job, variant: str) -> None:
    assert job.add(variant).aliases == ()
    assert job.aliases == (None, None)


def test_a_number_is_a_version_although_a_variant_is_called_by_it(job: Job, client: MlflowClient) -> None:
    job.add("int8")
    called = job.add("1")  # of an Olive file 1.json
    assert (called.version, called.aliases) == (2, ())
    assert job.registry.newest(job.book.name, "1") == called
    for number in ("1", "3"):  # as before there was this rule
        client.set_registered_model_alias(job.book.name, number, "2")
    assert job.find("1").variant == "int8"
    with pytest.raises(UsageError, match="'3'"):
        job.find("3")
    with pytest.raises(UsageError, match="'7'"):
        job.registry.newest(job.book.name, "7")


def test_promotions_rollbacks_and_withdrawals_move_the_aliases(job: Job, client: MlflowClient) -> None:
    first, second, third = job.add("int8"), job.add("int4"), job.add("fp16")
    assert job.registry.withdraw(first, "never was") is None
    job.promote(first)
    assert job.registry.withdraw(first, "broken") is None  # there is nothing to go back to
    assert job.aliases == (1, None)
    job.promote(second)
    assert job.aliases == (2, 1)
    job.promote(third)
    assert job.aliases == (3, 2)
    for reason in ("it answers nothing", "another device says so"):  # the second time it is not the champion any more
        now = job.registry.withdraw(third, reason)
        assert now is not None
        assert now.version == 2
        assert job.aliases == (2, 1)  # and not back to the one that failed
        assert job.find("3").tags["slmops.withdrawn"] == reason
    job.promote(third, second)  # in the end a rollback
    assert job.aliases == (2, 3)
    assert job.find("champion").tags["slmops.promoted_by"] == "me"
    with pytest.raises(PromotionError, match=r"version 2 \(int4\)"):
        job.registry.promote(third, first, {})  # judged against what is no longer the champion
    client.delete_model_version(job.book.name, "3")
    assert job.aliases == (2, None)


def test_an_overwritten_promotion_is_told_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = job.add("int8"), job.add("int4")
    set_alias = MlflowClient.set_registered_model_alias

    def overwritten(self: MlflowClient, name: str, alias: str, version: str) -> None:
        set_alias(self, name, alias, "2" if alias == "champion" else version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overwritten)
    with pytest.raises(PromotionError, match=r"version 2 \(int4\)"):
        job.registry.promote(first, None, {})
    assert job.aliases == (second.version, None)


@pytest.mark.parametrize("stops_before", [0, 1, 2])
def test_a_crash_in_a_promotion_leaves_aliases_that_point_at_something(
    job: Job, monkeypatch: pytest.MonkeyPatch, stops_before: int
) -> None:
    job.book.name += str(stops_before)
    first, second = job.add("int8"), job.add("int4")
    job.promote(first)
    left = stops_before
    set_alias = MlflowClient.set_registered_model_alias

    def crash(self: MlflowClient, name: str, alias: str, version: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("gone")
        set_alias(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", crash)
    if stops_before < 2:
        with pytest.raises(TrackingError, match="gone"):
            job.registry.promote(second, first, {})
    else:
        job.registry.promote(second, first, {})
    assert job.aliases == {0: (1, None), 1: (1, 1), 2: (2, 1)}[stops_before]


def test_what_is_not_there_is_named(job: Job) -> None:
    job.add("int8")
    with pytest.raises(UsageError, match="'nothing'") as caught:
        job.registry.find("nothing", "champion")
    assert job.book.name in str(caught.value.fix)
    for which in ("champion", "7", "int2", "v1", "'; drop", ""):
        with pytest.raises(UsageError, match=job.book.name) as caught:
            job.find(which)
        assert "1 (int8)" in str(caught.value.fix)
    assert job.registry.champion("nothing") is None
    assert job.registry.versions("it's") == []
    assert job.book.name in job.registry.models()


def test_what_others_registered_is_left_alone(job: Job, client: MlflowClient, tmp_path: Path) -> None:
    client.create_registered_model(f"{job.book.name}-foreign")
    theirs = client.create_model_version(f"{job.book.name}-foreign", str(tmp_path), await_creation_for=0)
    client.set_registered_model_alias(theirs.name, "champion", theirs.version)
    with pytest.raises(UsageError, match=theirs.name):
        job.registry.champion(theirs.name)
    assert job.registry.versions(theirs.name) == []
    assert theirs.name not in job.registry.models()
    job.book.name = theirs.name
    with pytest.raises(UsageError, match=theirs.name):
        job.add("int8")


def test_an_altered_version_is_named(job: Job, client: MlflowClient) -> None:
    job.add("int8")
    client.delete_model_version_tag(job.book.name, "1", "slmops.size_mb")
    with pytest.raises(UsageError, match=r"slmops\.size_mb"):
        job.find("int8")
    assert job.registry.versions(job.book.name) == []


def test_a_dead_server_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    dead = Registry("http://127.0.0.1:9")
    for ask in (dead.models, lambda: dead.champion("x"), lambda: dead.find("x", "1"), lambda: dead.versions("x")):
        with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9"):
            ask()
