"""At which lengths an export is compared with its checkpoint."""

from typing import Any

import pytest

from slmops.conversion.verify_worker import probes

LONGROPE = {"rope_type": "longrope"}


@pytest.mark.parametrize(
    ("config", "context", "length", "borders"),
    [
        ({}, 8192, 1024, {}),
        ({}, 100, 100, {}),
        ({"sliding_window": 64}, 2048, 1024, {64: 88}),
        ({"sliding_window": 64}, 65, 65, {}),  # nobody gets beyond it
        ({"sliding_window": 1000}, 1010, 1010, {1000: 1010}),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 512}}, 2048, 1024, {}),
        ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}, 2048, 1024, {512: 536}),
        ({"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 4096}}, 131_072, 1024, {4096: 4120}),
        (
            {"sliding_window": 100, "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}},
            *(8192, 1024, {64: 88, 100: 124}),
        ),
        ({"sliding_window": 4096, "vocab_size": 256_000}, 8192, 1024, {}),  # its logits would take 4.3 GB
        ({"sliding_window": 8192, "num_attention_heads": 32}, 16_384, 1024, {}),  # its attention 8.7 GB
        ({"vocab_size": 5_000_000}, 8192, 125, {}),
    ],
)
def test_across_each_border(config: dict[str, Any], context: int, length: int, borders: dict[int, int]) -> None:
    assert probes({"vocab_size": 32_000, **config}, context) == (length, borders)
