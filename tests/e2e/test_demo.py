"""The main job on the real model, asked without our program; then broken, promoted, served under load and pulled."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.conversion import store
from slmops.core.files import write_atomic
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Recipe, Variant, VariantResult
from slmops.evaluation import quality, summary
from slmops.foundry.register import register
from slmops.report import COLUMNS, SOMETIMES
from slmops.selection import choice as selection
from slmops.selection import policy
from tests import making, measured
from tests.application import application
from tests.compose import free_ports

pytestmark = pytest.mark.e2e

NAME = "smollm2-135m-instruct"


def test_it_reports_both_variants_and_takes_int8(comparison: dict[str, Any]) -> None:
    assert comparison["model"] == NAME
    by_name = {variant["name"]: variant for variant in comparison["variants"]}
    assert {name: variant["status"] for name, variant in by_name.items()} == {"fp32": "ok", "int8": "ok"}
    assert comparison["choice"]["variant"] == "int8", comparison["choice"]["reason"]
    for variant in by_name.values():
        assert {metric for _, metric, *_ in COLUMNS} - SOMETIMES <= set(variant["metrics"])
    fp32, int8 = by_name["fp32"]["metrics"], by_name["int8"]["metrics"]
    assert fp32["bits_per_weight"] == pytest.approx(32, abs=0.1)
    assert 8 < int8["bits_per_weight"] < 10
    assert int8["size_ratio"] == pytest.approx(int8["size_mb"] / fp32["size_mb"])
    assert 8 < fp32["perplexity"] < 25  # the text differs a little between Python versions
    assert int8["perplexity_ratio"] < 1.05
    assert fp32["accuracy"] > 0.5


def test_foundry_local_lists_and_answers(slmops: Any, comparison: dict[str, Any]) -> None:
    fp32 = next(variant for variant in comparison["variants"] if variant["name"] == "fp32")
    found = application(slmops.home / "foundry", fp32["foundry_id"])  # with nothing but the SDK
    assert {variant["foundry_id"] for variant in comparison["variants"]} <= set(found["listed"])
    assert "Paris" in found["answers"][fp32["foundry_id"]]["text"]


def test_mlflow_holds_parent_children_and_models(slmops: Any, comparison: dict[str, Any]) -> None:
    api = slmops.json("status")["mlflow"]["url"] + "/api/2.0/mlflow"

    def run(run_id: str) -> dict[str, Any]:
        return httpx.get(f"{api}/runs/get", params={"run_id": run_id}).json()["run"]

    parent = run(comparison["run_id"])
    assert parent["info"]["status"] == "FINISHED"
    assert {"key": "slmops.choice", "value": "int8"} in parent["data"]["tags"]
    for variant in comparison["variants"]:
        child = run(variant["run_id"])
        assert {"key": "mlflow.parentRunId", "value": comparison["run_id"]} in child["data"]["tags"]
        logged = {metric["key"]: metric["value"] for metric in child["data"]["metrics"]}
        assert {name: value for name, value in logged.items() if "/" not in name} == pytest.approx(variant["metrics"])
        files = httpx.get(f"{api}/artifacts/list", params={"run_id": variant["run_id"]}).json()["files"]
        assert {file["path"] for file in files} >= {
            *("variant.json", "olive_config.json", "olive.log", "genai_config.json", "inference_model.json"),
            *("file_sizes.json", "answers.json"),
        }
        [logged_model] = child["inputs"]["model_inputs"]
        model = httpx.get(f"{api}/logged-models/{logged_model['model_id']}").json()["model"]
        assert {metric["key"] for metric in model["data"]["metrics"]} >= set(variant["metrics"])


# --- variants that are broken on purpose, in ways that load and answer: the gates must find them

BROKEN = "broken"
JOB = Job(model="demo", quick=True)


def _spoilt(variant: Variant, name: str, spoil: Callable[[Path], object], settings: Settings) -> Variant:
    """A spoilt copy; its manifest is made to fit the files, so that nothing but the measurements can tell."""
    folder = shutil.copytree(variant.path, settings.variants / f"{name}-spoilt")
    spoil(folder)
    recipe = Recipe(name=name, config=variant.recipe.config, bits=variant.recipe.bits)
    changes = {"path": folder, "key": folder.name, "recipe": recipe, "files": store.files_of(folder)}
    spoilt = variant.model_copy(update=changes)
    write_atomic(folder / MANIFEST, spoilt.model_dump_json(indent=2))
    return spoilt


def _zero_some_weights(folder: Path) -> None:
    data = folder / "model.onnx.data"
    size = data.stat().st_size
    with data.open("r+b") as file:  # some layers in the middle: with all of them the model says nothing
        file.seek(size // 2)
        file.write(bytes(size // 20))


def _mix_up_roles(folder: Path) -> None:
    """The model goes on with a question of the user's."""
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>assistant\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>user\n"
    )


