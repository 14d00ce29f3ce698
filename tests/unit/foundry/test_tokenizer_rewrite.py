"""What of a tokenizer is written otherwise for the runtime; tests/integration/test_agreement.py asks the runtime."""

import json

import pytest

from slmops.foundry.tokenizer_rewrite import rewrite


@pytest.mark.parametrize(("number", "removed"), [(1, True), (2, False)])
def test_gemmas_runs_of_blanks_are_left_to_the_vocabulary(number: int, *, removed: bool) -> None:
    added = [{"id": 0, "content": "<end>"}, {"id": number, "content": "▁▁"}]
    tokenizer = {"model": {"type": "BPE", "vocab": {"<end>": 0, "▁▁": 1}}, "added_tokens": added}
    files = rewrite(tokenizer, {"eos_token": "<end>"})
    assert bool(files) == removed
    if removed:
        assert json.loads(files["tokenizer.json"]) == {**tokenizer, "added_tokens": added[:1]}
        assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "<end>"}


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_blank_before_the_text(scheme: str) -> None:
    before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = {"model": {"type": "BPE", "vocab": {}}, "normalizer": None, "pre_tokenizer": before}
    files = rewrite(tokenizer, {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    assert bool(files) == (scheme == "first")
    if files:
        new, config = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
        assert (new["normalizer"]["content"], new["pre_tokenizer"]["type"]) == ("▁", "Split")
        assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
