"""A sweep of a recipe of the user's own on a tiny model: interrupted, gone on with, and its knee saved as a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows import sweep as module
from flows.sweep import sweep
from slmops.conversion import recipes
from slmops.conversion.convert import convert
from slmops.core.errors import UsageError, WorkError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.selection import sweep as results
from slmops.selection.sweep import Sweep, Swept
from tests import making
from tests.shown import artifacts, flow_runs
from tests.tracked import read

pytestmark = pytest.mark.integration

MINE = """
when = "In this test."
passes.quantize = { type = "Rtn", bits = 8, group_size = 32, lm_head = true, embeds = true }
passes.export = { type = "ModelBuilder", precision = "int4" }
bits = 8
[genai.search]
top_k = 7
[sweep.quantize]
group_size = [32, 16, 4096]
bits = [8, 4]
"""


def test_a_sweep_goes_on_after_it_was_ended_and_its_knee_becomes_a_recipe(
    talkative: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    making.work_in_process(monkeypatch)
    settings.recipes.mkdir(parents=True)
    (settings.recipes / "mine.toml").write_text(MINE)
    text = tmp_path / "text.txt"
    text.write_text("A text of so many words, and of so many words again. " * 20)
    asked = Sweep(model=str(talkative), name="Tiny_S", precision=["mine"], perplexity_text=text, save="found")
    attempts: list[dict[str, Any]] = []
    attempt = module._Bench.attempt

    def attempted(bench: Any, trial: Any, earlier: Any) -> Any:
        attempts.append(trial.options)
        if len(attempts) == 2:
            raise WorkError("Interrupted.")
        if len(attempts) == 3:
            monkeypatch.setattr(results, "HOPELESS", 0.0)
        return attempt(bench, trial, earlier)

    monkeypatch.setattr(module._Bench, "attempt", attempted)
    with pytest.raises(WorkError, match="Interrupted"):
        sweep(asked)
    client = MlflowClient(settings.tracking_uri)
    experiment = client.get_experiment_by_name("Tiny_S").experiment_id
    [killed] = client.search_runs([experiment], "tags.`slmops.kind` = 'sweep'")
    assert killed.info.status == "KILLED"

    found = sweep(asked)
    # 32 as it is, 16, and each with 4 bits, which break the promise; 4096 does not divide the layers.
    assert attempts[0] == {"quantize.group_size": 32, "quantize.bits": 8}
    assert attempts[1] == attempts[2] != attempts[0]
    assert len(attempts) == 5
    assert sorted(one.outcome for one in found.trials) == ["failed", "failed", "measured", "stopped"]
    assert all("should have 8 bits" in one.detail for one in found.trials if one.outcome == "failed")
    [kept] = [one for one in found.trials if one.number in found.front]
    assert kept.options == attempts[0]
    assert (kept.number, [one.number for one in found.trials]) == (found.knee, [0, 1, 2, 3])
    assert {path.name.rpartition("-")[0] for path in settings.variants.iterdir()} == {"fp32", kept.variant}
    # What MLflow and Prefect have.
    run = client.get_run(found.run_id)
    assert (found.run_id, run.info.status) == (killed.info.run_id, "FINISHED")
    assert Swept.model_validate_json(read(client, found.run_id, "sweep.json", tmp_path)) == found
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{found.run_id}'")
    of_run = {one.data.tags["slmops.variant"]: one for one in trials}
    assert of_run.keys() == {one.variant for one in found.trials}
    best = of_run[kept.variant]
    assert (best.data.metrics, best.data.tags["slmops.front"]) == (kept.metrics, "knee")
    assert best.data.params == {"recipe": "mine", "quantize.group_size": "32", "quantize.bits": "8"}
    assert 0 < kept.metrics["kl_mean"] < 0.01
    assert kept.metrics["size_ratio"] < 0.6
    assert artifacts(flow_runs("sweep")[-1])["sweep-tiny-s"].startswith(f"```\n{found.text}")
    # The recipe makes the same, with its settings of the runtime.
    assert json.loads(found.saved.read_text())["passes"]["quantize"]["group_size"] == 32
    job = Job(model=str(talkative), precision=["found"], quick=True)
    checkpoint = making.resolve(job, settings)
    again = convert(recipes.for_job(job, checkpoint, settings)[-1], JobContext(job, "tiny", checkpoint, settings))
    assert again.model_mb == kept.metrics["size_mb"]
    assert json.loads((again.path / "genai_config.json").read_text())["search"]["top_k"] == 7
    with pytest.raises(UsageError, match="There is a recipe 'found' already"):
        sweep(asked)
    # All of it was tried: nothing is left to do.
    assert sweep(asked.model_copy(update={"save": None})).trials == found.trials
    assert len(attempts) == 5
