"""One job for the CPU and for WebGPU on a machine without a GPU: from the conversion to what a device gets."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from flows.optimize import optimize
from flows.promote import promote, rollback
from flows.remeasure import measure
from slmops.conversion import recipes, schema_worker
from slmops.conversion.convert import convert
from slmops.conversion.logits import OnnxModel
from slmops.conversion.olive_worker import Workflow
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.job import JobContext
from slmops.core.settings import Settings
from slmops.core.values import Comparison, Registration
from slmops.delivery import catalog, remeasurement
from slmops.delivery.pull import pull
from slmops.evaluation import quality
from slmops.evaluation.drift import Measure
from slmops.foundry.layout import stage
from slmops.foundry.register import register, register_folder
from slmops.foundry.versions import RELEASE, Installed, Promotion
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker
from tests import making, webgpu
from tests.application import Application
from tests.catalogs import Server

pytestmark = pytest.mark.integration

NAME = "two-targets"
POLICY = "preference: [int4]\ngates: [{metric: perplexity, of: ratio, to: baseline, max: 3}]"


@pytest.fixture(scope="module")
def made(settings: Settings, talkative: Path, stock: Settings, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    inputs = tmp_path_factory.mktemp("inputs")
    (inputs / "policy.yaml").write_text(POLICY)
    asked = {"evaluation_set": making.evaluation_set(inputs), "policy": inputs / "policy.yaml"}
    job = making.job(talkative, name=NAME, precision=["int4"], target=["webgpu", "cpu"], **asked)
    making.place(("fp32", "int4"), job, stock, settings.home)
    return optimize(job)


def test_both_are_made_and_proven_and_what_needs_the_device_is_not_measured(made: Comparison) -> None:
    results = {one.name: one for one in made.variants}
    assert {name: one.foundry_id for name, one in results.items()} == {
        "fp32": f"{NAME}-fp32-generic-cpu:1",
        "int4": f"{NAME}-int4-generic-cpu:1",
        "int4-webgpu": f"{NAME}-int4-generic-gpu:1",
    }
    assert (made.choice.variant, made.other_choices["webgpu"].variant) == ("int4", "int4-webgpu")
    cpu, webgpu = results["int4"], results["int4-webgpu"]
    assert "no device for WebGpuExecutionProvider" in (webgpu.not_run or "")
    missing = {"decode_tok_s", "memory_peak_mb", "load_s"}
    assert missing < cpu.metrics.keys() - webgpu.metrics.keys()
    # The same integers, in a graph of its own with fp16 arithmetic.
    assert webgpu.metrics["perplexity_ratio"] == pytest.approx(cpu.metrics["perplexity_ratio"], rel=0.02)
    assert webgpu.metrics["accuracy"] == cpu.metrics["accuracy"]


def test_they_are_promoted_pulled_and_offered_together(
    made: Comparison, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(settings.tracking_uri)
    numbers = {one.name: one.version for one in made.variants}
    first = promote(Promotion(name=NAME))
    assert (first.version, first.others) == (numbers["int4"], {"int4-webgpu": numbers["int4-webgpu"]})
    registry = Registry(uri)
    assert all(one.uploaded for one in registry.release(registry.champion(NAME)))
    assert not promote(Promotion(name=NAME)).changed
    # As if it had been the champion before there was another target.
    MlflowClient(uri).delete_model_version_tag(NAME, str(first.version), RELEASE)
    again = promote(Promotion(name=NAME))
    assert (again.changed, again.replaced, again.others) == (True, None, first.others)
    device = Settings(home=tmp_path / "device")
    assert pull(NAME, None, device, uri).variant == "int4"
    with pytest.raises(PrerequisiteError, match="no device for WebGpuExecutionProvider"):
        pull(NAME, "int4-webgpu", device, uri)

    cpu, gpu = f"{NAME}-int4-generic-cpu:{first.version}", f"{NAME}-int4-generic-gpu:{numbers['int4-webgpu']}"
    with Server() as server:
        server.entries = catalog.entries(registry)
        assert [(one.alias, f"{one.name}:{one.version}") for one in server.entries] == [(NAME, cpu), (NAME, gpu)]
        with Application(device.deployed, server.url) as application:
            assert application("list") == [[NAME, cpu, True]]  # what the CPU can run
            assert application("variant", gpu) == [NAME, gpu, False]
            assert application("load", cpu) is None

    with pytest.raises(PrerequisiteError, match=r"cannot be measured here: .* no device for WebGpu"):
        measure(Measure(name=NAME, version=numbers["int4-webgpu"]))
    monkeypatch.setattr(remeasurement, "copied", copied_for_the_cpu)  # as if its device were here
    found = measure(Measure(name=NAME, version=numbers["int4-webgpu"]))
    result = next(one for one in found.variants if one.name == "int4-webgpu")
    assert result.not_run is None
    assert result.metrics.keys() > {"decode_tok_s", "memory_peak_mb", "load_s"}
    tracker = Tracker(uri)
    assert found == tracker.latest(NAME)
    page = tracker.download(f"runs:/{found.run_id}/report.html", tmp_path / "report").read_text(encoding="utf-8")
    assert "not measured here" not in page
    with pytest.raises(UsageError, match="was measured already"):
        measure(Measure(name=NAME, version=numbers["int4-webgpu"]))
    with pytest.raises(UsageError, match="was measured already"):
        measure(Measure(name=NAME, version=numbers["int4"]))
    second = promote(Promotion(name=NAME, precision="fp32"))
    assert (second.others, registry.release(registry.champion(NAME))[1:]) == ({}, [])
    assert rollback(NAME).others == first.others


@contextmanager
def copied_for_the_cpu(version: Installed, name: str, settings: Settings) -> Iterator[Registration]:
    given = Registration(foundry_id=version.foundry_id, path=version.folder, answer="")
    staged = stage(given, remeasurement.home_of(name, settings), on_the_cpu="here-generic-cpu:1")
    log_file = settings.logs / name / "cpu.log"
    register_folder(staged.home, staged.folder, staged.foundry_id, staged.foundry_id, log=log_file)
    yield given.model_copy(update={"foundry_id": staged.foundry_id, "path": staged.folder})


@pytest.mark.usefixtures("in_process")
def test_every_target_is_made_and_computes_on_the_cpu_what_the_checkpoint_does(
    talkative: Path, fresh: Settings
) -> None:
    names = ["fp16-dml", "int8-webgpu", "fp16-cuda", "int4-cuda", "fp16-trt-rtx"]
    providers = ["dml", "webgpu", "cuda", "cuda", "NvTensorRtRtx"]
    job = making.job(talkative, precision=["fp16", "int8", "int4"], target=["dml", "webgpu", "cuda", "trt-rtx"])
    context = JobContext(job, "tiny", making.resolve(job, fresh), fresh)
    for name, provider in zip(names, providers, strict=True):
        variant = convert(making.recipe(name, job, context.checkpoint), context)
        written = json.loads((variant.path / "genai_config.json").read_text(encoding="utf-8"))
        options = written["model"]["decoder"]["session_options"]["provider_options"]
        assert [list(one) for one in options] == [[provider]]


@pytest.mark.usefixtures("in_process")
def test_the_cpu_scores_and_answers_what_a_gpu_computes_in_bf16(
    talkative: Path, fresh: Settings, tmp_path: Path
) -> None:
    asked = making.job(talkative, precision=["bf16"], target=["cuda"], evaluation_set=making.evaluation_set(tmp_path))
    job = asked.model_copy(update={"quick": False})
    context = JobContext(job, "tiny", making.resolve(job, fresh), fresh)
    assert quality.score_checkpoint(context)
    variant = convert(making.recipe("bf16-cuda", job, context.checkpoint), context)
    assert variant.weights.by_bits.keys() == {"16"}
    registration = register(variant, "tiny", job, fresh)
    assert "no device for CUDAExecutionProvider" in (registration.not_run or "")
    scored = quality.measure(variant, registration, context)
    assert [bool(one.answer) for one in scored.answers] == [True] * len(scored.answers)
    assert scored.answers
    # Rounded: near the checkpoint, and not what fp32 computes, which is within 1e-6.
    assert 1e-5 < np.mean(scored.distances[quality.CHECKPOINT_REFERENCE].kl) < 1e-2


@pytest.mark.usefixtures("in_process")
def test_a_recipe_of_ones_own_for_a_gpu_may_have_32_bits(talkative: Path, fresh: Settings) -> None:
    fresh.recipes.mkdir(parents=True)
    export = '[passes.export]\ntype = "ModelBuilder"\nprecision = "fp32"'
    (fresh.recipes / "wide.toml").write_text(f'when = "Always."\nbits = 32\ntargets = ["webgpu"]\n{export}')
    job = making.job(talkative, precision=["wide"], target=["webgpu"])
    checkpoint = making.resolve(job, fresh)
    recipe = recipes.recipe("wide-webgpu", job, checkpoint, fresh)
    assert convert(recipe, JobContext(job, "tiny", checkpoint, fresh)).recipe.bits == 32


@pytest.mark.usefixtures("in_process")
def test_olive_knows_the_keys_of_the_workflow_for_an_npu(talkative: Path) -> None:
    file = Path(__file__).parents[2] / "docs" / "npu" / "openvino.json"
    config = json.loads(file.read_text(encoding="utf-8").replace("<model_path>", str(talkative)))
    assert schema_worker.handle(Workflow(config=config)).problems == []


@pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_webgpu") is None,
    reason="the package onnxruntime-ep-webgpu is missing: pip install -c constraints.txt -e '.[dev]'",
)
@pytest.mark.skipif(
    not webgpu.DRIVER.exists(), reason="there is no Vulkan in software: apt-get install chromium, which brings one"
)
@pytest.mark.usefixtures("in_process")
def test_webgpus_own_kernels_run_the_graph_and_compute_what_the_cpu_does(
    talkative: Path, fresh: Settings, tmp_path: Path
) -> None:
    job = making.job(talkative, precision=["int4"], target=["webgpu"])
    checkpoint = making.resolve(job, fresh)
    recipe = making.recipe("int4-webgpu", job, checkpoint)
    # Vulkan in software has no 16-bit numbers.
    passes = {name: dict(step) for name, step in recipe.config["passes"].items()}
    passes["export"]["extra_options"] = {**passes["export"]["extra_options"], "use_webgpu_fp32": True}
    in_fp32 = recipe.model_copy(update={"config": {**recipe.config, "passes": passes}})
    variant = convert(in_fp32, JobContext(job, "tiny", checkpoint, fresh))
    tokens, found = tmp_path / "tokens.npy", tmp_path / "found.npz"
    np.save(tokens, np.arange(5, 21, dtype=np.int64))
    asked = [sys.executable, webgpu.__file__, str(variant.path), str(tokens), str(found)]
    subprocess.run(asked, env={**os.environ, **webgpu.ENVIRONMENT}, check=True, timeout=300)
    ran = np.load(found)
    assert {"MatMulNBits", "GatherBlockQuantized", "GroupQueryAttention"} < {*ran["operators"]}
    expected = OnnxModel(variant.path).logits(np.load(tokens))
    # Both round what they multiply to 8 bits, each in its own way.
    assert np.abs(ran["logits"] - expected).max() < 0.05 * np.abs(expected).max()
