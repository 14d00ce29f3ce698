"""Child process: does a converted folder work, and does it hold what its recipe says?"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnx import TensorProto

from slmops.checkpoints import model as stored
from slmops.checkpoints.inspection import SHORTEST_CONTEXT, longrope_border
from slmops.conversion import bf16_worker
from slmops.core.errors import ConversionError
from slmops.core.files import link_or_copy
from slmops.core.targets import CPU, target_of
from slmops.core.values import Checkpoint, Frozen, Recipe, Weights

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBE = (
    "The quick brown fox jumps over the lazy dog, and in 1969 people walked on the Moon; what comes next is unknown. "
)
_LENGTH = 1024  # tokens that are compared
_BEFORE, _BEYOND = 8, 24  # an answer of so many tokens around each length at which attention or positions change
_FORBIDDEN = -1e37
_MEMORY = 2.5e9  # bytes that the logits, and the attention of a layer, may take

_KINDS = {32: "FLOAT", 16: "FLOAT16 BFLOAT16", 8: "INT8 UINT8", 4: "INT4 UINT4", 2: "INT2 UINT2"}
_BITS = {TensorProto.DataType.Value(kind): bits for bits, kinds in _KINDS.items() for kind in kinds.split()}
# Operators that read packed weights: which inputs are the weights, and which are their scales and zero points.
_PACKED = {"MatMulNBits": (1, (2, 3)), "GatherBlockQuantized": (0, (2, 3))}
_MOST = 0.95  # of the weights, at least, have the bits of the recipe
_TOLERANCES = {16: 0.1, 8: 0.15, 4: 0.6}
"""By the bits of weights, how far logits of a variant for another target than the CPU may be off, relative to the
largest: that of a wrong graph is above 1. Rounding moves a model that was fine-tuned hard by 0.02 in fp16, and by eight
times as much in bf16."""


class VerifyRequest(Frozen):
    folder: Path
    recipe: Recipe
    checkpoint: Checkpoint
    tolerance: float
    trust_remote_code: bool


class VerifyResult(Frozen):
    weights: Weights
    export_error: float | None


def handle(request: VerifyRequest) -> VerifyResult:
    """Check files, weights, one generated token and, for the baseline, the logits; else a ConversionError."""
    folder = request.folder
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        model: Path = folder / config["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError) as missing:
        raise ConversionError(f"Olive made no genai_config.json that names a model: {missing!r}") from None
    if not model.exists():
        raise ConversionError(f"genai_config.json names {model.name}, which does not exist.")
    if not any((folder / file).exists() for file in _TOKENIZER_FILES):
        raise ConversionError("The converted folder has no tokenizer.")
    found = inspect_weights(model, request.checkpoint.parameters)
    check_weights(found, request.recipe)
    _one_token(request)
    error = None
    target = target_of(request.recipe.name)
    # What depends on positions (rotary tables, windows, when the runtime computes its cache anew) is the same in all
    # variants: quantizing changes matrices only. So they need no comparison across borders of their own. The graph for
    # another target is another one.
    if target != CPU:
        bits = 4 if bf16_worker.makes(request.recipe) else request.recipe.bits or 4
        allowed = _TOLERANCES.get(bits, request.tolerance)  # in 32 bits nothing is rounded
        request = request.model_copy(update={"tolerance": allowed})
    if request.recipe.baseline or target != CPU:
        error, right = export_error(request)
        if not error <= request.tolerance:
            few = f"It is right for {right} tokens only, too few for a conversation. " if right else ""
            way_out = (
                f"It is right for {right} tokens: --max-length {right} deploys it with that context."
                if right >= SHORTEST_CONTEXT
                else f"{few}Raise --export-tolerance only if you know why they differ."
            )
            if target != CPU:
                way_out = f"Leave out --target {target}."
            raise ConversionError(
                f"The {request.recipe.name} export does not compute what the checkpoint computes: its logits differ by "
                f"{error:.2g} of the largest logit, and {request.tolerance:.2g} is allowed. The exporter does not "
                f"support {request.checkpoint.architecture} as it is configured here.",
                way_out,
            )
    return VerifyResult(weights=found, export_error=error)


def inspect_weights(model: Path, parameters: int) -> Weights:
    """Count the weights of an ``.onnx`` file by their bits, and the bits for each of the checkpoint's ``parameters``.

    What belongs to rotary positions is left out: it is computed, not learned. A tensor that two operators read is
    counted once. External data is not read.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    rotary = ("cos_cache", "sin_cache", "rotary_")
    tensors = {t.name: t for t in graph.initializer if not any(part in t.name for part in rotary)}
    made_from = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ("Reshape", "Cast")}
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
        overhead.update(made_from.get(node.input[i], node.input[i]) for i in scales_at if i < len(node.input))
        name = made_from.get(node.input[weight_at], node.input[weight_at])
        if name in tensors and name not in packed:
            packed.add(name)
            by_bits[str(bits)] += _bytes(tensors[name]) * 8 // bits
    for name, tensor in tensors.items():
        if name in packed or name in overhead or len(tensor.dims) < 2:  # norms and biases are vectors
            continue
        by_bits[str(_BITS.get(tensor.data_type, 32))] += math.prod(tensor.dims)
    total = sum(_bytes(t) for t in tensors.values())
    return Weights(bits_per_weight=total * 8 / max(parameters, 1), by_bits=dict(by_bits), quantized_ops=dict(operators))


