"""The context that variants are deployed with, and the memory that its key-value cache takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_CACHE = 2 * 2**30
"""Bytes of cache that a deployed variant may take unless the user asks for more."""


def cache_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of cache that a token takes: a key and a value of 4 bytes in each layer, head and dimension.

    ``config`` is the content of config.json; 0 if it does not tell.
    """
    heads = config.get("num_attention_heads") or 0
    head_size = config.get("head_dim") or (config.get("hidden_size") or 0) // (heads or 1)
    return (config.get("num_hidden_layers") or 0) * (config.get("num_key_value_heads") or heads) * head_size * 2 * 4


def context_length(bytes_per_token: int, own: int, asked: int | None) -> int:
    """Tokens of context to deploy: what the user asks for, or the largest power of two that fits :data:`MOST_CACHE`.

    It is never more than the model's ``own``. The runtime allocates the cache for all of it at the first request.

    >>> context_length(bytes_per_token=229_376, own=40_960, asked=None)
    8192
    """
    fitting = 1 << (MOST_CACHE // bytes_per_token).bit_length() - 1 if bytes_per_token else own
    return min(own, asked or fitting)