def _judged(variants: list[Variant], settings: Settings) -> dict[str, VariantResult]:
    timed = measured.speed(measured.turn(measured.timed(0.1, 1)))  # no gate looks at it
    results: list[VariantResult] = []
    baseline: tuple[float, quality.Quality] | None = None  # the first
    for variant in variants:
        context = JobContext(JOB, BROKEN, variant.checkpoint, settings)
        found = quality.measure(variant, register(variant, BROKEN, JOB, settings), context)
        baseline = baseline or (variant.model_mb, found)
        figures = summary.evaluation(variant, timed, found, baseline, None)
        results.append(
            VariantResult(name=variant.name, status="ok", metrics=figures.metrics, measurements=figures.measurements)
        )
    # The spoilt ones are the first choice, if nothing refuses them.
    spoilt = tuple(variant.name for variant in variants if not variant.recipe.baseline)
    choice, judged = selection.choose(results, policy.load().model_copy(update={"preference": spoilt}))
    assert choice.variant not in spoilt, choice.reason
    return {result.name: result for result in judged}


def test_the_gates_refuse_them(slmops: Any, comparison: dict[str, Any]) -> None:
    settings = Settings(home=slmops.home)
    loaded = [store.load(Path(variant["path"])) for variant in comparison["variants"]]
    good = {variant.name: variant for variant in loaded if variant is not None}
    mistaken = _spoilt(good["int8"], "mistaken", _mix_up_roles, settings)
    zeroed = _spoilt(good["int8"], "zeroed", _zero_some_weights, settings)
    judged = _judged([good["fp32"], mistaken, zeroed], settings)
    [job] = [variant["metrics"] for variant in comparison["variants"] if variant["name"] == "fp32"]
    for exact in ("perplexity", "accuracy", "size_mb", "bits_per_weight"):  # the same whenever it is measured
        assert judged["fp32"].metrics[exact] == pytest.approx(job[exact], rel=1e-6)
    found = {
        name: {gate.metric: gate for gate in result.gates if gate.outcome != "skipped"}
        for name, result in judged.items()
    }
    assert found["mistaken"]["perplexity"].outcome == "pass"  # the weights are right
    assert found["mistaken"]["accuracy"].refuses, found["mistaken"]["accuracy"].detail
    assert found["zeroed"]["perplexity"].outcome == "fail", found["zeroed"]["perplexity"].detail


# --- from the comparison to an application that uses the model

PARIS = "What is the capital of France? Answer in one sentence."

# An application: nothing of slmops in it.
CHAT = """
import json, sys
from openai import OpenAI, NotFoundError
url, model = sys.argv[1:]
client = OpenAI(base_url=url, api_key="none", max_retries=0)
question = "What is the capital of Italy? Answer in one sentence."
ask = {"model": model, "messages": [{"role": "user", "content": question}]}
whole = client.chat.completions.create(**ask, temperature=0, max_tokens=24)
pieces = client.chat.completions.create(**ask, temperature=0, max_tokens=24, stream=True)
streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
responded = client.responses.create(model=model, input=question, temperature=0, max_output_tokens=24)
try:
    client.chat.completions.create(**{**ask, "model": "nothing"})
    refused = None
except NotFoundError as error:
    refused = error.code
print(json.dumps({"model": whole.model, "answer": whole.choices[0].message.content, "streamed": streamed,
    "responded": responded.output_text, "refused": refused, "models": [model.id for model in client.models.list()]}))
"""