def check_weights(weights: Weights, recipe: Recipe) -> None:
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
    return int(math.prod(tensor.dims) * _BITS.get(tensor.data_type, 64) + 7) // 8


def _one_token(request: VerifyRequest) -> None:
    import onnxruntime_genai as og

    try:
        with _on_the_cpu(request) as model:
            tokenizer = og.Tokenizer(model)
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=64, do_sample=False)
            generator = og.Generator(model, params)
            generator.append_tokens(tokenizer.encode("Hello"))
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
    except Exception as error:
        raise ConversionError(f"The converted model does not load or generate: {error}") from error
    if token < 0:
        raise ConversionError(f"The converted model generated the token {token}.")


@contextmanager
def _on_the_cpu(request: VerifyRequest) -> Iterator[Any]:
    """The model on the CPU provider, whichever its config names."""
    import onnxruntime_genai as og

    with ExitStack() as held:
        folder = request.folder
        if bf16_worker.makes(request.recipe):
            beside = TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True)  # Windows keeps what is open
            copy = Path(held.enter_context(beside))
            for file in folder.iterdir():
                link_or_copy(file, copy / file.name)
            bf16_worker.handle(bf16_worker.RewriteRequest(folder=copy))
            folder = copy
        config = og.Config(str(folder))
        config.clear_providers()
        yield og.Model(config)


def export_error(request: VerifyRequest) -> tuple[float, int]:
    """Largest difference between the logits of an export and of its checkpoint, relative to the largest logit, and the
    number of tokens for which it is tolerable.

    Both see the same tokens in fp32 without a cache: a text, and one that the export continues across each window of
    attention and each border of rotary positions that the config names. What the export computed for these tokens one
    by one, with its cache, is compared too.
    """
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from slmops.conversion.logits import OnnxModel

    folder, trusted = request.checkpoint.path, {"trust_remote_code": request.trust_remote_code}
    config = AutoConfig.from_pretrained(folder, **trusted).to_dict()
    length, borders = probes(config, request.checkpoint.context_length)
    tokens = np.array(AutoTokenizer.from_pretrained(folder, **trusted)(_PROBE)["input_ids"], np.int64)
    texts = [(np.resize(tokens, length), None)]
    texts += [_continued(request, np.resize(tokens, border - _BEFORE), end) for border, end in borders.items()]
    model = stored.load(folder, attn_implementation="eager", **trusted)
    exported, worst, right = OnnxModel(request.folder), 0.0, request.checkpoint.context_length
    for (ids, steps), border in zip(texts, (0, *borders), strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        largest = max(float(expected.max()), -float(expected.min()), 1e-9)
        computed = [(0, exported.logits(ids))]
        if steps is not None:  # the checkpoint, too, computes all anew beyond a border of rotary positions
            beyond = steps[border + 1 - len(ids) :]
            # The ends that min_length forbids have the lowest number for a logit.
            computed.append((border, np.where(beyond < _FORBIDDEN, expected[border:-1], beyond)))
        for start, got in computed:
            right_logits = expected[start : start + len(got)]
            if got.shape != right_logits.shape or not np.isfinite(got).all():
                return float("inf"), 0
            # In place: the logits of a large vocabulary take a gigabyte.
            errors = np.abs(np.subtract(got, right_logits, out=got), out=got).max(axis=1) / largest
            wrong = np.flatnonzero(errors > request.tolerance)
            worst = max(worst, float(errors.max()))
            right = min(right, start + int(wrong[0])) if len(wrong) else right
    return worst, right


def _continued(request: VerifyRequest, ids: Any, length: int) -> tuple[Any, Any]:
    """Tokens that the export continues up to this length, and the logits that it computed one after the other."""
    import numpy as np
    import onnxruntime_genai as og

    with _on_the_cpu(request) as model:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))
    logits = []
    while len(generator.get_sequence(0)) < length:
        generator.generate_next_token()
        logits.append(np.array(generator.get_output("logits"), np.float32)[0, -1])
    return np.array(generator.get_sequence(0), np.int64), np.array(logits)


def probes(config: Mapping[str, Any], context_length: int) -> tuple[int, dict[int, int]]:
    """How many tokens of a text are compared; and each length at which config.json changes the model, with the end."""
    borders = {config.get("sliding_window"), longrope_border(config, context_length)}
    rows, heads = _MEMORY / 4 / config["vocab_size"], config.get("num_attention_heads") or 1
    most = min(context_length, int(rows), int(math.sqrt(_MEMORY / 4 / heads)))
    within = sorted(border for border in borders if border and _BEFORE < border < most - 1)
    return min(_LENGTH, most), {border: min(border + _BEYOND, most) for border in within}
