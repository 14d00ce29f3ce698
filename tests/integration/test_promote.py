"""Promotion and rollback as Prefect flows: real MLflow, real Prefect, and a tiny variant that really answers."""

import os
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.objects import FlowRun

from flows.promote import Approval, approve, hand_over, promote, question, rollback
from slmops.core import locks, machine
from slmops.core.errors import BusyError, GateError, PrerequisiteError, TrackingError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Measurement, Registration, Variant
from slmops.delivery.pull import pull
from slmops.foundry.register import register
from slmops.foundry.versions import VERSION_MANIFEST, Promotion, reigns
from slmops.selection.policy import Gate, Policy
from tests import deployed, making, values
from tests.pulled import names
from tests.shown import artifacts, flow_runs
from tests.tracked import Book

pytestmark = pytest.mark.integration

POLICY = Policy(gates=(Gate(metric="accuracy", of="difference", to="champion", min=-0.1, inconclusive="accept"),))


class Bot(Book):
    """A model of which versions can be made: one real variant, with what is said to be measured of it."""

    def __init__(self, name: str, settings: Settings, *made: Any) -> None:
        super().__init__(str(settings.tracking_uri), name, settings.home)
        self.settings, (self.variant, self.registration) = settings, made

    def make(self, accuracy: float) -> None:
        """A job that made one version, whose files differ from the last one's in a file that no runtime reads."""
        parent = self.start()
        (self.registration.path / "note.txt").write_text(parent)
        measured = Measurement(value=accuracy, unit="1", samples=40, low=accuracy - 0.05, high=accuracy + 0.05)
        made, evaluation = (self.variant, self.registration), values.evaluation({"accuracy": measured})
        result = self.tracker.log_variant(parent, self.name, *made, evaluation, self.settings.logs)
        version = self.registry.add(self.name, *made, result, parent)
        numbered = result.model_copy(update={"version": version.version})
        self.finish(parent, numbered, chosen=result.name, policy=POLICY)

    @property
    def champion(self) -> int | None:
        now = self.registry.champion(self.name)
        return now and now.version


@pytest.fixture(scope="module")
def made(job: Job, settings: Settings, stock: Settings) -> tuple[Variant, Registration]:
    variant = making.variant("int4", job, stock)
    here = shutil.copytree(variant.path, settings.variants / variant.key, copy_function=os.link)
    variant = variant.model_copy(update={"path": here})
    return variant, register(variant, "tiny", job, settings)


@pytest.fixture
def bot(made: tuple[Variant, Registration], settings: Settings, name: str) -> Bot:
    return Bot(name, settings, *made)


def last(flow: str) -> FlowRun:
    return flow_runs(flow)[-1]


def test_promote_and_roll_back(bot: Bot, settings: Settings) -> None:
    bot.make(0.8)
    small, weights = {"tokenizer.json", VERSION_MANIFEST}, {"model.onnx.data", "model.onnx"}
    assert (small | weights) & names(bot.stored) == small
    first = promote(Promotion(name=bot.name))
    assert weights < names(bot.stored)
    assert (first.version, first.replaced, first.changed, bot.champion) == (1, None, True, 1)
    assert (settings.deployed / "models" / "slmops" / f"{bot.name}-int4-generic-cpu-1" / VERSION_MANIFEST).is_file()

    bot.make(0.75)
    second = promote(Promotion(name=bot.name))
    assert (second.version, second.replaced, bot.champion) == (2, 1, 2)
    assert [gate.outcome for gate in second.gates] == ["inconclusive"]  # but within the margin
    assert "version 2 (int4)** is to replace" in artifacts(last("promote"))[f"promotion-{bot.name}"]
    assert str(last("promote").id) in bot.registry.find(bot.name, "2").tags["slmops.promoted_by"]

    assert not promote(Promotion(name=bot.name, version=2)).changed
    back = rollback(bot.name)
    assert (back.version, back.replaced, bot.champion) == (1, 2, 1)
    assert rollback(bot.name).version == 2  # and forth
    history = reigns(bot.registry.versions(bot.name))
    assert [one.version for one in history] == [2, 1, 2, 1]
    assert [one.promoter.partition(",")[0] for one in history] == ["rollback", "rollback", "promote", "promote"]
    assert history[0].promoter.endswith(f"started by {machine.person()}")
    assert history[0].run.endswith(str(last("rollback").id))
    assert history[0].reason == f"rolled back from {bot.name} version 1 (int4)"
    assert [one.reason.partition(", ")[2] for one in history[2:]] == [f"against {bot.name} version 1 (int4)", ""]


def test_what_is_worse_is_refused_unless_forced(bot: Bot) -> None:
    bot.make(0.8)
    promote(Promotion(name=bot.name))
    bot.make(0.5)
    with pytest.raises(GateError, match=r"version 2.*accuracy"):
        promote(Promotion(name=bot.name))
    assert last("promote").state_name == "Failed"
    assert bot.champion == 1
    forced = promote(Promotion(name=bot.name, force="the old one is wrong"))
    assert (forced.version, bot.champion) == (2, 2)
    assert str(forced.forced).startswith("the old one is wrong (against: accuracy")
    assert bot.registry.find(bot.name, "2").tags["slmops.forced"] == forced.forced
    assert reigns(bot.registry.versions(bot.name))[0].reason.endswith(f"; forced: {forced.forced}")


