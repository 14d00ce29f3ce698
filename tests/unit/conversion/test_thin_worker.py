"""Which layers stand for all."""

from typing import Any

import pytest

from slmops.conversion import thin_worker

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 28, "layer_types": [FULL] * 28}, 2),
        ({"num_hidden_layers": 1}, 1),
        ({"num_hidden_layers": 26, "layer_types": [SLIDING, FULL] * 13}, 2),
        ({"num_hidden_layers": 12, "layer_types": ([SLIDING] * 5 + [FULL]) * 2}, 6),
        ({"num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2, "layer_types": [FULL] * 8}, 4),
        ({"num_hidden_layers": 8, "use_sliding_window": True, "max_window_layers": 5}, 6),
        ({"num_hidden_layers": 8, "use_sliding_window": False, "max_window_layers": 5}, 2),
    ],
)
def test_each_kind_of_layer_is_there(config: dict[str, Any], layers: int) -> None:
    assert thin_worker.layers_needed(config) == layers


def test_a_shorter_config() -> None:
    config = {"num_hidden_layers": 3, "layer_types": [FULL, FULL, SLIDING], "eos_token_id": [1, 2, 3], "vocab_size": 9}
    short = {"num_hidden_layers": 2, "layer_types": [FULL, FULL], "eos_token_id": [1, 2, 3], "vocab_size": 9}
    assert thin_worker.cut(config, 2) == short
