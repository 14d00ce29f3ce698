"""Weights that do not make the model that config.json describes."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.checkpoints import tensors
from slmops.core.errors import CheckpointError
from tests import tiny
from tests.checkpoint_folders import HIDDEN, TENSORS, VOCAB, Resolve, edit_json, write_safetensors

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("surplus", "told"),
    [(f"{LAYER}self_attn.rotary_emb.inv_freq", False), ("v_head.summary.weight", True), (f"{LAYER}mlp.lora_A", True)],
)
def test_what_nothing_uses(
    folder: Path, resolve: Resolve, caplog: pytest.LogCaptureFixture, surplus: str, told: bool
) -> None:
    write_safetensors(folder / "model.safetensors", TENSORS | {surplus: [4]})
    with caplog.at_level(logging.WARNING):
        resolve(folder)
    assert (surplus.removeprefix("model.") in caplog.text) == told


def test_a_base_model_without_the_prefix_is_whole(folder: Path, resolve: Resolve) -> None:
    write_safetensors(folder / "model.safetensors", {name.removeprefix("model."): s for name, s in TENSORS.items()})
    assert resolve(folder).tied_embeddings


def test_a_head_that_the_architecture_has_by_default(folder: Path, resolve: Resolve) -> None:
    edit_json(folder / "config.json", tie_word_embeddings="-")
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight"):
        resolve(folder)
    edit_json(folder / "config.json", architectures=["SmolLM3ForCausalLM"])
    resolve(folder)
    write_safetensors(folder / "model.safetensors", {**TENSORS, "lm_head.weight": [VOCAB, HIDDEN]})
    assert resolve(folder).tied_embeddings  # transformers ignores the head, whether it is the same or not


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "phi"])
def test_whole_checkpoints_of_each_architecture(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    import transformers

    config = tiny.config(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    said = json.loads(config.to_json_string(use_diff=False))
    tensors.check(found, type(model).__name__, said, "it")
    assert "nothing uses" not in caplog.text
    name = "lm_head.weight" if not config.tie_word_embeddings else "model.norm.weight"
    with pytest.raises(CheckpointError, match="lack"):
        tensors.check({key: found[key] for key in found if key != name}, type(model).__name__, said, "it")


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("F32", np.array([np.nan], "<f4")),
        ("F32", np.array([-np.inf], "<f4")),
        ("F16", np.array([np.nan], "<f2")),
        ("BF16", np.array([0x7F80], "<u2")),
        ("BF16", np.array([0xFFC0], "<u2")),
        ("F64", np.array([np.inf], "<f8")),
    ],
)
def test_weights_that_are_not_finite(folder: Path, resolve: Resolve, dtype: str, pattern: np.ndarray[Any, Any]) -> None:
    path = folder / "model.safetensors"
    write_safetensors(path, TENSORS, dtype, pattern.itemsize)
    resolve(folder)
    content = bytearray(path.read_bytes())
    content[-2 * pattern.itemsize : -pattern.itemsize] = pattern.tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"post_attention_layernorm\.weight holds weights that are not finite"):
        resolve(folder)


@pytest.mark.parametrize(
    ("tokenizer", "refused"),
    [
        ({"model": {"type": "BPE", "vocab": {f"t{number}": number for number in range(VOCAB)}}}, True),
        ({"added_tokens": [{"id": VOCAB - 1, "content": "<|tool|>"}]}, True),
        # Gemma 3's text models share the tokenizer with those that read images.
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": VOCAB - 1, "content": "<image_soft_token>"}]}, False),
    ],
)
def test_tokens_beyond_the_embeddings(folder: Path, resolve: Resolve, tokenizer: dict[str, Any], refused: bool) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    resolve(folder)
    path.write_text(json.dumps(tokenizer).replace(f": {VOCAB - 1}", f": {VOCAB}"))
    with pytest.raises(CheckpointError, match=rf"{VOCAB} token embeddings.*id {VOCAB}") if refused else nullcontext():
        resolve(folder)
