"""The jobs of one MLflow server: one experiment a model, one parent run a job, one child run a variant.

What the evaluation of a variant leaves there is in :mod:`slmops.tracking.evaluation`.
"""

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slmops.tracking.client import FLOW_RUN, KIND, NOTE, PARENT, REASON, TEXT_LIMIT, Connection, now_ms, or_none, stamp

from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModelInput, Metric

from slmops.core.errors import UsageError
from slmops.core.job import BASELINE, Job
from slmops.core.targets import target_of
from slmops.core.values import (
    Checkpoint,
    Comparison,
    Evaluation,
    Frozen,
    Hardware,
    Measurement,
    Registration,
    Variant,
    VariantResult,
)
from slmops.evaluation import drift
from slmops.evaluation.drift import Recorded, Remeasure, Remeasured
from slmops.evaluation.summary import OF_MACHINE
from slmops.foundry.versions import CHAMPION, RELEASE, ModelVersion
from slmops.selection.policy import Policy
from slmops.tracking import evaluation as tracking_evaluation
from slmops.tracking.evaluation import EVALUATION_SET, MEASUREMENTS_FILE, QUICK, TEXT

COMPARISON_FILE, POLICY_FILE = "comparison.json", "policy.json"
CHOICE = "slmops.choice"
EARLIER = "slmops.measured_earlier."
"""Tag of what was taken over from an earlier job, speed or quality, with the time at which that was measured."""
MEASURED_ON = "slmops.measured_on"  # tag of a variant's run: the kind of machine, if it is not that of the job
SOAK_MEMORY = "soak_memory_mb"
SOAK_POINTS = 300  # of the memory, at most: pages draw no more; the artifact has them all


