"""Surgeries of Olive's pass GraphSurgeries that make a file smaller. For child processes only.

ONNX Runtime computes what depends on no input once, when it loads a model: what runs is the same as before.
"""

import math

import numpy as np
from numpy.typing import NDArray
from olive.passes.onnx.graph_surgeries import ProtoSurgeon
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser

_WITH_SCALES = ("MatMulNBits", "GatherBlockQuantized")  # their third input
_TABLES = ("cos_cache", "sin_cache")
_COMPUTED = """
rotary_positions = Range(rotary_first, rotary_end, rotary_step)
rotary_column = Unsqueeze(rotary_positions, rotary_axis)
rotary_angles = Mul(rotary_column, rotary_frequencies)
rotary_cosines = Cos(rotary_angles)
rotary_sines = Sin(rotary_angles)
cos_cache = Mul(rotary_cosines, rotary_factor)
sin_cache = Mul(rotary_sines, rotary_factor)
"""
_SAME = 2e-6  # a table's numbers are at most about 1, and have 24 bits


class HalfScales(ProtoSurgeon):  # type: ignore[misc]
    """Keep scales in fp16 if that changes none of them: a thirtieth of an 8-bit model, a sixteenth of a 4-bit one."""

    def __call__(self, model: ModelProto) -> ModelProto:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        casts = []
        for name in dict.fromkeys(node.input[2] for node in model.graph.node if node.op_type in _WITH_SCALES):
            if name not in tensors or tensors[name].data_type != TensorProto.FLOAT:
                continue
            values = numpy_helper.to_array(tensors[name])
            halves = values.astype(np.float16)
            if np.array_equal(halves.astype(np.float32), values):
                model.graph.initializer.remove(tensors[name])
                model.graph.initializer.append(numpy_helper.from_array(halves, f"{name}_fp16"))
                casts.append(
                    helper.make_node("Cast", [f"{name}_fp16"], [name], name=f"/{name}/Cast", to=TensorProto.FLOAT)
                )
        _first(model, casts)
        return model


class ComputeRotaryTables(ProtoSurgeon):  # type: ignore[misc]
    """Compute the cosines and sines of rotary positions from their frequencies: 20 MB of a context of 40,000 tokens."""

    def __call__(self, model: ModelProto) -> ModelProto:
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        if any(name not in tensors or tensors[name].data_type != TensorProto.FLOAT for name in _TABLES):
            return model
        cosines, sines = (numpy_helper.to_array(tensors[name]) for name in _TABLES)
        factor = np.float32(math.hypot(cosines[0, 0], sines[0, 0]))  # YaRN's, else 1
        frequencies = rotary_frequencies(cosines, sines)
        angles = np.arange(len(cosines), dtype=np.float32)[:, None] * frequencies
        for table, computed in ((cosines, np.cos(angles)), (sines, np.sin(angles))):
            if np.abs(computed * factor - table).max() > _SAME * factor:
                return model
        for name in _TABLES:
            model.graph.initializer.remove(tensors[name])
        given = {"first": 0, "end": len(cosines), "step": 1, "frequencies": frequencies[None], "factor": factor}
        arrays = {"axis": np.array([1]), **{name: np.asarray(value, np.float32) for name, value in given.items()}}
        model.graph.initializer.extend(numpy_helper.from_array(one, f"rotary_{name}") for name, one in arrays.items())
        nodes = [parser.parse_node(line) for line in _COMPUTED.strip().splitlines()]
        for node in nodes:
            node.name = f"/{node.output[0]}/{node.op_type}"
        _first(model, nodes)
        return model


def rotary_frequencies(cosines: NDArray[np.float32], sines: NDArray[np.float32]) -> NDArray[np.float32]:
    """Radians a position of tables of shape (positions, frequencies): least squares on their angles, unwrapped."""
    angles = np.unwrap(np.arctan2(sines.astype(np.float64), cosines.astype(np.float64)), axis=0)
    positions = np.arange(len(angles), dtype=np.float64)
    return np.asarray(positions @ angles / (positions @ positions), np.float32)


def _first(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put nodes before all others, as nodes stand in the order in which they can be computed."""
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
