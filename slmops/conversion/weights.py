"""How many bits the weights of an ONNX model really have, counted from its graph. For child processes only."""

from collections import Counter
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto

from slmops.core.errors import ConversionError
from slmops.core.values import Recipe, Weights

_KINDS = {32: "FLOAT", 16: "FLOAT16 BFLOAT16", 8: "INT8 UINT8", 4: "INT4 UINT4", 2: "INT2 UINT2"}
_BITS = {TensorProto.DataType.Value(kind): bits for bits, kinds in _KINDS.items() for kind in kinds.split()}
# Operators that read packed weights: which inputs are the weights, and which are their scales and zero points.
_PACKED = {"MatMulNBits": (1, (2, 3)), "GatherBlockQuantized": (0, (2, 3))}
_MOST = 0.95


def inspect(model: Path, parameters: int) -> Weights:
    """Count the weights of an ``.onnx`` file by their bits, and the bits for each of the checkpoint's ``parameters``.

    Rotary embedding tables are left out: they are computed, not learned. A tensor that two operators read is counted
    once. External data is not read.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    tensors = {t.name: t for t in graph.initializer if "cos_cache" not in t.name and "sin_cache" not in t.name}
    made_from = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    by_bits: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    packed: set[str] = set()
    overhead: set[str] = set()
    for node in graph.node:
        if node.op_type not in _PACKED:
            continue
        weight_at, scales_at = _PACKED[node.op_type]
        bits = next((a.i for a in node.attribute if a.name == "bits"), 4)  # the operators' default
        operators[f"{node.op_type} {bits} bit"] += 1
        overhead.update(node.input[i] for i in scales_at if i < len(node.input))
        name = made_from.get(node.input[weight_at], node.input[weight_at])
        if name in tensors and name not in packed:
            packed.add(name)
            by_bits[str(bits)] += _bytes(tensors[name]) * 8 // bits
    for name, tensor in tensors.items():
        if name in packed or name in overhead or len(tensor.dims) < 2:  # norms and biases are vectors
            continue
        by_bits[str(_BITS.get(tensor.data_type, 32))] += prod(tensor.dims)
    total = sum(_bytes(t) for t in tensors.values())
    return Weights(bits_per_weight=total * 8 / max(parameters, 1), by_bits=dict(by_bits), quantized_ops=dict(operators))


def check(weights: Weights, recipe: Recipe) -> None:
    """Check that the weights have the bits that the recipe promises: if not, Olive reports success all the same.

    fp32, fp16 and int8: at least 95 % of the weights have them. int4 is mixed on purpose: at least 95 % of the weights
    have 8 bits or fewer, and more matrix products are of 4 bits than of 8. Else a ConversionError says what was found.
    """
    if recipe.bits is None:
        return
    total = sum(weights.by_bits.values())
    count = {int(bits): number for bits, number in weights.by_bits.items()}
    if recipe.bits == 4:
        small = sum(number for bits, number in count.items() if bits <= 8)
        ops = weights.quantized_ops
        good = small >= _MOST * total and ops.get("MatMulNBits 4 bit", 0) > ops.get("MatMulNBits 8 bit", 0)
    else:
        good = count.get(recipe.bits, 0) >= _MOST * total > 0
    if not good:
        found = ", ".join(f"{number:,} of {bits} bits" for bits, number in sorted(count.items()))
        raise ConversionError(
            f"{recipe.name}: the weights should have {recipe.bits} bits, but there are {found or 'none at all'}."
        )


def _bytes(tensor: TensorProto) -> int:
    return int(prod(tensor.dims) * _BITS.get(tensor.data_type, 64) + 7) // 8