class Tracker(Connection):
    def start_job(self, name: str, job: Job, checkpoint: Checkpoint, hardware: Hardware, flow_run: str) -> str:
        """Open the parent run and close those that killed jobs of this model left open.

        The caller holds the model's job lock, so a run that is still open has no job any more.
        """
        experiment = self._experiment(name)
        for stale in self._client.runs_of(experiment, "job", "attributes.status = 'RUNNING'"):
            self._client.set_terminated(stale.info.run_id, "KILLED")
        tags = {
            KIND: "job",
            "slmops.model": name,
            "slmops.source": checkpoint.source,
            "slmops.checkpoint_digest": checkpoint.digest,
            FLOW_RUN: flow_run,
        }
        if checkpoint.base is not None:
            tags["slmops.base"] = checkpoint.base
        run_id = self._client.open_run(experiment, f"{name} {stamp()}", tags)
        params = {**_fields("job", job, exclude_none=True), **_fields("checkpoint", checkpoint, exclude_none=True)}
        self._client.log_params(run_id, {**params, **_of_hardware(hardware)})
        tracking_evaluation.log_inputs(self._client, run_id, job)
        return run_id

    def log_variant(
        self, parent: str, name: str, variant: Variant, registration: Registration, evaluation: Evaluation, logs: Path
    ) -> VariantResult:
        """Log a measured variant as a child run with a logged model; returns it as the comparison shows it."""
        with tempfile.TemporaryDirectory() as scratch:
            run_id = self._child(parent, variant.name)
            digests = {"evaluation_set_digest": evaluation.evaluation_set_digest, "text_digest": evaluation.text_digest}
            deployed = {"foundry_id": registration.foundry_id, "threads": _threads(registration)}
            used = _fields("measured", evaluation.extent)
            self._client.log_params(run_id, {**_of_variant(variant), **digests, **used, **deployed})
            logged = self._client.create_logged_model(
                experiment_id=self._client.get_run(run_id).info.experiment_id,
                name=f"{name}-{variant.name}",
                source_run_id=run_id,
                model_type="onnx-genai",
                params={"recipe": variant.name, "key": variant.key, "foundry_id": registration.foundry_id},
                tags={"slmops.path": str(registration.path), "slmops.checkpoint_digest": variant.checkpoint.digest},
            )
            # As an input: runs that have models as outputs are not on MLflow's page "Evaluation runs".
            self._client.log_inputs(run_id, models=[LoggedModelInput(logged.model_id)])
            tracking_evaluation.collect(Path(scratch), variant, registration, evaluation, logs)
            self._client.log_artifacts(run_id, scratch)
            asked = self._client.get_run(parent).data.params
            sources = {
                EVALUATION_SET: asked.get("job.evaluation_set", "general"),
                TEXT: asked.get("job.perplexity_text", "Python language reference"),
            }
            tracking_evaluation.log_evaluation(self._client, run_id, logged.model_id, evaluation, sources)
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.set_terminated(run_id, "FINISHED")
        return VariantResult(
            name=variant.name,
            status="ok",
            path=variant.path,
            foundry_id=registration.foundry_id,
            run_id=run_id,
            metrics=evaluation.metrics,
            measurements=evaluation.measurements,
            extent=evaluation.extent,
            not_run=registration.not_run,
        )

    def log_failure(self, parent: str, recipe: str, reason: str, logs: Path, kind: str = "variant") -> VariantResult:
        """Log a variant or a peer that failed, with the reason and what logs there are."""
        run_id = self._child(parent, recipe, kind)
        self._client.set_tags(run_id, {REASON: reason[:TEXT_LIMIT], NOTE: f"Failed: {reason}"[:TEXT_LIMIT]})
        self._fail(run_id, recipe, logs)
        return VariantResult(name=recipe, status="failed", reason=reason, run_id=run_id)

    def log_peer(self, parent: str, name: str, measured: dict[str, Measurement]) -> VariantResult:
        """Log a peer of the variants as a child run; returns it as the comparison shows it."""
        run_id = self._child(parent, name, "peer")
        figures = {metric: one.value for metric, one in measured.items()}
        self._client.log_figures(run_id, figures)
        self._client.log_text(run_id, json.dumps({k: v.model_dump() for k, v in measured.items()}), MEASUREMENTS_FILE)
        self._client.set_terminated(run_id, "FINISHED")
        return VariantResult(name=name, status="ok", run_id=run_id, metrics=figures, measurements=measured)

    def finish_job(self, comparison: Comparison, policy: Policy, report: str, note: str, *, failed: bool) -> None:
        """Put the comparison, the gates, the policy and the choice into the parent run and close it."""
        run_id = comparison.run_id
        tracking_evaluation.log_gates(self._client, comparison)
        if comparison.room:
            self._client.log_figures(run_id, {f"job_{name}": value for name, value in comparison.room})
        self._client.log_text(run_id, policy.model_dump_json(indent=2), POLICY_FILE)
        self.log_comparison(comparison, report, note)
        tags = {CHOICE: comparison.choice.variant or "none", REASON: comparison.choice.reason}
        dated = {f"{EARLIER}{what}": when.isoformat() for what, when in comparison.measured_earlier.items()}
        for measured in comparison.variants if dated else ():
            if measured.run_id and measured.status == "ok":
                self._client.set_tags(measured.run_id, dated)
        self._client.set_tags(run_id, tags | dated)
        self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    def log_comparison(self, comparison: Comparison, report: str, note: str) -> None:
        """Put the comparison into its job's run, as data, as a page, and as the run's description."""
        self._client.log_text(comparison.run_id, comparison.model_dump_json(indent=2), COMPARISON_FILE)
        self._client.log_text(comparison.run_id, report, "report.html")
        self._client.set_tags(comparison.run_id, {NOTE: self._with_links(note, comparison)})

    def log_figures(self, run_id: str, figures: dict[str, float]) -> None:
        self._client.log_figures(run_id, figures)

    def abort_job(self, run_id: str) -> None:
        """Close the parent run, and the child runs that are still open, as killed."""
        experiment = self._client.get_run(run_id).info.experiment_id
        for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            if run.info.run_id == run_id or run.data.tags.get(PARENT) == run_id:
                self._client.set_terminated(run.info.run_id, "KILLED")

    def log_soak(self, name: str, tags: dict[str, str], metrics: dict[str, float], memory_mb: Sequence[float]) -> str:
        """Log a soak as a run of the model's experiment; an earlier attempt of the same flow run is replaced.

        The memory after each request is a metric too, with the number of the request as its step.
        """
        tags = {KIND: "soak", "slmops.model": name, **tags}
        title = f"soak {tags.get('slmops.variant', '')}".rstrip()
        with self._client.only_run(self._experiment(name), title, tags) as run_id:
            self._client.log_figures(run_id, metrics)
            every, now = -(-len(memory_mb) // SOAK_POINTS), now_ms()
            drawn = [(step, mb) for step, mb in enumerate(memory_mb, 1) if step % every == 0]
            self._client.log_batch(run_id, metrics=[Metric(SOAK_MEMORY, mb, now, step) for step, mb in drawn])
            said = {"metrics": metrics, "memory_mb": list(memory_mb)}
            self._client.log_text(run_id, json.dumps(said), "soak.json")
        return run_id

    def recorded(self, run_id: str, folder: Path) -> Recorded:
        """What was recorded of a variant, with copies in ``folder`` of what it was measured with."""
        return tracking_evaluation.recorded(self._client, run_id, self.hardware_kind(run_id), folder)

    def log_remeasurement(self, result: Remeasured, request: Remeasure, hardware: Hardware, flow_run: str) -> str:
        """Log a remeasurement as a run of the model's experiment; an earlier attempt of the flow run is replaced."""
        tags = {
            KIND: "remeasurement",
            "slmops.model": result.model,
            "slmops.version": str(result.version),
            "slmops.variant": result.variant,
            "slmops.recorded_run": result.recorded_run,
            "slmops.outcome": result.outcome,
            REASON: result.detail[:4000],
            NOTE: drift.text(result, markdown=True),
            FLOW_RUN: flow_run,
        }
        title = f"remeasurement of version {result.version}"
        asked = _fields("remeasure", request, exclude={"name", "version"})
        with self._client.only_run(self._experiment(result.model), title, tags) as run_id:
            self._client.log_figures(run_id, result.metrics)
            self._client.log_params(run_id, {**asked, **_of_hardware(hardware)})
            self._client.log_text(run_id, result.model_dump_json(indent=2), "remeasurement.json")
            outcome = {"slmops.remeasurement": result.outcome, "slmops.remeasurement_run": run_id}
            self._client.set_version_tags(result.model, str(result.version), outcome)
        return run_id

    def log_measured(self, version: ModelVersion, figures: dict[str, Measurement], hardware: Hardware) -> Comparison:
        """Add what its own device measured of a version to its run; returns the comparison of its job with it."""
        comparison, _ = self.judged(version.job_id)
        values, client = {metric: one.value for metric, one in figures.items()}, self._client
        measured = {
            one.name: one.model_copy(
                update={
                    "not_run": None,
                    "metrics": {**one.metrics, **values},
                    "measurements": {**one.measurements, **figures},
                }
            )
            for one in comparison.variants
            if one.run_id == version.run_id
        }
        variants = tuple(measured.get(one.name, one) for one in comparison.variants)
        comparison = comparison.model_copy(update={"variants": variants})
        client.log_figures(version.run_id, values)
        for one in measured.values():
            kept = {metric: figure.model_dump() for metric, figure in one.measurements.items()}
            client.log_text(version.run_id, json.dumps(kept, indent=2), MEASUREMENTS_FILE)
        client.set_tags(version.run_id, {MEASURED_ON: hardware.kind})
        memory = {"slmops.memory_mb": f"{values.get('memory_peak_mb', 0.0):.0f}"}
        client.set_version_tags(version.name, str(version.version), memory)
        return comparison

    def latest(self, name: str | None) -> Comparison:
        """The newest finished comparison, of the model ``name`` or of all; UsageError if there is none."""
        everything = list(self._client.search_experiments())
        asked = everything if name is None else filter(None, [self._client.get_experiment_by_name(name)])
        numbers = [one.experiment_id for one in asked]
        finished = f"tags.`{KIND}` = 'job' and tags.`{CHOICE}` != ''"
        runs = self._client.search_runs(numbers, finished, max_results=1) if numbers else ()
        if not runs:
            of = f" of {name!r}" if name else ""
            known = ", ".join(sorted(one.name for one in everything if one.tags.get(KIND) == "model"))
            fix = f"Known models: {known}." if known else "Run `slmops run --model SOURCE` first."
            raise UsageError(f"There is no finished comparison{of}.", fix)
        return Comparison.model_validate_json(self._client.text_of(runs[0].info.run_id, COMPARISON_FILE))

    def models(self) -> list[str]:
        return [one.name for one in self._client.search_experiments() if one.tags.get(KIND) == "model"]

    def judged(self, job_id: str) -> tuple[Comparison, Policy]:
        comparison = Comparison.model_validate_json(self._client.text_of(job_id, COMPARISON_FILE))
        return comparison, Policy.model_validate_json(self._client.text_of(job_id, POLICY_FILE))

    def conditions(self, run_id: str) -> dict[str, str]:
        """What the quality of a variant was measured with; figures of it compare only if that is the same."""
        run = self._client.get_run(run_id)
        job = self._client.get_run(run.data.tags[PARENT]).data.params
        used = [run.data.params.get(f"measured.{what}") for what in ("tokens", "questions")]
        return {
            EVALUATION_SET: run.data.params.get("evaluation_set_digest", ""),
            TEXT: run.data.params.get("text_digest", ""),
            # With a time limit, how many there were time for.
            QUICK: f"{used}" if "job.minutes" in job else job.get("job.quick", "false"),
        }

    def differences(self, run_id: str, other: str) -> tuple[str, ...]:
        """The conditions in which two variants' runs differ."""
        theirs = self.conditions(other)
        return tuple(name for name, value in self.conditions(run_id).items() if value != theirs[name])

    def hardware_kind(self, run_id: str) -> str:
        """The kind of machine that a variant was measured on; figures of speed compare only if it is the same."""
        return self.device(run_id)[0]

    def device(self, run_id: str) -> tuple[str, str]:
        """What a variant was measured on: the kind of machine, and the target."""
        run = self._client.get_run(run_id).data
        kind = run.tags.get(MEASURED_ON) or run.params.get("hardware.kind", "an unknown machine")
        return kind, target_of(run.tags.get("slmops.variant", ""))

    def champion(self, name: str, like: str | None = None) -> dict[str, Measurement] | None:
        """What was measured of the deployed version of the registered model ``name``; None: nothing is deployed.

        With the variant's run ``like`` it is that of its release for the same target, if there is one. Left out are
        figures that do not compare with those of ``like``, since they were measured on something else or on another
        kind of machine. Of a version that slmops did not measure the result is empty, so gates that compare with it
        find no figure rather than being skipped.
        """
        version = or_none(lambda: self._client.get_model_version_by_alias(name, CHAMPION))
        if version is None:
            return None
        device = self.device(like) if like else None
        for number in version.tags.get(RELEASE, "").split():
            other = or_none(partial(self._client.get_model_version, name, number))
            if other is not None and device and target_of(other.tags.get("slmops.variant", "")) == device[1]:
                version = other
        # Its latest evaluation; the run that MLflow names is that in which it was made.
        run_id = version.tags.get("slmops.evaluation_run", version.run_id)
        if not run_id or MEASUREMENTS_FILE not in self._client.files_in(run_id):
            return {}
        measured = json.loads(self._client.text_of(run_id, MEASUREMENTS_FILE))
        left_out: tuple[str, ...] = ()
        if like:
            differs = set(self.differences(run_id, like))
            left_out += tracking_evaluation.OF_ANSWERS if differs - {TEXT} else ()
            left_out += tracking_evaluation.OF_TEXT if differs - {EVALUATION_SET} else ()
            left_out += OF_MACHINE if self.device(run_id) != device else ()
        figures = {metric: figure for metric, figure in measured.items() if not metric.startswith(left_out)}
        return {metric: Measurement.model_validate(figure) for metric, figure in figures.items()}

    def answers_url(self, run_id: str, other: str) -> str:
        """The page with the answers of two variants' runs side by side."""
        return self._page(run_id, f"evaluation-runs?selectedRunUuid={run_id}&compareToRunUuid={other}&")

    def download(self, uri: str, target: Path) -> Path:
        """Fetch an MLflow model or artifact URI into ``target``."""
        source = self._client.artifacts_of(uri) if uri.startswith("models:/") else uri
        return Path(download_artifacts(artifact_uri=source, dst_path=str(target), tracking_uri=self.uri))

    def _with_links(self, note: str, comparison: Comparison) -> str:
        runs = {result.name: result.run_id for result in comparison.variants if result.status == "ok"}
        baseline = runs.pop(BASELINE, None)
        links = [f"[{name}]({self.answers_url(run, baseline)})" for name, run in runs.items() if run and baseline]
        return f"{note}\n\nAnswers beside those of {BASELINE}: {', '.join(links)}" if links else note

    def _fail(self, run_id: str, recipe: str, logs: Path) -> None:
        for log in sorted(logs.glob(f"{recipe}.*.log")):
            self._client.log_artifact(run_id, str(log), "logs")
        self._client.set_terminated(run_id, "FAILED")

    def _child(self, parent: str, recipe: str, kind: str = "variant", title: str | None = None) -> str:
        """A new child run; one that a failed attempt to log left behind goes, with its logged model and answers."""
        experiment = self._client.get_run(parent).info.experiment_id
        of_parent = (f"tags.`{PARENT}` = '{parent}'", f"tags.`slmops.variant` = '{recipe}'")
        for run in self._client.runs_of(experiment, kind, *of_parent):
            of_run = f"source_run_id = '{run.info.run_id}'"
            for model in self._client.search_logged_models([experiment], of_run):
                self._client.delete_logged_model(model.model_id)
            tracking_evaluation.delete_answers(self._client, experiment, run.info.run_id)
            self._client.delete_run(run.info.run_id)
        tags = {PARENT: parent, KIND: kind, "slmops.variant": recipe}
        return self._client.open_run(experiment, title or recipe, tags)


def _threads(registration: Registration) -> str:
    """Threads that the runtime is told to use for one operator."""
    config = json.loads((registration.path / "genai_config.json").read_text(encoding="utf-8"))
    options = config.get("model", {}).get("decoder", {}).get("session_options", {})
    return str(options.get("intra_op_num_threads", "the runtime's default: one a physical core"))


def _of_variant(variant: Variant) -> dict[str, Any]:
    return {
        "recipe": variant.name,
        "variant_key": variant.key,
        "export_error": variant.export_error,
        "weights.by_bits": variant.weights.by_bits,
        "weights.quantized_ops": variant.weights.quantized_ops,
        **{f"version.{name}": version for name, version in variant.versions.items()},
        **_fields("checkpoint", variant.checkpoint),
        **_of_hardware(variant.hardware),
    }


def _of_hardware(hardware: Hardware) -> dict[str, Any]:
    return {**_fields("hardware", hardware), "hardware.kind": hardware.kind}


def _fields(prefix: str, of: Frozen, **options: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for key, value in of.model_dump(mode="json", **options).items()}
