"""The context that variants are deployed with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints.source import MOST_CACHE, cache_bytes, context_length
from slmops.core.values import Checkpoint
from tests.checkpoint_folders import edit_json

QWEN3 = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_1B = {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048}
PHI = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 3072}


@pytest.mark.parametrize(
    ("config", "own", "asked", "deployed"),
    [
        (QWEN3, 40_960, None, 8192),
        (QWEN3, 40_960, 40_960, 40_960),
        (QWEN3, 2048, None, 2048),
        (QWEN3, 2048, 4096, 2048),
        (QWEN3, 40_960, 100, 100),
        (LLAMA_1B, 131_072, None, 32_768),
        (PHI, 131_072, None, 2048),
        ({}, 131_072, None, 131_072),
    ],
)
def test_what_the_cache_allows(config: dict[str, Any], own: int, asked: int | None, deployed: int) -> None:
    tokens = context_length(cache_bytes(config), own, asked)
    assert tokens == deployed
    assert asked or cache_bytes(config) * tokens <= MOST_CACHE


@pytest.mark.parametrize(
    ("config", "deployed"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 256}}, 256),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 255}}, 512),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 400}, 400),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 256}}, 512),
        ({"original_max_position_embeddings": 256}, 512),
        ({"max_position_embeddings": 2**30}, MOST_CACHE // 128),  # two layers, two heads of 4: 128 bytes a token
    ],
)
def test_the_context_ends_where_longrope_changes_or_the_cache_is_full(
    folder: Path, resolve: Callable[..., Checkpoint], config: dict[str, Any], deployed: int
) -> None:
    edit_json(folder / "config.json", **{"max_position_embeddings": 512, **config})
    assert resolve(folder).context_length == deployed
    assert resolve(folder, max_length=300).context_length == 300


def test_longrope_has_the_key_that_the_exporter_reads(folder: Path, resolve: Callable[..., Checkpoint]) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    edit_json(folder / "config.json", rope_parameters=rope)
    found = resolve(folder)
    staged = json.loads((found.path / "config.json").read_text())
    assert staged["rope_parameters"] == {**rope, "type": "longrope"}
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
    edit_json(folder / "config.json", rope_parameters={**rope, "type": "longrope"})
    assert resolve(folder).path == folder
