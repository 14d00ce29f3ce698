"""Counting the weights of graphs that are small enough to count by hand, and holding them against a promise."""

import re
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from slmops.conversion import weights
from slmops.core.errors import ConversionError
from slmops.core.values import Recipe, Weights


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
    return weights.inspect(path, parameters)


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
    assert weights.inspect(path, 4096).by_bits == {"32": 4096}


def made(by_bits: dict[str, int], four: int = 0, eight: int = 0) -> Weights:
    operators = {"MatMulNBits 4 bit": four, "MatMulNBits 8 bit": eight}
    return Weights(bits_per_weight=1, by_bits=by_bits, quantized_ops=operators)


@pytest.mark.parametrize(
    ("bits", "found", "said"),
    [
        (32, made({"32": 950, "16": 50}), None),
        (16, made({"16": 960, "32": 40}), None),
        (8, made({"8": 1000}, eight=3), None),
        (4, made({"4": 1000}, four=3), None),
        (4, made({"4": 400, "8": 560, "32": 40}, four=5, eight=4), None),  # mixed on purpose
        (None, made({"32": 1000}), None),
        (None, made({}), None),
        (4, made({"32": 1000}), "int4: the weights should have 4 bits, but there are 1,000 of 32 bits."),
        (4, made({"4": 400, "8": 600}, four=4, eight=4), "but there are 400 of 4 bits, 600 of 8 bits."),
        (4, made({"4": 600, "32": 400}, four=9), "but there are 600 of 4 bits, 400 of 32 bits."),
        (8, made({"8": 940, "32": 60}, eight=3), "but there are 940 of 8 bits, 60 of 32 bits."),
        (32, made({"16": 51, "32": 949}), "but there are 51 of 16 bits, 949 of 32 bits."),
        (32, made({}), "but there are none at all."),
    ],
)
def test_a_broken_promise_is_refused_with_what_was_found(bits: Any, found: Weights, said: str | None) -> None:
    breaks = nullcontext() if said is None else pytest.raises(ConversionError, match=f"{re.escape(said)}$")
    with breaks:
        weights.check(found, Recipe(name=f"int{bits}", config={}, bits=bits))