class Service:
    def __init__(self, slmops: Any, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.started = slmops.start("serve", NAME, "--port", str(port), "--poll-s", "0.5")

    def wait_for(self, version: int) -> None:
        def served() -> bool:
            assert self.started.process.poll() is None, self.started.lines
            with suppress(httpx.TransportError, KeyError):
                return bool(httpx.get(f"{self.url}/health", timeout=10).json()["version"] == version)
            return False

        making.until(served, f"version {version} is served", 120)


@pytest.fixture(scope="module")
def versions(slmops: Any, comparison: dict[str, Any]) -> dict[str, int]:
    """Variant to version; the choice of the comparison is deployed."""
    made = {variant["name"]: variant["version"] for variant in comparison["variants"]}
    done = slmops("promote", NAME)
    assert done.returncode == 0, done.stderr
    assert f"{NAME} version {made['int8']} (int8) is the champion now." in done.stdout
    return made


@pytest.fixture(scope="module")
def service(slmops: Any, versions: dict[str, int]) -> Iterator[Service]:
    running = Service(slmops, *free_ports(1))
    running.wait_for(versions["int8"])
    yield running
    assert running.started.end(signal.SIGTERM) in (0, 130)


def test_an_application_talks_to_it(service: Service) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHAT, f"{service.url}/v1", NAME], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["model"].startswith(f"{NAME}-int8-generic-cpu:")
    for way in ("answer", "streamed", "responded"):
        assert "Rome" in said[way], said
    assert said["refused"] == "model_not_found"
    assert said["models"][0] == NAME


def test_promotion_and_rollback_under_load_lose_no_request(
    slmops: Any, service: Service, versions: dict[str, int]
) -> None:
    stop = threading.Event()
    outcomes: Counter[str] = Counter()
    answered: Counter[str] = Counter()

    def keep_asking() -> None:
        body = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": PARIS}]}
        with httpx.Client(base_url=service.url, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/v1/chat/completions", json=body)
                whole = response.status_code == 200 and response.json()["usage"]["completion_tokens"] > 0
                outcomes["ok" if whole else f"{response.status_code} {response.text}"] += 1
                answered[response.headers.get("x-slmops-version", "none")] += 1
                stop.wait(0.2)

    clients = [threading.Thread(target=keep_asking) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        # Few questions: by chance fp32 may be worse than the champion on them, and be refused.
        promoted = slmops.json("promote", NAME, "--precision", "fp32", "--force", "it is to be served for a moment")
        assert (promoted["variant"], promoted["replaced"]) == ("fp32", versions["int8"])
        service.wait_for(versions["fp32"])
        assert slmops.json("rollback", NAME)["version"] == versions["int8"]
        service.wait_for(versions["int8"])
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert set(outcomes) == {"ok"}
    assert set(answered) == {str(versions["fp32"]), str(versions["int8"])}


def test_status_tells_what_is_served(slmops: Any, service: Service, versions: dict[str, int]) -> None:
    assert slmops.json("status")["serving"] == {"url": service.url, "model": NAME, "ok": True}
    listed = {one["version"]: set(one["aliases"]) for one in slmops.json("status", NAME)["versions"]}
    assert listed == {versions["int8"]: {"champion", "int8"}, versions["fp32"]: {"previous", "fp32"}}


def test_another_device_pulls_it(slmops: Any, versions: dict[str, int], tmp_path: Path) -> None:
    device = {"SLMOPS_HOME": str(tmp_path / "device")}
    uri = slmops.json("status")["mlflow"]["url"]
    done = slmops("pull", NAME, "--from", uri, "--json", **device)
    assert done.returncode == 0, done.stderr
    pulled = json.loads(done.stdout)
    assert (pulled["variant"], pulled["version"]) == ("int8", versions["int8"])
    weights = Path(pulled["folder"]) / "model.onnx.data"
    assert weights.stat().st_size > 1e8
    assert weights.stat().st_nlink == 2  # with its own store: it was really fetched
    wrong = slmops("pull", "nothing", "--from", uri, **device)
    assert wrong.returncode == 2
    assert "There is no model 'nothing'" in wrong.stderr or "Nothing of" in wrong.stderr
