"""Child process: does a converted folder work, and does it hold what its recipe says?"""

from __future__ import annotations

import json
from pathlib import Path

from slmops.conversion import weights
from slmops.core.errors import ConversionError
from slmops.core.values import Checkpoint, Frozen, Recipe, Weights
from slmops.processes import child

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBE = (
    "The quick brown fox jumps over the lazy dog, and in 1969 people walked on the Moon; what comes next is unknown."
)


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
        error = export_error(folder, request.checkpoint.path, trust_remote_code=request.trust_remote_code)
        if not error <= request.tolerance:
            raise ConversionError(
                f"The {request.recipe.name} export does not compute what the checkpoint computes: its logits differ by "
                f"{error:.2g} of the largest logit, and {request.tolerance:.2g} is allowed. The exporter does not "
                f"support {request.checkpoint.architecture} as it is configured here.",
                "Raise --export-tolerance only if you know why they differ.",
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


def export_error(folder: Path, checkpoint: Path, *, trust_remote_code: bool = False) -> float:
    """Largest difference between the logits of an export and of its checkpoint, relative to the largest logit.

    Both see the same tokens of a fixed sentence, in one pass without a cache, in fp32.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slmops.conversion.logits import OnnxModel

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
    ).eval()
    ids = np.array(tokenizer(_PROBE)["input_ids"][:40], np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    got = OnnxModel(folder).logits(ids)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-9))


if __name__ == "__main__":
    child.main(VerifyRequest, handle)
