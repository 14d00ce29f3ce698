"""Child process: does a converted folder work, and does it hold what its recipe says?"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.conversion import weights
from slmops.core.errors import ConversionError
from slmops.core.values import Checkpoint, Frozen, Recipe, Weights
from slmops.processes import child

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBE = (
    "The quick brown fox jumps over the lazy dog, and in 1969 people walked on the Moon; what comes next is unknown. "
)
_LENGTH = 256  # tokens that are compared
_SHORTEST = 16  # that a deployed context may be
_BEYOND = 64  # and so many beyond each length at which attention or positions change
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
    if request.recipe.baseline:
        error, right = export_error(request)
        if not error <= request.tolerance:
            way_out = (
                f"It is right for {right} tokens: --max-length {right} deploys it with that context."
                if right >= _SHORTEST
                else "Raise --export-tolerance only if you know why they differ."
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

    Both see the same tokens in fp32, in one pass without a cache for each length: that of a text, and beyond each
    window of attention and each border of rotary positions that the config names.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slmops.conversion.logits import OnnxModel

    trusted = {"trust_remote_code": request.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(request.checkpoint.path, **trusted)
    model = AutoModelForCausalLM.from_pretrained(
        request.checkpoint.path, dtype=torch.float32, attn_implementation="eager", **trusted
    ).eval()
    lengths = probe_lengths(model.config.to_dict(), request.checkpoint.context_length)
    text = np.array(tokenizer(_PROBE)["input_ids"], np.int64)
    ids = np.resize(text, lengths[-1])
    exported = OnnxModel(request.folder)
    worst, right = 0.0, lengths[-1]
    for length in lengths:
        with torch.no_grad():
            expected = model(torch.from_numpy(ids[:length])[None]).logits[0].float().numpy()
        got = exported.logits(ids[:length])
        if got.shape != expected.shape or not np.isfinite(got).all():
            return float("inf"), 0
        errors = np.abs(got - expected).max(axis=1) / max(float(np.abs(expected).max()), 1e-9)
        wrong = np.flatnonzero(errors > request.tolerance)
        worst = max(worst, float(errors.max()))
        right = min(right, int(wrong[0])) if len(wrong) else right
    return worst, right


def probe_lengths(config: Mapping[str, Any], context_length: int) -> list[int]:
    """At which lengths, in tokens, an export is compared: within the context, and where its config.json changes it."""
    rope = config.get("rope_parameters") or {}
    borders = {config.get("sliding_window")}
    if rope.get("rope_type") == "longrope":  # other factors for longer sequences
        borders |= {one.get("original_max_position_embeddings") for one in (config, rope)}
    rows, heads = _MEMORY / 4 / config["vocab_size"], config.get("num_attention_heads") or 1
    most = min(context_length, int(rows), int(math.sqrt(_MEMORY / 4 / heads)))
    asked = {_LENGTH, *(border + _BEYOND for border in borders if border and border < most)}
    return sorted({min(length, most) for length in asked})


if __name__ == "__main__":
    child.main(VerifyRequest, handle)
