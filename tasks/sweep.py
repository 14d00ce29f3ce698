"""Measure the trials of a sweep, and log them."""

from prefect.artifacts import create_markdown_artifact

from slmops.evaluation import trial
from slmops.selection.sweep import Swept
from slmops.tracking.sweeps import SweepTracker
from tasks.stage import artifact_key, stage

open_sweep = stage("open sweep", tracking=True)(SweepTracker.start)
track_trial = stage("track trial {trial.number}", tracking=True)(SweepTracker.log_trial)
close_sweep = stage("close sweep", tracking=True)(SweepTracker.finish)
score_baseline = stage("score baseline")(trial.score_baseline)
score_first = stage("score the first tokens of {variant.recipe.name}")(trial.first_kl)
measure_trial = stage("measure {variant.recipe.name}")(trial.measure)


@stage()
def show_front(result: Swept, url: str) -> None:
    page = f"```\n{result.text}\n```\n\n[MLflow run]({url})"
    create_markdown_artifact(page, artifact_key("sweep", result.model), f"{result.model}: sweep")
