"""At which lengths an export is compared with its checkpoint."""

from typing import Any

import pytest

from slmops.conversion.verify_worker import probe_lengths

LONGROPE = {"rope_type": "longrope"}


@pytest.mark.parametrize(
    ("config", "context", "lengths"),
    [
        ({}, 8192, [256]),
        ({}, 256, [256]),
        ({"sliding_window": 64}, 2048, [128, 256]),
        ({"sliding_window": 64}, 64, [64]),  # nobody can get beyond it
        ({"sliding_window": 1000}, 1010, [256, 1010]),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 512}}, 2048, [256]),
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}, 2048, [256, 576]),
        ({"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096}}, 131_072, [256, 4160]),
        ({"sliding_window": 4096, "vocab_size": 256_000}, 8192, [256]),  # its logits would take 4.3 GB
        ({"sliding_window": 8192, "num_attention_heads": 32}, 16_384, [256]),  # its attention 8.7 GB
        ({"vocab_size": 5_000_000}, 8192, [125]),
    ],
)
def test_beyond_each_border(config: dict[str, Any], context: int, lengths: list[int]) -> None:
    assert probe_lengths({"vocab_size": 32_000, **config}, context) == lengths
