"""Precision names to Olive passes, what is refused before any work, and weights held against what a recipe promises."""

import re
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from slmops.conversion import recipes, verify_worker
from slmops.core.errors import ConversionError, RecipeError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Recipe, Weights
from tests.values import checkpoint


def made(*precision: str, tied: bool = True, sizes: tuple[int, ...] = (576, 1536), **asked: Any) -> list[Recipe]:
    job = Job(model="m", precision=list(precision), **asked)
    return recipes.for_job(job, checkpoint(tied_embeddings=tied, linear_sizes=sizes), Settings())


def passes(recipe: Recipe) -> list[dict[str, Any]]:
    return list(recipe.config["passes"].values())


def test_nothing_is_exported_in_fp32_if_the_checkpoint_is_the_baseline() -> None:
    found = made("fp32", "fp16", "int8", "int4", baseline="checkpoint")
    assert [(recipe.name, recipe.baseline) for recipe in found] == [("int8", False), ("int4", False)]
    assert made("fp16", baseline="checkpoint", olive_config="own.json") == []
    with pytest.raises(RecipeError, match="fp16 is made through an fp32 export") as caught:
        made("fp16", baseline="checkpoint")
    assert "--baseline fp32" in (caught.value.fix or "")


TIE = {"surgeon": "TieWordEmbeddings"}
CHAINS = {
    "fp32": ["ModelBuilder", "GraphSurgeries"],
    "fp16": ["ModelBuilder", "GraphSurgeries", "OnnxFloatToFloat16"],
    **{
        name: ["BlockQuantize", "ModelBuilder", "GraphSurgeries"]
        for name in ("int8", "int4", "int4-small", "int4-calibrated")
    },
}


@pytest.mark.parametrize("name", CHAINS)
def test_embeddings_are_tied_if_the_checkpoint_ties_them(name: str) -> None:
    tied, untied = (passes(made(name, tied=tied, calibration_text=__file__)[-1]) for tied in (True, False))
    assert [step["type"] for step in tied] == CHAINS[name]
    assert TIE in next(step["surgeries"] for step in tied if "surgeries" in step)
    others = [{**step, "surgeries": [one for one in step.get("surgeries", ()) if one != TIE]} for step in tied]
    assert [{"surgeries": [], **step} for step in untied] == [
        step for step in others if step["type"] != "GraphSurgeries" or step["surgeries"]
    ]


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


def test_each_target_takes_the_precisions_that_make_sense_there() -> None:
    names = ["fp32", "fp16", "int8", "int4", "fp16-webgpu", "int8-webgpu", "int4-webgpu", "fp16-trt-rtx"]
    found = {one.name: one for one in made(target=["trt-rtx", "webgpu", "cpu", "cpu"])}
    assert [*found] == names
    assert [one.name for one in made("int4", target=["webgpu"], baseline="checkpoint")] == ["int4-webgpu"]
    [accelerator] = found["int4-webgpu"].config["systems"]["local"]["accelerators"]
    assert accelerator == {"device": "gpu", "execution_providers": ["WebGpuExecutionProvider"]}
    assert found["int4-webgpu"].config["passes"] == found["int4"].config["passes"]
    assert [step.get("precision") for step in passes(found["fp16-webgpu"])] == ["fp16", None]
    assert [recipe.name for recipe in made(target=["trt-rtx"])] == ["fp32", "fp16-trt-rtx"]  # of the usual ones
    with_blocks = made("int4", target=["cuda"], int4_block_size=64)[1]
    assert passes(with_blocks)[0]["group_size"] == 64


