"""Which tokens end an answer, and what of the sampling settings can be kept."""

from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import generation
from slmops.core.errors import CheckpointError
from tests.checkpoint_folders import edit_json, write_json
from tests.tiny import CHATML

TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|end|>": 3, "<|end|>x": 4}
PHI = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}"
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ONE_QUESTION = "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}<|im_end|>"


def say(folder: Path, template: str, config: Any, generation_config: Any, eos: str | None) -> None:
    edit_json(folder / "config.json", eos_token_id=config)
    write_json(folder / "generation_config.json", {"eos_token_id": generation_config})
    added = [{"id": number, "content": text, "special": True} for text, number in TOKENS.items()]
    write_json(folder / "tokenizer.json", {"added_tokens": added})
    write_json(folder / "tokenizer_config.json", {"eos_token": eos})
    (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("template", "config", "generation_config", "eos", "ends"),
    [
        (CHATML, 0, 0, "<|im_end|>", {0, 2}),  # tuned from a base model
        (CHATML, 0, None, "<|endoftext|>", {0, 2}),
        (CHATML, None, None, "<|endoftext|>", {0, 2}),
        (CHATML, 2, [0, 2], "<|im_end|>", {0, 2}),
        (CHATML, "-", None, "<|im_end|>", {2}),
        (PHI, 0, 0, "<|endoftext|>", {0, 3}),  # and not the longer token that begins the same
        (BARE, 0, None, None, {0}),
        (BARE, 300, None, "not a token", {300}),
        (ONE_QUESTION, 0, None, None, {0}),
    ],
)
def test_what_ends_an_answer(
    folder: Path, template: str, config: Any, generation_config: Any, eos: str | None, ends: set[int]
) -> None:
    say(folder, template, config, generation_config, eos)
    texts = {number: text for text, number in TOKENS.items()}
    assert generation.stop_tokens(folder) == {number: texts.get(number, "") for number in sorted(ends)}


def test_tokens_that_only_the_tokenizers_config_tells(folder: Path) -> None:
    say(folder, CHATML, 0, None, None)
    (folder / "tokenizer.json").unlink()
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}})
    assert generation.stop_tokens(folder) == {0: "", 2: "<|im_end|>"}


@pytest.mark.parametrize(("template", "told"), [(CHATML, "<|im_end|>, which is 2"), (BARE, "eos_token_id")])
def test_a_checkpoint_without_any_is_refused(folder: Path, template: str, told: str) -> None:
    say(folder, template, "-", None, None)
    with pytest.raises(CheckpointError) as caught:
        generation.stop_tokens(folder, "org/model")
    assert "org/model" in caught.value.message
    assert told in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, []),
        ({"eos_token_id": 0}, ["<|im_end|> (2)"]),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}, []),
        ({"temperature": 1.0, "top_p": None}, []),
        ({"temperature": 0.6, "top_p": 0.9}, ["temperature, top_p"]),
        ({"min_p": 0.1, "typical_p": 1.0, "no_repeat_ngram_size": 3}, ["no_repeat_ngram_size, min_p", "min_p, no_rep"]),
    ],
)
def test_what_is_said_of_the_settings(folder: Path, content: dict[str, Any], named: list[str]) -> None:
    say(folder, CHATML, 2, None, "<|im_end|>")
    write_json(folder / "generation_config.json", content)
    said = generation.remarks(folder)
    assert len(said) == bool(named)
    assert not named or any(one in said[0] for one in named)
