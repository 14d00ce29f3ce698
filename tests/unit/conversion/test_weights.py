"""Counting the weights of graphs that are small enough to count by hand, and holding them against a promise."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from slmops.conversion import weights
from slmops.core.errors import ConversionError
from slmops.core.values import Recipe, Weights

_BYTES = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.UINT8: 1,
    TensorProto.INT8: 1,
    TensorProto.INT64: 8,
}


def tensor(name: str, *dims: int, kind: int = TensorProto.FLOAT) -> TensorProto:
    """Zeros."""
    return helper.make_tensor(name, kind, dims, bytes(prod(dims) * _BYTES[kind]), raw=True)


def nbits(name: str, columns: int, rows: int, bits: int, *, block: int = 32, weight: str | None = None) -> NodeProto:
    """A MatMulNBits of ``rows`` inputs and ``columns`` outputs."""
    inputs = ["x", weight or f"{name}.q", f"{name}.scales", f"{name}.zeros"]
    options = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    return helper.make_node("MatMulNBits", inputs, [f"{name}.y"], domain="com.microsoft", **options)


def packed(name: str, columns: int, rows: int, bits: int, *, block: int = 32) -> list[TensorProto]:
    """What such an operator reads: packed weights, a scale and a zero point a block."""
    blocks = rows // block
    return [
        tensor(f"{name}.q", columns, blocks, block * bits // 8, kind=TensorProto.UINT8),
        tensor(f"{name}.scales", columns, blocks),
        tensor(f"{name}.zeros", columns, blocks * bits // 8 or 1, kind=TensorProto.UINT8),
    ]


def inspect(tmp_path: Path, nodes: list[NodeProto], tensors: list[TensorProto], parameters: int) -> Weights:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph(nodes, "graph", [x], [], initializer=tensors)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), str(path))
    return weights.inspect(path, parameters)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(TensorProto.FLOAT, 32), (TensorProto.FLOAT16, 16), (TensorProto.BFLOAT16, 16), (TensorProto.INT8, 8)],
)
def test_plain_weights(tmp_path: Path, kind: int, bits: int) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["y", "v"], ["z"])]
    found = inspect(tmp_path, nodes, [tensor("w", 64, 32, kind=kind), tensor("v", 32, 8, kind=kind)], 64 * 32 + 32 * 8)
    assert found == Weights(bits_per_weight=bits, by_bits={str(bits): 2304}, quantized_ops={})


def test_norms_have_bytes_but_are_no_matrix_weights_and_rotary_tables_are_not_counted(tmp_path: Path) -> None:
    """Neither are the bits of an fp32 graph under the name of int4 in order, for which Olive reports success."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    tables = [tensor("cos_cache", 2048, 16), tensor("model.rotary.sin_cache_large", 2048, 16)]
    found = inspect(tmp_path, [node], [tensor("w", 64, 32), tensor("norm", 64), *tables], 64 * 32)
    assert found.by_bits == {"32": 2048}
    assert found.bits_per_weight == pytest.approx(32 * (2048 + 64) / 2048)
    with pytest.raises(ConversionError, match="int4: the weights should have 4 bits, but there are 2,048 of 32 bits"):
        weights.check(found, Recipe(name="int4", config={}, bits=4))


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_with_scales_and_zero_points(tmp_path: Path, bits: int) -> None:
    found = inspect(tmp_path, [nbits("a", 16, 64, bits)], packed("a", 16, 64, bits), 16 * 64)
    assert found.by_bits == {str(bits): 1024}
    assert found.quantized_ops == {f"MatMulNBits {bits} bit": 1}
    zeros = 16 if bits == 4 else 32  # bytes: two blocks a row, packed as the weights are
    assert found.bits_per_weight == pytest.approx(bits + (16 * 2 * 32 + zeros * 8) / 1024)


def test_packed_weights_without_zero_points_and_bits(tmp_path: Path) -> None:
    # Symmetric: no fourth input. No attribute "bits": the operator's default is 4.
    node = helper.make_node("MatMulNBits", ["x", "a.q", "a.scales"], ["y"], domain="com.microsoft", K=64, N=16)
    found = inspect(tmp_path, [node], packed("a", 16, 64, 4)[:2], 1024)
    assert found.by_bits == {"4": 1024}
    assert found.bits_per_weight == pytest.approx(4 + 1)


def test_mixed_bits_and_a_table_that_two_products_read_counts_once(tmp_path: Path) -> None:
    nodes = [nbits("a", 16, 64, 4), nbits("a", 16, 64, 4), nbits("b", 16, 64, 4), nbits("head", 32, 64, 8)]
    tensors = [*packed("a", 16, 64, 4), *packed("b", 16, 64, 4), *packed("head", 32, 64, 8)]
    found = inspect(tmp_path, nodes, tensors, 4096)
    assert found.by_bits == {"4": 2048, "8": 2048}
    assert found.quantized_ops == {"MatMulNBits 4 bit": 3, "MatMulNBits 8 bit": 1}


