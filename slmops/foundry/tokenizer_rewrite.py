"""A tokenizer in the words that Foundry Local's runtime reads as transformers does.

Whether the result is the same has to be found out by reading texts.
"""

import json
from typing import Any

_BLANKS = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
}
"""Blanks as Gemma's tokenizer has them, which the runtime reads right."""


def rewrite(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json for the runtime, by name; nothing if they can stay as they are."""
    new, said = _with_plain_blanks(*_without_runs_of_blanks(tokenizer, config))
    if new is tokenizer:
        return {}
    files = {"tokenizer.json": new, "tokenizer_config.json": said}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def _without_runs_of_blanks(tokenizer: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without the added tokens that are runs of "▁", Gemma's blanks.

    The runtime writes an added token as it stands. The vocabulary has the same, which are read and written right.
    """
    vocabulary, added = (tokenizer.get("model") or {}).get("vocab"), tokenizer.get("added_tokens") or []
    runs = {token["content"]: token["id"] for token in added if set(token["content"]) == {"▁"}}
    if not runs or not isinstance(vocabulary, dict) or any(vocabulary.get(run) != runs[run] for run in runs):
        return tokenizer, config
    kept = [token for token in added if token["content"] not in runs]
    decoder = config.get("added_tokens_decoder") or {}
    decoder = {key: token for key, token in decoder.items() if token.get("content") not in runs}
    return {**tokenizer, "added_tokens": kept}, {**config, **({"added_tokens_decoder": decoder} if decoder else {})}


def _with_plain_blanks(tokenizer: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without the blank that Mistral's tokenizer puts before a text, unless the text begins with a special token.

    The runtime puts one behind each special token too. Conversations begin with one, so they need none.
    """
    before = tokenizer.get("pre_tokenizer") or {}
    if (before.get("type"), before.get("prepend_scheme"), before.get("split")) != ("Metaspace", "first", False):
        return tokenizer, config
    # The class of its own would make the same normalizer anew.
    return {**tokenizer, **_BLANKS}, {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