def test_altered_files_are_not_promoted(bot: Bot) -> None:
    bot.make(0.8)
    file = bot.stored / "note.txt"
    for alter in (lambda: file.write_text("something else"), file.unlink):
        alter()
        with pytest.raises(TrackingError, match=r"note\.txt"):
            promote(Promotion(name=bot.name))
        assert bot.champion is None


def test_weights_that_are_elsewhere_are_not_promoted(bot: Bot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bot.make(0.8)
    with monkeypatch.context() as patch:
        patch.setenv("SLMOPS_HOME", str(tmp_path / "elsewhere"))
        said = rf"(?s)model\.onnx.* version 1 \(int4\).* on {platform.node()} only"
        again = f"`slmops run --model {bot.variant.checkpoint.source} --name {bot.name}`"
        with pytest.raises(PrerequisiteError, match=f"{said}.*{again}"):
            promote(Promotion(name=bot.name))
    assert (bot.champion, bot.registry.find(bot.name, "1").uploaded) == (None, False)
    promote(Promotion(name=bot.name))
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "elsewhere"))
    assert not promote(Promotion(name=bot.name)).changed
    assert pull(bot.name, None, Settings(), str(bot.settings.tracking_uri)).version == 1  # now it has them


def test_what_is_not_there_is_told_at_once(bot: Bot) -> None:
    started = time.monotonic()
    with pytest.raises(UsageError, match=bot.name):
        promote(Promotion(name=bot.name))
    with pytest.raises(UsageError, match=bot.name):
        rollback(bot.name)
    bot.make(0.8)
    with pytest.raises(UsageError, match="7"):
        promote(Promotion(name=bot.name, version=7))
    promote(Promotion(name=bot.name))
    with pytest.raises(UsageError, match="version 1"):
        rollback(bot.name)
    assert time.monotonic() - started < 60  # none of it is tried again and again


def test_what_cannot_be_promoted_now(bot: Bot) -> None:
    bot.make(0.8)
    held = locks.exclusive(bot.settings.locks / f"promote-{bot.name}.lock", "the promotion", wait=False)
    with held, pytest.raises(BusyError, match=bot.name):
        promote(Promotion(name=bot.name))
    waits = Promotion(name=bot.name, approval=True)
    for ask in (lambda: promote(waits), lambda: hand_over("promote", waits)):  # the latter as the command does it
        with pytest.raises(PrerequisiteError, match="slmops up --worker"):
            ask()
    assert bot.champion is None


def test_a_person_decides(bot: Bot) -> None:
    bot.make(0.8)
    run = deployed.start(promote, Promotion(name=bot.name, approval=True), name="for Monday")
    assert deployed.work(promote, run) is None
    assert deployed.state(run).name == "Suspended"  # no process waits
    assert bot.champion is None
    assert f"promotion-{bot.name}" in artifacts(last("promote"))  # the comparison is there to look at
    with locks.exclusive(bot.settings.locks / f"promote-{bot.name}.lock", "it", wait=False):
        pass  # nor does a lock
    assert f"**{bot.name} version 1" in question(str(run))
    approve(f"http://127.0.0.1/runs/flow-run/{run}", Approval(approver="Ada", reason="I have looked"))
    assert deployed.state(run).name == "Resuming"
    assert deployed.work(promote, run).version == 1
    tags = bot.registry.find(bot.name, "1").tags
    assert (tags["slmops.approved"], tags["slmops.approved_by"]) == ("I have looked", "Ada")
    assert datetime.fromisoformat(tags["slmops.approved_at"]) <= datetime.now(UTC)
    with pytest.raises(UsageError, match="does not wait for approval: it is Completed"):
        question(str(run))
    assert bot.champion == 1
    assert last("promote").name == "for Monday"


def test_a_person_says_no_or_nobody_decides(bot: Bot) -> None:
    bot.make(0.8)
    denied = deployed.start(promote, Promotion(name=bot.name, approval=True))
    deployed.work(promote, denied)
    approve(str(denied), Approval(promote=False, approver="Ada", reason="too slow"))
    with pytest.raises(GateError, match="turned down by Ada: too slow"):
        deployed.work(promote, denied)
    tags = bot.registry.find(bot.name, "1").tags
    assert (tags["slmops.turned_down"], tags["slmops.turned_down_by"]) == ("too slow", "Ada")
    late = deployed.start(promote, Promotion(name=bot.name, approval=True, approval_timeout_s=1))
    deployed.work(promote, late)
    time.sleep(1.5)
    for _ in range(2):
        with pytest.raises(UsageError, match="in time, so it is refused"):
            approve(str(late), Approval(approver="Ada", reason="I was away"))
    assert (deployed.state(denied).is_failed(), deployed.state(late).is_failed()) == (True, True)
    assert bot.champion is None


def test_gates_are_judged_anew_after_the_approval(bot: Bot) -> None:
    bot.make(0.7)
    bot.make(0.9)
    run = deployed.start(promote, Promotion(name=bot.name, version=1, approval=True))
    deployed.work(promote, run)
    promote(Promotion(name=bot.name, version=2))
    approve(str(run), Approval(approver="Ada", reason="it was the best"))
    with pytest.raises(GateError, match="version 1"):
        deployed.work(promote, run)
    assert bot.champion == 2
