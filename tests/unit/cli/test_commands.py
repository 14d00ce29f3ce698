"""What each command asks for, and what it prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from slmops import report
from slmops.core import errors, machine
from slmops.core.job import SHIPPED
from slmops.delivery import promotion, pull
from slmops.evaluation import drift, soak
from slmops.evaluation.drift import DriftError, Remeasured
from slmops.evaluation.soak import SoakError, Target
from slmops.foundry.versions import Installed, Promoted
from slmops.local import stack
from slmops.serving import service
from slmops.tracking.registry import Registry
from slmops.training.values import Retrained, RetrainError
from tests import values

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Flows, Slmops

PAGE = "http://mlflow/run"
COMPARISON = values.comparison(values.result("int4", 114.0), chosen="int4")
NONE = errors.GateError("None is good enough.")
NONE.comparison = COMPARISON
VERSION: dict[str, Any] = {"model": "bot", "version": 4, "variant": "int8"}
PROMOTED = Promoted(**VERSION, replaced=3, changed=True, url=PAGE)
SOAKED = soak.judge(Target(model="tiny", variant="int8", foundry_id="x"), [500_000.0] * 30, 10)
SOAKED = SOAKED.model_copy(update={"run_id": "r"})
SLOWER: dict[str, Any] = {"outcome": "drifted", "figures": (), "hardware_kind": "P", "detail": "It is slower."}
REMEASURED = Remeasured(**VERSION, **SLOWER, recorded_run="r", run_id="s")
RETRAINED = Retrained(
    model="bot", outcome="promoted", detail="Better.", input_digest="d", run_id="r", url=PAGE, version=4
)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_TRACKING_URI", "http://registry")


DEMO = {"model": "demo", "data": "demo", "name": "ticket-router", "serve": True, "watch_s": 30}
MINE = {"model": "m", "precision": ["int4", "int8"], "olive_config": "mine.json", "quick": True}
REQUESTS: dict[str, dict[str, Any]] = {
    "run --model=org/m@main --name bot": {"model": "org/m@main", "name": "bot"},
    "run --model m --precision int4 --precision int8 --olive-config mine.json --quick": MINE,
    "demo --quick": {"model": "demo", "quick": True},
    "retrain --model m --data d --watch-s 0": {"model": "m", "data": "d", "watch_s": 0},
    "retrain --demo --training.epochs 1": {**DEMO, "training": {"epochs": 1.0}},
    "sweep --model m --precision int4 --trials 3": {"model": "m", "precision": ["int4"], "trials": 3},
    "soak": {},
    "soak bot": {"name": "bot"},
    "soak --name bot": {"name": "bot"},
    "soak bot --variant int4 --requests 40": {"name": "bot", "variant": "int4", "requests": 40},
    "soak bot --champion": {"name": "bot", "champion": True},
    "measure bot --version 4": {"name": "bot", "version": 4},
    "remeasure bot --version int8 --max-slowdown 2": {"name": "bot", "version": "int8", "max_slowdown": 2},
    "promote bot": {"name": "bot"},
    "promote bot --precision int8": {"name": "bot", "precision": "int8"},
    "promote bot --version 3 --force unfair": {"name": "bot", "version": 3, "force": "unfair"},
}


@pytest.mark.parametrize("arguments", REQUESTS)
def test_flags_are_the_request(flows: Flows, slmops: Slmops, arguments: str) -> None:
    flows.answer = errors.WorkError("Here it ends.")
    assert slmops(arguments)[0] == 1
    command = arguments.split()[0]
    assert flows.options == REQUESTS[arguments]
    assert flows.asked[0][0] == {"run": "optimize", "demo": "optimize"}.get(command, command)


@pytest.mark.parametrize("option", ["", " --json"])
@pytest.mark.parametrize(
    ("command", "result", "text"),
    [
        ("run --model m", COMPARISON, report.text(COMPARISON)),
        ("promote bot", PROMOTED, PROMOTED.text),
        ("rollback bot", PROMOTED, PROMOTED.text),
        ("retrain --model m --data d", RETRAINED, RETRAINED.text),
        ("soak", SOAKED, SOAKED.text),
        ("remeasure bot", REMEASURED, drift.text(REMEASURED)),
    ],
)
def test_a_result_goes_to_stdout_and_its_page_to_stderr(
    flows: Flows, slmops: Slmops, command: str, result: BaseModel, text: str, option: str
) -> None:
    flows.answer = result
    code, out, err = slmops(command + option)
    assert code == 0
    assert (type(result).model_validate_json(out) == result) if option else (out == f"{text}\n")
    assert err.startswith(f"\nin MLflow: {PAGE}\n")
    assert ("deploy int4: slmops promote tiny\n" in err) == (result is COMPARISON)


@pytest.mark.parametrize(
    ("command", "error", "result"),
    [
        ("retrain --model m --data d", RetrainError(RETRAINED), RETRAINED),
        ("soak", SoakError(SOAKED), SOAKED),
        ("remeasure bot", DriftError(REMEASURED), REMEASURED),
        ("run --model m", NONE, COMPARISON),
        ("retrain --model m --data d", NONE, COMPARISON),
    ],
)
def test_what_was_measured_is_printed_though_a_gate_refuses_it(
    flows: Flows, slmops: Slmops, command: str, error: errors.GateError, result: BaseModel
) -> None:
    flows.answer = error
    code, out, err = slmops(f"{command} --json")
    assert (code, type(result).model_validate_json(out)) == (3, result)
    assert f"error: {error.message}\n" in err


@pytest.fixture
def handed_over(flows: Flows, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    given: list[tuple[str, Any]] = []
    approval = SimpleNamespace(promote=flows.stand_in("promote"), hand_over=lambda *asked: given.append(asked) or PAGE)
    monkeypatch.setitem(sys.modules, "flows.promote", approval)
    monkeypatch.setattr(promotion, "decide", lambda *_: None)
    monkeypatch.setattr(promotion, "refuse", lambda _: None)
    return given


def test_a_worker_does_what_waits_for_a_person(
    flows: Flows, slmops: Slmops, handed_over: list[tuple[str, Any]], tmp_path: Path
) -> None:
    """In another folder."""
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "demo").mkdir()  # which "demo" is not
    assert slmops("promote bot --approval --approval-timeout-s 60")[:2] == (0, f"{PAGE}\n")
    code, out, _ = slmops("retrain --model demo --data d.jsonl --matcher m.py:f --approval --json")
    assert (code, json.loads(out)) == (0, {"url": PAGE})
    assert flows.asked == []
    [(one, promote), (two, retrain)] = handed_over
    assert (one, promote.name, promote.approval_timeout_s) == ("promote", "bot", 60)
    assert (two, retrain.model, retrain.matcher) == ("retrain", "demo", "m.py:f")
    assert retrain.data == str(tmp_path / "d.jsonl")


@pytest.mark.usefixtures("flows")
def test_what_a_gate_refuses_needs_no_person(
    slmops: Slmops, handed_over: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "refuse", lambda _: errors.GateError("It is worse."))
    assert slmops("promote bot --approval")[0] == 3
    assert slmops("promote bot --approval --force testing")[0] == 0
    assert len(handed_over) == 1


def test_one_job_file_deploys_and_retrains(flows: Flows, slmops: Slmops, tmp_path: Path) -> None:
    """With absolute paths, for a worker in another folder."""
    (tmp_path / "base").mkdir()
    text = "model: base\ndata: /tickets\nname: bot\ntraining: {learning_rate: 0.01}\n"
    told = "notify: slack-webhook/team\n"
    (tmp_path / "job.yaml").write_text(f"{text}{told}schedule: {{retrain: 0 2 * * *, news_minutes: 5}}\n")
    flows.answer = ["retrain/retrain-bot", "remeasure/remeasure-bot"]
    code, out, _ = slmops("deploy job.yaml --schedule.timezone Asia/Tokyo")
    assert (code, out) == (0, "retrain/retrain-bot\nremeasure/remeasure-bot\n")
    retraining = {"data": "/tickets", "name": "bot", "training": {"learning_rate": 0.01}}
    when = {"retrain": "0 2 * * *", "news_minutes": 5, "timezone": "Asia/Tokyo"}
    only_deployed = {"schedule": when, "notify": "slack-webhook/team"}
    assert flows.options == {"model": str(tmp_path / "base"), **retraining, **only_deployed}
    [(_, request)] = flows.asked
    assert request.retraining == {"model": str(tmp_path / "base"), **retraining}
    flows.asked.clear()
    flows.answer = RETRAINED
    assert slmops("retrain --job job.yaml")[0] == 0
    assert flows.options == {"model": "base", **retraining}


def test_the_deployments_of_a_model_are_removed(flows: Flows, slmops: Slmops) -> None:
    flows.answer = ["retrain/retrain-bot"]
    assert slmops("undeploy bot")[:2] == (0, "retrain/retrain-bot\n")
    assert flows.asked == [("undeploy", "bot")]


@pytest.mark.usefixtures("flows")
def test_approve_shows_the_gates_and_takes_an_answer(slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[tuple[str, Any]] = []
    stand_in = sys.modules["flows.promote"]
    monkeypatch.setattr(stand_in, "Approval", dict, raising=False)
    monkeypatch.setattr(stand_in, "question", lambda run: f"gates of {run}", raising=False)
    monkeypatch.setattr(stand_in, "approve", lambda run, answer: answers.append((run, answer)), raising=False)
    monkeypatch.setattr(machine, "person", lambda: "me")
    assert slmops("approve 7")[:2] == (0, "gates of 7\n")
    assert answers == []
    slmops("approve 7 --reason good")
    slmops("approve 7 --reason slow --by Ada --reject")
    good = {"promote": True, "approver": "me", "reason": "good"}
    assert answers == [("7", good), ("7", {"promote": False, "approver": "Ada", "reason": "slow"})]


@pytest.mark.parametrize("registry", [True, False])
def test_serve_starts_without_a_registry_too(slmops: Slmops, registry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(service, "run", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(stack, "_read", lambda _: {})
    if not registry:
        monkeypatch.delenv("SLMOPS_TRACKING_URI")
    assert slmops("serve bot --port 9000 --concurrency 4")[0] == 0
    [(name, options, _, uri)] = asked
    assert (name, options.host, options.port, options.concurrency) == ("bot", "127.0.0.1", 9000, 4)
    assert uri == ("http://registry" if registry else "http://127.0.0.1:5000")


def test_pull_says_where_it_is(slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    done = Installed(name="bot", version=3, variant="int8", foundry_id="bot-int8-generic-cpu:3", folder=Path("/there"))
    asked: list[Any] = []
    monkeypatch.setattr(pull, "pull", lambda name, which, _, uri: asked.append((name, which, uri)) or done)
    assert slmops("pull bot@int8 --from http://elsewhere")[:2] == (0, "bot-int8-generic-cpu:3\n/there\n")
    assert json.loads(slmops("pull bot --json")[1])["version"] == 3
    assert asked == [("bot", "int8", "http://elsewhere"), ("bot", None, "http://registry")]


def test_status_of_a_model(slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"slmops.gates": "passed 3 of 4", "slmops.withdrawn": "it answers nothing"}
    said = {"promoter": "promote, started by ann", "reason": "it is better", "run": "http://prefect/run"}
    origin = {"slmops.data": "tickets", "slmops.data_digest": "d" * 64, "slmops.base_model": "./base"}
    tags |= {**origin, "slmops.champion.2026-01-03T10:00:00.5Z": json.dumps(said)}
    version = values.model_version(3, aliases=("champion", "int8"), size_mb=158.02, tags=tags)
    older = values.model_version(2, tags={"slmops.promoted": "2026-01-02T10:00:00+00:00", "slmops.promoted_by": "url"})
    monkeypatch.setattr(Registry, "versions", lambda _, name: [version, older] * (name == "bot"))
    monkeypatch.setattr(Registry, "models", lambda _: ["bot"])
    said = "3 int8 158.0 passed 3 of 4 2026-01-02 00:00 champion withdrawn: it answers nothing"
    lines = slmops("status bot")[1].splitlines()
    assert lines[2].split() == said.split()
    first, second = (" ".join(line.split()) for line in lines[-2:])
    assert first.endswith(" now promote, started by ann it is better tickets (dddddddddddd) ./base")
    assert second.startswith("version 2 (int8) 2026-01-02 ")  # from before there was a history
    told = json.loads(slmops("status bot --json")[1])
    assert [one["version"] for one in told["versions"]] == [3, 2]
    assert [(one["version"], one["until"]) for one in told["history"]] == [
        (3, None),
        (2, "2026-01-03T10:00:00.500000Z"),
    ]
    code, _, err = slmops("status boat")
    assert code == 2
    assert "Known models: bot." in err


def test_status_of_nothing(slmops: Slmops, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLMOPS_TRACKING_URI")
    stopped = {"url": None, "ok": False}
    expected = {"home": str(home), "prefect": stopped, "mlflow": stopped, "serving": None}
    assert json.loads(slmops("status --json")[1]) == expected
    assert slmops("status")[1].splitlines()[1:] == ["prefect  -  not running", "mlflow   -  not running"]


def test_recipes_are_listed_with_the_users_own(slmops: Slmops, home: Path) -> None:
    (home / "recipes").mkdir(parents=True)
    mine = {"when": "On phones.", "passes": {"a": {"type": "Rtn"}, "b": {"type": "ModelBuilder"}}}
    (home / "recipes" / "mine.json").write_text(json.dumps(mine))
    code, out, _ = slmops("recipes")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "fp32: 32 bits; ModelBuilder > GraphSurgeries; for cpu"
    assert [line.partition("; for ")[2] for line in lines if line.startswith("int4:")] == ["cpu, webgpu, cuda, dml"]
    assert lines[-3:] == [
        "mine: any bits; Rtn > ModelBuilder; for cpu",
        "    On phones.",
        f"    {home}/recipes/mine.json",
    ]
    rows = json.loads(slmops("recipes --json")[1])
    assert [row["name"] for row in rows] == [*SHIPPED, "mine"]
    assert (rows[-1]["passes"], rows[-1]["chain"]) == (mine["passes"], ["Rtn", "ModelBuilder"])
