"""Graphs in bf16, which are for CUDA, in a form that the CPU computes. For child processes only.

ONNX Runtime's CPU provider casts to bf16 and from it, and computes nothing in it. So each operator computes in fp32,
and what it returns is rounded to bf16. A GPU does so, too: its kernels add up in fp32, in an order of their own.
"""

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from slmops.core.values import Frozen, Recipe

_BF16, _FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT


class RewriteRequest(Frozen):
    folder: Path


def makes(recipe: Recipe) -> bool:
    """Whether the graphs of a recipe are in bf16."""
    return any(step.get("precision") == "bf16" for step in recipe.config.get("passes", {}).values())


def handle(request: RewriteRequest) -> Frozen:
    """Replace the graph of a folder by one for the CPU; the weights stay where they are."""
    config = json.loads((request.folder / "genai_config.json").read_text(encoding="utf-8"))
    file: Path = request.folder / config["model"]["decoder"]["filename"]
    graph = for_cpu(onnx.load(file, load_external_data=False))
    file.unlink()  # it may be a link to that of a variant
    onnx.save(graph, file)
    return Frozen()


def for_cpu(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in that form, changed in place; one without bf16 stays as it is."""
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == _BF16}
    values = [*graph.input, *graph.output, *graph.value_info]
    rounded = {value.name for value in values if value.type.tensor_type.elem_type == _BF16} - weights
    for value in values:
        if value.name in rounded:
            value.type.tensor_type.elem_type = _FP32
    nodes = [_cast(name, f"{name}/fp32", _FP32) for name in sorted(weights)]
    for node in graph.node:
        results = [name for name in node.output if name in rounded]
        node.input[:] = [f"{name}/fp32" if name in weights else name for name in node.input]
        node.output[:] = [f"{name}/exact" if name in rounded else name for name in node.output]
        nodes.append(node)
        for name in results:
            nodes += [_cast(f"{name}/exact", f"{name}/bf16", _BF16), _cast(f"{name}/bf16", name, _FP32)]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _cast(value: str, into: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [value], [into], name=f"{into}/Cast", to=kind)
