"""Quantization in blocks, against ONNX Runtime's kernels; surgeries that change a file and nothing that it computes."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from olive.common.quant.nn import QuantLinear
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.graph_surgeries import GraphSurgeries
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM

from slmops.conversion import block_quantize, fixes, rounding, surgeries
from slmops.conversion.block_quantize import BlockQuantize
from slmops.conversion.rounding import Grid
from tests import tiny

ROWS, COLUMNS = 48, 128


@pytest.fixture(scope="module")
def weights() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Inputs of a layer whose columns depend on each other, as in a real model; shape (samples, columns)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(512, 24, generator=generator) @ torch.randn(24, COLUMNS, generator=generator)


def error(weights: torch.Tensor, grid: Grid, integers: torch.Tensor, inputs: torch.Tensor | None = None) -> float:
    difference = weights - grid.weights(integers)
    return float((difference if inputs is None else inputs @ difference.T).square().sum())


def model(graph: onnx.GraphProto) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(of: onnx.ModelProto) -> Callable[..., list[Any]]:
    made = ort.InferenceSession(of.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **feeds: list(made.run(None, feeds))


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, True)])
@pytest.mark.parametrize("group", [16, 32])
def test_the_kernel_reads_what_the_grid_says(weights: torch.Tensor, bits: int, symmetric: bool, group: int) -> None:
    grid = rounding.fit(weights, bits, group, symmetric=symmetric)
    integers = grid.nearest(weights)
    shape = {"in_features": COLUMNS, "out_features": ROWS, "bias": False}
    zeros = grid.zero_points.to(torch.int32)
    arguments: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "group_size": group}
    packed = QuantLinear.from_tensors(
        integers, scales=grid.scales, zero_points=zeros, quantized=True, **arguments, **shape
    )
    assert torch.equal(packed.forward(torch.eye(COLUMNS)).T, grid.weights(integers))
    tensors = {"B": packed.qweight.reshape(ROWS, COLUMNS // group, -1), "scales": packed.scales, "zeros": packed.qzeros}
    given = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
    sizes = {"bits": bits, "block_size": group, "K": COLUMNS, "N": ROWS}
    node = helper.make_node("MatMulNBits", ["A", *given], ["Y"], domain="com.microsoft", accuracy_level=1, **sizes)
    wide = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("A", "Y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph([node], "one", wide[:1], wide[1:], initializers)
    (computed,) = session(model(graph))(A=np.eye(COLUMNS, dtype=np.float32))
    np.testing.assert_allclose(computed.T, grid.weights(integers).numpy(), atol=1e-6)


def test_a_fitted_grid_is_closer_than_one_that_covers_the_range(weights: torch.Tensor) -> None:
    fitted = rounding.fit(weights, 4, 32, symmetric=False)
    assert torch.equal(fitted.scales.half().float(), fitted.scales)
    assert torch.equal(fitted.zero_points, fitted.zero_points.round().clamp(0, 15))
    blocks = weights.unflatten(1, (-1, 32))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    covering = Grid(scales, (-low / scales).round().clamp(0, 15), 4, 32)
    assert error(weights, fitted, fitted.nearest(weights)) < 0.93 * error(weights, covering, covering.nearest(weights))


def test_a_grid_is_closest_where_it_matters(weights: torch.Tensor) -> None:
    importance = torch.ones(COLUMNS)
    importance[::8] = 100
    plain, weighted = (rounding.fit(weights, 4, 32, symmetric=False, importance=given) for given in (None, importance))

    def of_important(grid: Grid) -> float:
        return float((weights - grid.weights(grid.nearest(weights)))[:, ::8].square().sum())

    assert of_important(weighted) < 0.8 * of_important(plain)


def test_errors_are_made_up_for_by_columns_that_are_rounded_later(weights: torch.Tensor, inputs: torch.Tensor) -> None:
    hessian = inputs.T @ inputs
    grid = rounding.fit(weights, 4, 32, symmetric=False, importance=hessian.diagonal())
    before = hessian.clone()
    made, nearest = rounding.with_feedback(weights, grid, hessian), grid.nearest(weights)
    assert torch.equal(hessian, before), "the Hessian is another layer's, too"
    assert int(made.max()) <= 15
    assert error(weights, grid, made, inputs) < 0.3 * error(weights, grid, nearest, inputs)


def test_weights_that_are_zero_stay_zero(weights: torch.Tensor, inputs: torch.Tensor) -> None:
    given = weights.clone()
    given[:, :32] = 0
    for bits, symmetric in ((4, False), (4, True), (8, True)):
        grid = rounding.fit(given, bits, 32, symmetric=symmetric)
        assert not grid.weights(grid.nearest(given))[:, :32].any()
        made_up_for = grid.weights(rounding.with_feedback(given, grid, inputs.T @ inputs))
        assert made_up_for[:, :32].abs().max() < 1e-5  # the grid of such a block has nothing larger


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama-tied", "phi3"])  # inputs of attention that are three matrices, and one
def test_as_many_weights_get_8_bits_where_it_matters_most(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    folder, text = tiny.make(kind, tmp_path / "checkpoint"), tmp_path / "text.txt"
    text.write_text("What comes next depends on what was there before. " * 20)
    options = {"eight": ["down_proj"], "tokens": 128, "text": str(text), "group_size": 16}
    eights = []
    for choose in (False, True):
        config = {**options, "choose": choose}
        run = create_pass_from_dict(BlockQuantize, config, True, DEFAULT_CPU_ACCELERATOR)
        made = run.run(HfModelHandler(str(folder)), str(tmp_path / str(choose)))
        found = json.loads((Path(made.model_path) / "config.json").read_text())["quantization_config"]["overrides"]
        eights.append({name for name, how in found.items() if how.get("bits") == 8 and ".layers." in name})
    assert eights[0] == {f"model.layers.{number}.mlp.down_proj" for number in range(2)}
    weights = AutoModelForCausalLM.from_pretrained(folder)

    def size(names: set[str]) -> int:
        return sum(weights.get_submodule(name).weight.numel() for name in names)

    assert 0 < size(eights[1]) <= size(eights[0])
    for number in range(2):  # they are one matrix in the export
        inputs = {part for part in "qkv" if f"model.layers.{number}.self_attn.{part}_proj" in eights[1]}
        assert len(inputs) in (0, 3)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_is_packed_leaves_nothing_behind_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    replace, weights, left = block_quantize._replace, {}, []

    def replaced(net: Any, name: str, packed: dict[str, Any]) -> None:
        if ".layers.1." in name:
            left.append([one for one, weight in weights.items() if ".layers.0." in one and weight() is not None])
        weights[name] = weakref.ref(net.get_submodule(name).weight)
        replace(net, name, packed)

    monkeypatch.setattr(block_quantize, "_replace", replaced)
    config = {"tokens": 128, "group_size": 16}
    run = create_pass_from_dict(BlockQuantize, config, True, DEFAULT_CPU_ACCELERATOR)
    run.run(HfModelHandler(str(tiny.make("llama-tied", tmp_path / "checkpoint"))), str(tmp_path / "made"))
    assert left
    assert not any(left)


def test_all_parts_of_a_text_are_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    for length in (5000, 100):  # the second is too short, so it is repeated
        text.write_text("x" * length)
        tokenizer = SimpleNamespace(get_hf_tokenizer=lambda: lambda said: {"input_ids": list(range(len(said)))})
        ids = block_quantize._read(tokenizer, text, 256)
        assert ids.shape == (64, 4)
        assert (ids[0, 0], ids[-1, -1]) == (0, length - 1)
        assert (ids.diff(dim=1) % length == 1).all()


def with_tables(cosines: np.ndarray[Any, Any], sines: np.ndarray[Any, Any]) -> onnx.ModelProto:
    tables = {"cos_cache": cosines, "sin_cache": sines}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tables]
    made = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [None, None]) for name in tables]
    initializers = [numpy_helper.from_array(table.astype(np.float32), name) for name, table in tables.items()]
    return model(helper.make_graph(nodes, "tables", [], made, initializers))


@pytest.mark.parametrize(("base", "factor"), [(10_000.0, 1.0), (500_000.0, 1.0), (10_000.0, 1.2)])
def test_rotary_tables_are_computed_when_a_model_is_loaded(base: float, factor: float) -> None:
    frequencies = 1 / base ** (torch.arange(0, 64, 2).float() / 64)
    angles = torch.outer(torch.arange(8192).float(), frequencies)
    tables = (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()
    made = surgeries.ComputeRotaryTables()(with_tables(*tables))
    assert made.ByteSize() < 5000
    for computed, table in zip(session(made)(), tables, strict=True):
        np.testing.assert_allclose(computed, table, atol=2e-6)


def test_tables_that_no_frequencies_explain_stay() -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (2, 64, 8))
    made = surgeries.ComputeRotaryTables()(with_tables(*noise))
    assert {tensor.name for tensor in made.graph.initializer} == {"cos_cache", "sin_cache"}


@pytest.mark.parametrize(("scale", "halved"), [(0.25, True), (0.1, False)])
def test_scales_are_halved_only_if_that_changes_none(scale: float, halved: bool) -> None:
    packed = numpy_helper.from_array(np.full((4, 2, 16), 0x9A, np.uint8), "B")
    scales = numpy_helper.from_array(np.full((4, 2), scale, np.float32), "scales")
    node = helper.make_node(
        "MatMulNBits", ["A", "B", "scales"], ["Y"], domain="com.microsoft", bits=4, block_size=32, K=64, N=4
    )
    wide = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("A", "Y")]
    graph = helper.make_graph([node], "one", wide[:1], wide[1:], [packed, scales])
    made = model(graph)
    given = np.ones((1, 64), np.float32)
    before = session(made)(A=given)[0]
    changed = surgeries.HalfScales()(made)
    kinds = {tensor.data_type for tensor in changed.graph.initializer}
    assert (TensorProto.FLOAT16 in kinds) == halved
    np.testing.assert_array_equal(session(changed)(A=given)[0], before)


@pytest.fixture
def tied(tmp_path: Path) -> ONNXModelHandler:
    """A model with its embeddings and the same as its head, in a file of weights."""
    matrix = np.random.default_rng(0).standard_normal((50, 64), np.float32)
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["hidden"], name="/embed/Gather"),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="/lm_head/MatMul"),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    logits, hidden = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", size])
        for name, size in (("logits", 50), ("hidden", 64))
    )
    inside = [numpy_helper.from_array(matrix, "embed"), numpy_helper.from_array(matrix.T.copy(), "head")]
    made = model(helper.make_graph(nodes, "tied", [ids], [logits], inside, value_info=[hidden]))
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    return ONNXModelHandler(model_path=str(tmp_path), onnx_file_name="model.onnx")


def test_a_surgery_with_little_memory_makes_what_it_made_before(
    tied: ONNXModelHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surgery = {"surgeries": [{"surgeon": "TieWordEmbeddings"}], "save_as_external_data": True}
    run = create_pass_from_dict(GraphSurgeries, surgery, True, DEFAULT_CPU_ACCELERATOR)
    before = onnx.load(run.run(tied, str(tmp_path / "before")).model_path).graph
    with monkeypatch.context() as patch:
        patch.setattr(GraphSurgeries, "_run_for_config", GraphSurgeries._run_for_config)  # to be put back
        fixes._operate_without_loading()
        after = onnx.load(run.run(tied, str(tmp_path / "after")).model_path).graph
    assert [[one.op_type, *one.input, *one.output] for one in after.node] == [
        [one.op_type, *one.input, *one.output] for one in before.node
    ]
    assert "MatMul" not in [one.op_type for one in after.node]
    weights = [
        {one.name: numpy_helper.to_array(one).tolist() for one in graph.initializer} for graph in (before, after)
    ]
    assert weights[0] == weights[1]
    assert "head" not in weights[1]