@pytest.mark.parametrize(
    ("precision", "asked", "named", "fix"),
    [
        ("bf16", {}, "bf16 makes sense for cuda only", "--target cuda"),
        ("fp32", {"target": ["webgpu"]}, "fp32 makes sense for cpu only", "--target cpu"),
        ("fp32", {"target": ["cpu", "cuda"]}, "None of fp32 makes sense for cuda", "--precision fp16"),
        ("int4-webgpu", {}, "a variant", "--precision int4 --target webgpu"),
        ("int4", {"device": "gpu"}, "gpu", "--target"),
        ("int4", {"provider": "CUDAExecutionProvider"}, "CUDAExecutionProvider", "--target"),
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


def test_another_text_to_calibrate_with_is_another_variant(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(RecipeError, match="int4-calibrated is made for a text of yours") as caught:
        made("int4-calibrated")
    assert "--calibration-text" in (caught.value.fix or "")
    digests = set()
    for content in ("one", "two"):
        text.write_text(content)
        quantize = passes(made("int4-calibrated", calibration_text=text)[-1])[0]
        assert str(tmp_path) not in str(quantize), "where the text is belongs to this machine"
        digests.add(quantize["text_sha256"])
    assert len(digests) == 2


def test_block_size_and_symmetry_are_of_int4_and_sizes_matter_to_quantization_only() -> None:
    for block in (16, 32, 64):
        quantize = passes(made("int4", int4_block_size=block, int4_symmetric=True)[-1])[0]
        assert (quantize["group_size"], quantize["sym"]) == (block, True)
    assert passes(made("int8", int4_block_size=100)[-1])[0]["group_size"] == 32
    assert [recipe.name for recipe in made("fp16", sizes=(7,), int4_block_size=100)] == ["fp32", "fp16"]


# --- the weights of graphs that are small enough to count by hand


def tensor(name: str, *dims: int, kind: int = TensorProto.FLOAT) -> TensorProto:
    """Zeros."""
    width = helper.tensor_dtype_to_np_dtype(kind).itemsize
    return helper.make_tensor(name, kind, dims, bytes(prod(dims) * width), raw=True)


def nbits(name: str, columns: int, rows: int, bits: int, weight: str = "") -> NodeProto:
    """A MatMulNBits of ``rows`` inputs and ``columns`` outputs in blocks of 32."""
    inputs = ["x", weight or f"{name}.q", f"{name}.scales", f"{name}.zeros"]
    return helper.make_node("MatMulNBits", inputs, [f"{name}.y"], K=rows, N=columns, bits=bits, block_size=32)


def packed(name: str, columns: int, rows: int, bits: int) -> list[TensorProto]:
    """What such an operator reads: packed weights, a scale and a zero point a block."""
    blocks = rows // 32
    return [
        tensor(f"{name}.q", columns, blocks, 4 * bits, kind=TensorProto.UINT8),
        tensor(f"{name}.scales", columns, blocks),
        tensor(f"{name}.zeros", columns, blocks * bits // 8 or 1, kind=TensorProto.UINT8),
    ]


def inspect(tmp_path: Path, nodes: list[NodeProto], tensors: list[TensorProto], parameters: int) -> Weights:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph(nodes, "graph", [x], [], initializer=tensors)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), str(path))
    return verify_worker.inspect_weights(path, parameters)


X, Y = helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "v"], ["z"])
PLAIN = [(TensorProto.FLOAT, 32), (TensorProto.FLOAT16, 16), (TensorProto.BFLOAT16, 16), (TensorProto.INT8, 8)]
ROTARY = [tensor("cos_cache", 2048, 16), tensor("model.rotary.sin_cache_large", 2048, 16)]
A, B, HEAD = packed("a", 16, 64, 4), packed("b", 16, 64, 4), packed("head", 100, 64, 8)
DEFAULT_BITS = helper.make_node("MatMulNBits", ["x", "a.q", "a.scales"], ["y"], K=64, N=16)
MIXED = [nbits("a", 16, 64, 4), nbits("a", 16, 64, 4), nbits("b", 16, 64, 4), nbits("head", 100, 64, 8)]
# As TieWordEmbeddings leaves it: one packed table, flat for the lookup and in blocks for the product.
TIED = [
    helper.make_node("GatherBlockQuantized", ["table", "ids", "head.scales", "head.zeros"], ["e"], bits=8),
    helper.make_node("Reshape", ["table", "shape"], ["table.blocks"]),
    nbits("head", 100, 64, 8, weight="table.blocks"),
]
TABLE = [tensor("table", 100, 64, kind=TensorProto.UINT8), tensor("shape", 3, kind=TensorProto.INT64), *HEAD[1:]]
Case = tuple[list[NodeProto], list[TensorProto], int, dict[str, int], dict[str, int]]
GRAPHS: dict[str, Case] = {
    # nodes, tensors, their bytes, weights by bits, quantized operators
    **{
        f"plain {TensorProto.DataType.Name(kind)}": (
            [X, Y],
            [tensor("w", 64, 32, kind=kind), tensor("v", 32, 8, kind=kind)],
            2304 * bits // 8,
            {str(bits): 2304},
            {},
        )
        for kind, bits in PLAIN
    },
    # Norms have bytes but are no matrix weights, and rotary tables are computed, not learned.
    "norms and rotary": ([X], [tensor("w", 64, 32), tensor("norm", 64), *ROTARY], 4 * (2048 + 64), {"32": 2048}, {}),
    "4 bits": ([nbits("a", 16, 64, 4)], A, 512 + 128 + 16, {"4": 1024}, {"MatMulNBits 4 bit": 1}),
    "8 bits": ([nbits("head", 100, 64, 8)], HEAD, 6400 + 800 + 200, {"8": 6400}, {"MatMulNBits 8 bit": 1}),
    "without zero points and bits": ([DEFAULT_BITS], A[:2], 512 + 128, {"4": 1024}, {"MatMulNBits 4 bit": 1}),
    "mixed, and a table that two products read": (
        MIXED,
        [*A, *B, *HEAD],
        2 * (512 + 128 + 16) + 6400 + 800 + 200,
        {"4": 2048, "8": 6400},
        {"MatMulNBits 4 bit": 3, "MatMulNBits 8 bit": 1},
    ),
    **{
        f"a table shared with the head through a reshape, {how}": (
            nodes,
            TABLE,
            6400 + 800 + 200 + 24,  # with the three numbers of the shape
            {"8": 6400},
            {"GatherBlockQuantized 8 bit": 1, "MatMulNBits 8 bit": 1},
        )
        for how, nodes in (("first read", TIED), ("read last", [*TIED[1:], TIED[0]]))
    },
    "a table that is read through a reshape only": (
        [TIED[1], nbits("head", 100, 64, 4, weight="table.blocks")],
        [tensor("table", 100, 32, kind=TensorProto.UINT8), *HEAD[1:]],
        3200 + 800 + 200,
        {"4": 6400},  # the bits of its reader
        {"MatMulNBits 4 bit": 1},
    ),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_weights_are_counted_by_their_bits(tmp_path: Path, case: str) -> None:
    nodes, tensors, size, by_bits, operators = GRAPHS[case]
    found = inspect(tmp_path, nodes, tensors, 1000)
    assert (found.by_bits, found.quantized_ops) == (by_bits, operators)
    assert found.bits_per_weight == pytest.approx(8 * size / 1000)


def test_external_data_is_not_read(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "graph", [], [], initializer=[tensor("w", 64, 64)]))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (tmp_path / "model.onnx.data").unlink()
    assert verify_worker.inspect_weights(path, 4096).by_bits == {"32": 4096}