@pytest.mark.parametrize("gather_first", [True, False])
def test_table_shared_with_the_head_through_a_reshape_counts_once(tmp_path: Path, gather_first: bool) -> None:
    """As TieWordEmbeddings leaves it: one packed table, flat for the lookup and in blocks for the product."""
    head = nbits("head", 100, 64, 8, weight="table.blocks")
    shape = helper.make_node("Reshape", ["table", "shape"], ["table.blocks"])
    lookup = helper.make_node(
        "GatherBlockQuantized",
        ["table", "ids", "head.scales", "head.zeros"],
        ["embedded"],
        domain="com.microsoft",
        bits=8,
        block_size=32,
    )
    nodes = [lookup, shape, head] if gather_first else [shape, head, lookup]
    tensors = [
        tensor("table", 100, 64, kind=TensorProto.UINT8),
        tensor("shape", 3, kind=TensorProto.INT64),
        *packed("head", 100, 64, 8)[1:],
    ]
    found = inspect(tmp_path, nodes, tensors, 6400)
    assert found.by_bits == {"8": 6400}
    assert found.quantized_ops == {"GatherBlockQuantized 8 bit": 1, "MatMulNBits 8 bit": 1}
    # Bytes: table, a scale and a zero point a block, the three numbers of the shape.
    assert found.bits_per_weight == pytest.approx(8 * (6400 + 200 * 4 + 200 + 24) / 6400)


def test_table_that_is_read_through_a_reshape_only_has_the_bits_of_its_reader(tmp_path: Path) -> None:
    shape = helper.make_node("Reshape", ["table", "shape"], ["table.blocks"])
    tensors = [tensor("table", 100, 32, kind=TensorProto.UINT8), *packed("head", 100, 64, 4)[1:]]
    found = inspect(tmp_path, [shape, nbits("head", 100, 64, 4, weight="table.blocks")], tensors, 6400)
    assert found.by_bits == {"4": 6400}


def test_external_data_is_not_read(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "graph", [], [], initializer=[tensor("w", 64, 64)]))
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (tmp_path / "model.onnx.data").unlink()
    assert weights.inspect(path, 4096).by_bits == {"32": 4096}


def made(by_bits: dict[str, int], four: int = 0, eight: int = 0) -> Weights:
    return Weights(
        bits_per_weight=1, by_bits=by_bits, quantized_ops={"MatMulNBits 4 bit": four, "MatMulNBits 8 bit": eight}
    )


@pytest.mark.parametrize(
    ("bits", "found"),
    [
        (32, made({"32": 1000})),
        (32, made({"32": 950, "16": 50})),
        (16, made({"16": 960, "32": 40})),
        (8, made({"8": 1000}, eight=3)),
        (4, made({"4": 1000}, four=3)),
        (4, made({"4": 400, "8": 560, "32": 40}, four=5, eight=4)),  # mixed on purpose
        (None, made({"32": 1000})),
        (None, made({})),
    ],
)
def test_promise_kept(bits: Any, found: Weights) -> None:
    weights.check(found, Recipe(name="r", config={}, bits=bits))


@pytest.mark.parametrize(
    ("bits", "found", "said"),
    [
        (4, made({"32": 1000}), "int4: the weights should have 4 bits, but there are 1,000 of 32 bits."),
        (4, made({"8": 1000}, eight=7), "int4: the weights should have 4 bits, but there are 1,000 of 8 bits."),
        (4, made({"4": 400, "8": 600}, four=4, eight=4), "but there are 400 of 4 bits, 600 of 8 bits."),
        (4, made({"4": 600, "32": 400}, four=9), "but there are 600 of 4 bits, 400 of 32 bits."),
        (8, made({"4": 1000}, four=3), "but there are 1,000 of 4 bits."),
        (8, made({"8": 940, "32": 60}, eight=3), "but there are 940 of 8 bits, 60 of 32 bits."),
        (16, made({"32": 1000}), "but there are 1,000 of 32 bits."),
        (32, made({"16": 51, "32": 949}), "but there are 51 of 16 bits, 949 of 32 bits."),
        (32, made({}), "but there are none at all."),
        (4, made({}), "but there are none at all."),
    ],
)
def test_promise_broken_names_what_was_found(bits: Any, found: Weights, said: str) -> None:
    with pytest.raises(ConversionError) as raised:
        weights.check(found, Recipe(name=f"int{bits}", config={}, bits=bits))
    assert raised.value.message.endswith(said)
