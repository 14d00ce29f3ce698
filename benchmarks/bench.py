"""Print the figures that the README quotes: the demo's comparison, agreement, repeatability, serving, pulling.

    python benchmarks/bench.py

Runs the demo job in a home of its own: from nothing, unchanged, measured anew. Then times one variant in turns by
slmops and by ``direct.py``, which calls the runtime with nothing of slmops in between; then ``conversion.py``,
``serving.py`` and ``cut.py``. At last the frontier: ``peers.py`` with all shipped recipes on the demo, and on a
checkpoint that ``off_grid.py`` makes of it, where only quality differs; and ``calibrated.py`` on the checkpoint of the
retraining demo.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from mlflow import MlflowClient

from slmops import report
from slmops.core import machine
from slmops.core.errors import EvaluationError
from slmops.core.job import Job
from slmops.core.values import Comparison, Registration, VariantResult
from slmops.evaluation import prompts, speed
from slmops.foundry.layout import Staged, stage
from slmops.processes import children

SLMOPS = str(Path(sys.executable).with_name("slmops"))
HERE = Path(__file__).parent
DIRECT = str(HERE / "direct.py")
AGREEMENT_VARIANT = "int8"
AGREEMENT_ROUNDS = 8
REPETITIONS = 5
SPEED = ("ttft_ms_p50", "itl_ms_p50", "decode_tok_s", "prefill_tok_s", "response_s_p50", "memory_peak_mb")
QUALITY = ("perplexity", "perplexity_ratio", "kl_mean", "top1_agreement", "accuracy", "flips", "edge_cases_passed")


def main() -> None:
    """Run, print, clean up."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "SLMOPS_HOME": home}
        try:
            first, first_s = _timed(env)
            _, unchanged_s = _timed(env)
            second, second_s = _timed(env, "--remeasure")
            here = machine.hardware()
            print(f"\n{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}\n")
            print(report.text(first))
            print(f"\nfrom nothing: {first_s:.0f} s; unchanged: {unchanged_s:.0f} s; measured anew: {second_s:.0f} s")
            status = subprocess.run([SLMOPS, "status", "--json"], env=env, stdout=subprocess.PIPE, check=True).stdout
            uri = json.loads(status)["mlflow"]["url"]
            _stages(first, uri)
            _repeatability(first, second)
            _agreement(next(result for result in first.variants if result.name == AGREEMENT_VARIANT), Path(home))
            sys.stdout.flush()  # the others print by themselves
            tuned = str(Path(home) / "tuned")
            programs = [
                ["conversion.py", "demo"],
                ["serving.py", first.model, "int8", "fp16"],
                ["cut.py", first.model, uri],
                ["peers.py", "demo"],
                ["off_grid.py", "demo", tuned],
                ["peers.py", tuned, "--part", "quality"],
                ["calibrated.py"],
            ]
            for program in programs:
                subprocess.run([sys.executable, str(HERE / program[0]), *program[1:]], env=env, check=True)
        finally:
            subprocess.run([SLMOPS, "down"], env=env, check=False)


def _timed(env: dict[str, str], *options: str) -> tuple[Comparison, float]:
    started = time.monotonic()
    command = [SLMOPS, "run", "--model", "demo", "--json", *options]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    return Comparison.model_validate(json.loads(done.stdout)), time.monotonic() - started


def _stages(job: Comparison, uri: str) -> None:
    metrics = MlflowClient(uri).get_run(job.run_id).data.metrics
    print("\nseconds of the first job's stages")
    for name in ("job_s", "job_orchestration_s", *sorted(name for name in metrics if name.startswith("stage_"))):
        print(f"  {name:30} {metrics[name]:7.1f}")


def _repeatability(first: Comparison, second: Comparison) -> None:
    print("\nrepeatability: the second evaluation's medians over the first's")
    for one, other in zip(first.variants, second.variants, strict=True):
        ratios = "  ".join(f"{name} {other.metrics[name] / one.metrics[name]:.3f}" for name in SPEED)
        changed = [name for name in QUALITY if one.metrics[name] != other.metrics[name]]
        print(f"  {one.name:5} {ratios}  quality {'identical' if not changed else f'CHANGED: {changed}'}")


def _agreement(variant: VariantResult, home: Path) -> None:
    foundry_id = str(variant.foundry_id)
    placed = home / "foundry" / "models" / "slmops" / foundry_id.replace(":", "-")
    registration = Registration(foundry_id=foundry_id, path=placed, answer="")
    staged = stage(registration, home / "agreement", fixed_length=True)
    tokens = Job(model="demo").output_lengths[0]
    [text] = prompts.of_lengths([speed.HEADLINE_TOKENS], staged.context_length, staged.folder).values()
    ours: dict[str, list[float]] = {"ttft_ms": [], "decode_tok_s": []}
    theirs: dict[str, list[float]] = {"ttft_ms": [], "decode_tok_s": []}
    for number in range(AGREEMENT_ROUNDS):
        for mine in (True, False) if number % 2 else (False, True):
            measured = _ours(staged, text, tokens, home) if mine else _direct(staged, text, tokens)
            for name, samples in measured.items():
                (ours if mine else theirs)[name] += samples
    print(
        f"\nagreement on {variant.name}, {speed.HEADLINE_TOKENS} prompt and {tokens} output tokens, medians of "
        f"{AGREEMENT_ROUNDS} interleaved rounds of {REPETITIONS}"
    )
    for name in ours:
        own, direct = median(ours[name]), median(theirs[name])
        print(f"  {name:13} slmops {own:7.2f}  direct {direct:7.2f}  difference {100 * (own / direct - 1):+.1f} %")


def _ours(staged: Staged, text: str, tokens: int, home: Path) -> dict[str, list[float]]:
    cell = speed.Cell(prompt_tokens=speed.HEADLINE_TOKENS, output_tokens=tokens, text=text, repetitions=REPETITIONS)
    result, _ = children.call(
        speed.handle,
        speed.SpeedRequest(**staged.model_dump(), cells=(cell,)),
        log=home / "bench.log",
        timeout_s=600,
        error=EvaluationError,
        env=children.STEADY_MALLOC,
    )
    return {
        "ttft_ms": [one.first_s * 1e3 for one in result.timed],
        "decode_tok_s": [(one.completion_tokens - 1) / (one.last_s - one.first_s) for one in result.timed],
    }


def _direct(staged: Staged, text: str, tokens: int) -> dict[str, list[float]]:
    arguments = [str(staged.home), str(staged.folder), staged.foundry_id, text, str(tokens), str(REPETITIONS)]
    env = {**os.environ, **children.STEADY_MALLOC}  # what differs is to be the measuring, not the allocator
    done = subprocess.run([sys.executable, DIRECT, *arguments], stdout=subprocess.PIPE, check=True, text=True, env=env)
    measured = json.loads(done.stdout.splitlines()[-1])
    return {name: measured[name] for name in ("ttft_ms", "decode_tok_s")}


if __name__ == "__main__":
    main()
