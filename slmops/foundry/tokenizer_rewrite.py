"""A tokenizer in the words that Foundry Local's runtime reads as transformers does.

Whether the result is the same has to be found out by reading texts.
"""

import json
from typing import Any

_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_BLANKS = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": _SPLIT,
}
"""Blanks as Gemma's tokenizer has them, which the runtime reads right."""


def rewrite(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, as transformers saves them, for the runtime; nothing if they fit it.

    The runtime writes an added token as it stands, such as Gemma's runs of "▁". The vocabulary has the same, which are
    read and written right. Mistral's puts a blank before a text that does not begin with a special token. The runtime
    puts one behind each special token too, and as conversations begin with one, they need none.
    """
    new, said = dict(tokenizer), dict(config)
    vocabulary, added = (tokenizer.get("model") or {}).get("vocab"), tokenizer.get("added_tokens") or []
    runs = {token["content"]: token["id"] for token in added if set(token["content"]) == {"▁"}}
    if runs and isinstance(vocabulary, dict) and all(vocabulary.get(run) == runs[run] for run in runs):
        new["added_tokens"] = [token for token in added if token["content"] not in runs]
    before = tokenizer.get("pre_tokenizer") or {}
    if (before.get("type"), before.get("prepend_scheme"), before.get("split")) == ("Metaspace", "first", False):
        new |= _BLANKS
        said["tokenizer_class"] = "PreTrainedTokenizerFast"  # its own class would make the same blanks anew
    files = {"tokenizer.json": new, "tokenizer_config.json": said} if new != tokenizer else {}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
