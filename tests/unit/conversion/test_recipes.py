"""Precision names to Olive passes, and what is refused before any work."""

from typing import Any

import pytest

from slmops.conversion import recipes
from slmops.core.errors import RecipeError
from slmops.core.job import Job
from slmops.core.values import Recipe
from tests.values import checkpoint


def made(*precision: str, tied: bool = True, sizes: tuple[int, ...] = (576, 1536), **asked: Any) -> list[Recipe]:
    job = Job(model="m", precision=list(precision), **asked)
    return recipes.for_job(job, checkpoint(tied_embeddings=tied, linear_sizes=sizes))


def passes(recipe: Recipe) -> list[dict[str, Any]]:
    return list(recipe.config["passes"].values())


def test_nothing_is_exported_in_fp32_if_the_checkpoint_is_the_baseline() -> None:
    found = made("fp32", "fp16", "int8", "int4", baseline="checkpoint")
    assert [(recipe.name, recipe.baseline) for recipe in found] == [("int8", False), ("int4", False)]
    assert made("fp16", baseline="checkpoint", olive_config="own.json") == []
    with pytest.raises(RecipeError, match="fp16 is made through an fp32 export") as caught:
        made("fp16", baseline="checkpoint")
    assert "--baseline fp32" in (caught.value.fix or "")


TIE = {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}], "save_as_external_data": True}
RTN = {"type": "Rtn", "lm_head": True, "embeds": True}
EIGHT = {"bits": 8}
INT4 = {**RTN, "bits": 4, "sym": False, "overrides": {"lm_head": EIGHT, "model.embed_tokens": EIGHT}}
PASSES: dict[str, list[dict[str, Any]]] = {
    "fp32": [{"type": "ModelBuilder", "precision": "fp32"}, TIE],
    "fp16": [
        {"type": "ModelBuilder", "precision": "fp32"},
        TIE,
        {"type": "OnnxFloatToFloat16", "keep_io_types": True, "save_as_external_data": True},
    ],
    # ModelBuilder's "int4" exports what the quantized checkpoint says, 8 bits included.
    "int8": [{**RTN, "bits": 8, "group_size": 32}, {"type": "ModelBuilder", "precision": "int4"}, TIE],
    "int4": [
        {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"},
        {**INT4, "group_size": 32},
        {"type": "ModelBuilder", "precision": "int4"},
        TIE,
    ],
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", PASSES)
def test_passes_of_each_precision(name: str, tied: bool) -> None:
    recipe = made(name, tied=tied)[-1]
    assert recipe.name == name
    assert passes(recipe) == [step for step in PASSES[name] if tied or step is not TIE]


def test_each_workflow_is_for_the_cpu_and_whole() -> None:
    promised = {"fp32": (32, True), "fp16": (16, False), "int8": (8, False), "int4": (4, False)}
    for recipe in made(*promised):
        assert (recipe.bits, recipe.baseline) == promised[recipe.name]
        assert recipe.config["systems"]["local"] == {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
        assert (recipe.config["host"], recipe.config["target"]) == ("local", "local")
        assert set(recipe.config) == {"systems", "host", "target", "passes"}


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["int4"], ["fp32", "int4"]),
        ([], ["fp32", "fp16", "int8", "int4"]),  # what a form sends for the default
        (["fp32"], ["fp32"]),
        (["int8", "fp32", "int4"], ["fp32", "int8", "int4"]),
        (["int4", "int4", "fp32", "int8", "int4", "fp32"], ["fp32", "int4", "int8"]),
    ],
)
def test_baseline_is_first_and_nothing_twice(asked: list[str], names: list[str]) -> None:
    assert [recipe.name for recipe in made(*asked)] == names


@pytest.mark.parametrize(
    ("precision", "asked", "named", "fix"),
    [
        ("bf16", {}, "bf16", "Use fp16"),
        ("int4", {"device": "gpu"}, "gpu", "--device cpu"),
        ("int4", {"provider": "CUDAExecutionProvider"}, "CUDAExecutionProvider", "--device cpu"),
        ("int4", {"int4_block_size": 100}, "100", "Use --int4-block-size 16 or 32 or 64."),
        ("int4", {"int4_block_size": 128}, "(576)", "Use --int4-block-size 16 or 32 or 64."),
        ("int4", {"int4_block_size": 256, "sizes": (896, 128)}, "(896, 128)", "16 or 32 or 64 or 128."),
        ("int4", {"int4_block_size": 32, "sizes": (72, 96)}, "(72)", "--olive-config"),
        ("int8", {"sizes": (48, 96)}, "(48)", "--olive-config"),  # --int4-block-size would change nothing
    ],
)
def test_what_cannot_work_is_refused_with_a_fix(precision: str, asked: dict[str, Any], named: str, fix: str) -> None:
    with pytest.raises(RecipeError) as raised:
        made(precision, **asked)
    assert named in raised.value.message
    assert fix in (raised.value.fix or "")


def test_block_size_and_symmetry_are_of_int4_and_sizes_matter_to_quantization_only() -> None:
    for block in (16, 32, 64):
        quantize = passes(made("int4", int4_block_size=block, int4_symmetric=True)[-1])[1]
        assert quantize == {**INT4, "group_size": block, "sym": True}
    assert passes(made("int8", int4_block_size=100)[-1])[0]["group_size"] == 32
    assert [recipe.name for recipe in made("fp16", sizes=(7,), int4_block_size=100)] == ["fp32", "fp16"]
