"""Print how long a job's conversions take, beside Olive's own with the same configs, each in a process of its own.

    python benchmarks/conversion.py CHECKPOINT [PRECISION ...]

Both do the same passes, by default for fp32, fp16, int8 and int4: Olive is told of our pass and surgeries, and gets
none of our fixes. A config of which it makes nothing is left out of both sums. Then what checking and registering the
variants takes on top.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from slmops.checkpoints import source
from slmops.conversion import convert as conversion
from slmops.conversion import recipes
from slmops.core import machine
from slmops.core.job import BASELINE, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Recipe, Variant
from slmops.foundry.register import register
from slmops.processes import children

OLIVE = """import json, olive
from slmops.conversion import fixes, surgeries
olive.run(json.load(open("config.json")), package_config=fixes.package())"""


def main(model: str, *precisions: str) -> None:
    """Convert both ways, and print."""
    job = Job(model=model, precision=list(precisions), baseline=BASELINE)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(home=Path(folder))
        checkpoint = source.resolve(job, Settings(), download=not_at_all)
        context = JobContext(job, "bench", checkpoint, settings)
        planned = conversion.in_order(recipes.for_job(job, checkpoint, settings))
        plain = {recipe.name: _olive_run(recipe, context) for recipe in planned}

        started = time.monotonic()
        with conversion.together(context.name, settings) as child:
            made = [conversion.convert(recipe, context, child) for recipe in planned]
        converted = time.monotonic()
        with children.Child() as child:
            for variant in made:
                register(variant, context.name, job, settings, child)
        _print(plain, made, converted - started, time.monotonic() - converted)


def _olive_run(recipe: Recipe, context: JobContext) -> children.Finished | None:
    """What plain Olive takes for a recipe, if it makes something."""
    work = context.work / "olive" / recipe.name
    work.mkdir(parents=True)
    config = conversion.workflow(recipe, context.checkpoint, context.job, work / "cache", work / "model")
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    env = {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    log = context.logs / f"{recipe.name}.log"
    finished = children.run([sys.executable, "-c", OLIVE], log=log, timeout_s=7200, env=env, cwd=work)
    return finished if any((work / "model").rglob("*.onnx")) else None


def _print(plain: dict[str, children.Finished | None], made: list[Variant], all_s: float, register_s: float) -> None:
    here = machine.hardware()
    print(f"conversion on {here.processor}, {here.cores} cores\n")
    print("              olive run         slmops")
    theirs_s = ours_s = theirs_mb = ours_mb = 0.0
    for variant in made:
        ours = f"{variant.convert_s:6.1f} s {variant.convert_memory_peak_mb:6.0f} MB"
        if (theirs := plain[variant.name]) is None:
            print(f"{variant.name:8}          nothing  {ours}")
            continue
        print(f"{variant.name:8} {theirs.seconds:6.1f} s {theirs.memory_peak_mb:6.0f} MB  {ours}")
        theirs_s, ours_s = theirs_s + theirs.seconds, ours_s + variant.convert_s
        theirs_mb = max(theirs_mb, theirs.memory_peak_mb)
        ours_mb = max(ours_mb, variant.convert_memory_peak_mb)
    print(f"sum, most {theirs_s:5.1f} s {theirs_mb:6.0f} MB  {ours_s:6.1f} s {ours_mb:6.0f} MB")
    print(f"ratio: {ours_s / theirs_s:.2f} of the time, {ours_mb / theirs_mb:.2f} of the memory")
    print(f"converted and checked in {all_s:.1f} s, registered in {register_s:.1f}: {all_s + register_s:.1f} s in all")


def not_at_all(_uri: str, _target: Path) -> Path:
    """For checkpoints that are not in MLflow."""
    raise AssertionError("the checkpoint is here")


if __name__ == "__main__":
    main(*sys.argv[1:])
