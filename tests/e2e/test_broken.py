"""Variants that are broken on purpose, in ways that load and answer: the gates must find them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.conversion import store
from slmops.core.files import write_atomic
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Recipe, Variant, VariantResult
from slmops.evaluation import quality, speed, summary
from slmops.foundry.register import register
from slmops.selection import choice as selection
from slmops.selection import policy

pytestmark = pytest.mark.e2e

NAME = "broken"
JOB = Job(model="demo", quick=True)


@pytest.fixture(scope="module")
def settings(slmops: Any) -> Settings:
    """The home in which the demo model has been converted."""
    return Settings(home=slmops.home)


@pytest.fixture(scope="module")
def good(comparison: dict[str, Any]) -> dict[str, Variant]:
    loaded = [store.load(Path(variant["path"])) for variant in comparison["variants"]]
    return {variant.name: variant for variant in loaded if variant is not None}


def _altered(variant: Variant, name: str, settings: Settings) -> Variant:
    """A copy of a variant to be spoilt, with files of its own."""
    folder = settings.variants / f"{name}-spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(variant.path, folder)
    recipe = Recipe(name=name, config=variant.recipe.config, bits=variant.recipe.bits)
    return variant.model_copy(update={"path": folder, "key": folder.name, "recipe": recipe})


def _sealed(variant: Variant) -> Variant:
    """Its manifest made to fit the spoilt files, so that nothing but the measurements can tell."""
    sealed = variant.model_copy(update={"files": store.files_of(variant.path)})
    write_atomic(variant.path / MANIFEST, sealed.model_dump_json(indent=2))
    return sealed


def _zeroed(variant: Variant, settings: Settings) -> Variant:
    spoilt = _altered(variant, "zeroed", settings)
    data = spoilt.path / "model.onnx.data"
    size = data.stat().st_size
    with data.open("r+b") as file:  # some layers in the middle: with all of them the model says nothing
        file.seek(size // 2)
        file.write(bytes(size // 20))
    return _sealed(spoilt)


def _wrong_template(variant: Variant, settings: Settings) -> Variant:
    spoilt = _altered(variant, "mistaken", settings)
    (spoilt.path / "chat_template.jinja").write_text(
        # The roles are mixed up: the model goes on with a question of the user's.
        "{% for message in messages %}<|im_start|>assistant\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>user\n"
    )
    return _sealed(spoilt)


def _judged(variants: list[Variant], settings: Settings) -> dict[str, VariantResult]:
    made = [(variant, register(variant, NAME, JOB, settings)) for variant in variants]
    speeds = speed.measure(made, NAME, JOB, settings)
    results = []
    baseline = None
    for variant, registration in made:
        measured = quality.measure(variant, registration, NAME, JOB, settings)
        if variant.recipe.baseline:
            baseline = (variant.model_mb, measured)
        timed = speeds[variant.name]
        assert isinstance(timed, speed.Speed), timed
        found = summary.evaluation(variant, timed, measured, baseline, None)
        results.append(
            VariantResult(name=variant.name, status="ok", metrics=found.metrics, measurements=found.measurements)
        )
    # The spoilt ones are the first choice, if nothing refuses them.
    spoilt = tuple(variant.name for variant in variants if not variant.recipe.baseline)
    choice, judged = selection.choose(results, policy.load().model_copy(update={"preference": spoilt}))
    assert choice.variant not in spoilt, choice.reason
    return {result.name: result for result in judged}


def test_the_gates_refuse_them(good: dict[str, Variant], settings: Settings) -> None:
    variants = [good["fp32"], _wrong_template(good["int8"], settings), _zeroed(good["int8"], settings)]
    found = {
        name: {gate.metric: gate for gate in result.gates if gate.outcome != "skipped"}
        for name, result in _judged(variants, settings).items()
    }
    assert found["mistaken"]["perplexity"].outcome == "pass"  # the weights are right
    assert found["mistaken"]["accuracy"].refuses, found["mistaken"]["accuracy"].detail
    assert found["zeroed"]["perplexity"].outcome == "fail", found["zeroed"]["perplexity"].detail
