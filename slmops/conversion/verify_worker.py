"""Child process: does a converted folder work, and does it hold what its recipe says?"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.checkpoints import model as stored
from slmops.checkpoints.inspection import SHORTEST_CONTEXT
from slmops.checkpoints.source import longrope_border
from slmops.conversion import weights
from slmops.core.errors import ConversionError
from slmops.core.values import Checkpoint, Frozen, Recipe, Weights

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBE = (
    "The quick brown fox jumps over the lazy dog, and in 1969 people walked on the Moon; what comes next is unknown. "
)
_LENGTH = 1024  # tokens that are compared
_BEFORE, _BEYOND = 8, 24  # an answer of so many tokens around each length at which attention or positions change
_FORBIDDEN = -1e37
_MEMORY = 2.5e9  # bytes that the logits, and the attention of a layer, may take


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
    found = weights.inspect(model, request.checkpoint.parameters)
    weights.check(found, request.recipe)
    _one_token(folder)
    error = None
    # What depends on positions (rotary tables, windows, when the runtime computes its cache anew) is the same in all
    # variants: quantizing changes matrices only. So they need no comparison across borders of their own.
    if request.recipe.baseline:
        error, right = export_error(request)
        if not error <= request.tolerance:
            few = f"It is right for {right} tokens only, too few for a conversation. " if right else ""
            way_out = (
                f"It is right for {right} tokens: --max-length {right} deploys it with that context."
                if right >= SHORTEST_CONTEXT
                else f"{few}Raise --export-tolerance only if you know why they differ."
            )
            raise ConversionError(
                f"The {request.recipe.name} export does not compute what the checkpoint computes: its logits differ by "
                f"{error:.2g} of the largest logit, and {request.tolerance:.2g} is allowed. The exporter does not "
                f"support {request.checkpoint.architecture} as it is configured here.",
                way_out,
            )
    return VerifyResult(weights=found, export_error=error)


def _one_token(folder: Path) -> None:
    import onnxruntime_genai as og

    try:
        model = og.Model(str(folder))
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
    texts += [_continued(request.folder, np.resize(tokens, border - _BEFORE), end) for border, end in borders.items()]
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


def _continued(folder: Path, ids: Any, length: int) -> tuple[Any, Any]:
    """Tokens that the export continues up to this length, and the logits that it computed one after the other."""
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(folder))
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
