"""Checkpoints that are stored in fewer bits: FP8 is dequantized, the rest is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings
from tests import making, tiny
from tests.checkpoint_folders import edit_json

pytestmark = pytest.mark.integration

BLOCK = 32


def in_fp8(folder: Path) -> dict[str, Any]:
    """Store a checkpoint in FP8 by blocks, as Qwen3-FP8 is; returns what its matrices then stand for."""
    import torch
    from safetensors.torch import load_file, save_file

    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            stored[name] = (weight / wide).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = stored[name].float() * wide
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=quantized)
    return meant


@pytest.mark.usefixtures("in_process")
def test_fp8_is_dequantized_once_and_that_is_said(
    tmp_path: Path, fresh: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    folder = tiny.make("qwen3", tmp_path / "small")
    meant = in_fp8(folder)
    with caplog.at_level(logging.WARNING):
        found = making.resolve(Job(model=str(folder)), fresh)
    assert "is stored in FP8" in caplog.text
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())
    weights = load_file(found.path / "model.safetensors")
    assert all(weights[name].equal(weight) for name, weight in meant.items())
    assert (found.path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert making.resolve(Job(model=str(folder)), fresh) == found
    edit_json(
        folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK + 1, BLOCK]}
    )
    with pytest.raises(CheckpointError, match="has no scales for blocks of"):
        making.resolve(Job(model=str(folder)), fresh)
