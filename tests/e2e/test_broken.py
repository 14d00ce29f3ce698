"""Variants that are broken on purpose, in ways that load and answer: the gates must find them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import store
from slmops.core.files import write_atomic
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Recipe, Variant, VariantResult
from slmops.evaluation import quality, summary
from slmops.foundry.register import register
from slmops.selection import choice as selection
from slmops.selection import policy
from tests import measured

pytestmark = pytest.mark.e2e

NAME = "broken"
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
        found = quality.measure(variant, register(variant, NAME, JOB, settings), NAME, JOB, settings)
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