def counted(by_bits: dict[str, int], four: int = 0, eight: int = 0) -> Weights:
    operators = {"MatMulNBits 4 bit": four, "MatMulNBits 8 bit": eight}
    return Weights(bits_per_weight=1, by_bits=by_bits, quantized_ops=operators)


@pytest.mark.parametrize(
    ("bits", "found", "said"),
    [
        (32, counted({"32": 950, "16": 50}), None),
        (16, counted({"16": 960, "32": 40}), None),
        (8, counted({"8": 1000}, eight=3), None),
        (4, counted({"4": 1000}, four=3), None),
        (4, counted({"4": 400, "8": 560, "32": 40}, four=5, eight=4), None),  # mixed on purpose
        (None, counted({"32": 1000}), None),
        (None, counted({}), None),
        (4, counted({"32": 1000}), "int4: the weights should have 4 bits, but there are 1,000 of 32 bits."),
        (4, counted({"4": 400, "8": 600}, four=4, eight=4), "but there are 400 of 4 bits, 600 of 8 bits."),
        (4, counted({"4": 600, "32": 400}, four=9), "but there are 600 of 4 bits, 400 of 32 bits."),
        (8, counted({"8": 940, "32": 60}, eight=3), "but there are 940 of 8 bits, 60 of 32 bits."),
        (32, counted({"16": 51, "32": 949}), "but there are 51 of 16 bits, 949 of 32 bits."),
        (32, counted({}), "but there are none at all."),
    ],
)
def test_a_broken_promise_is_refused_with_what_was_found(bits: Any, found: Weights, said: str | None) -> None:
    breaks = nullcontext() if said is None else pytest.raises(ConversionError, match=f"{re.escape(said)}$")
    with breaks:
        verify_worker.check_weights(found, Recipe(name=f"int{bits}", config={}, bits=bits))
