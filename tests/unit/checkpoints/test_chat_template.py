"""Chat templates, rendered as transformers does and harmless when hostile; which tokens end an answer, and sampling."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from slmops.checkpoints import generation
from slmops.checkpoints.chat_template import ChatTemplate, load, render
from slmops.core.errors import CheckpointError
from slmops.foundry.prompt_template import derive
from tests.chat_templates import CHATS, STYLES, broken, chat, template, text_of
from tests.checkpoint_folders import edit_json, write_json
from tests.tiny import CHATML


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_renders_what_transformers_renders(style, add_generation_prompt):
    source = template(style)
    for messages in [*CHATS, chat("  blanks \n", "<think>\nx\n</think>\n\ny"), chat("a", " b ", " c ", system=" s ")]:
        options = {"add_generation_prompt": add_generation_prompt, **source.special_tokens}
        try:
            theirs, _ = render_jinja_template([messages], chat_template=source.text, **options)
        except Exception as error:
            with pytest.raises(CheckpointError, match=re.escape(str(error))):
                render(source, messages, add_generation_prompt)
        else:
            assert render(source, messages, add_generation_prompt) == theirs[0]


@pytest.mark.parametrize(
    "text",
    [
        "{{ {'b': '<é>', 'a': [1, none]} | tojson }}{{ [1] | tojson(indent=2) }}",
        "{% set ns = namespace(a=1) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}",
        "{{ dict(a=1) }}{{ dict.fromkeys(['x'], 0) }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
        "  {% if tools is defined %}\n   x\n  {% endif %}\n{{ documents is none }}|{{ bos_token }}|",
        "{% for m in messages %}  {% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
    ],
)
def test_environment_is_that_of_transformers(text):
    source = broken(text)
    try:
        theirs, _ = render_jinja_template([CHATS[1]], chat_template=text)
    except Exception:
        with pytest.raises(CheckpointError):
            render(source, CHATS[1], False)
    else:
        assert render(source, CHATS[1], False) == theirs[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for message in messages %}\n{{ message.content", "fails in line 2"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ bos_token + 'x' }}", "'bos_token' is undefined"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.clear() }}{{ messages }}", "unsafe|safely"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|undefined"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_broken_or_hostile_template_is_a_checkpoint_error(text, message):
    for attempt in (derive, lambda source: render(source, CHATS[0])):
        with pytest.raises(CheckpointError, match=f"(?s)model/chat_template.jinja.*({message}).*--chat-template"):
            attempt(broken(text))


def test_template_may_be_hostile_to_some_conversations_only():
    text = text_of("chatml") + "{% if messages[0].role == 'system' %}{{ ''.__class__ }}{{ x.y.z }}{% endif %}"
    strings = derive(template("chatml")) or {}
    assert derive(broken(text)) == {role: strings[role] for role in ("user", "assistant", "prompt")}


def write(folder: Path, **files: object) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


NAMED = [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]
CONFIG, LEGACY = "tokenizer_config.json", "chat_template.json"


@pytest.mark.parametrize(
    ("jinja", "config", "legacy", "found", "file"),
    [
        ("jinjaé", "config", "json", "jinjaé", "chat_template.jinja"),
        (None, "x", "json", "x", CONFIG),
        (None, NAMED, None, "x", CONFIG),
        (None, None, "x", "x", LEGACY),
        (None, None, None, None, None),
        (None, [{"name": "rag"}], None, None, None),
    ],
)
def test_load_finds_the_template(tmp_path, jinja, config, legacy, found, file):
    write(tmp_path, tokenizer_config={"chat_template": config}, chat_template={"chat_template": legacy})
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    assert load(tmp_path) == (found and ChatTemplate(path=tmp_path / file, text=found))


def test_load_reads_tokens_in_all_their_forms(tmp_path):
    write(
        tmp_path,
        tokenizer_config={"chat_template": "x", "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None},
        special_tokens_map={"bos_token": "no", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
    )
    loaded = load(tmp_path)
    assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_load_of_unreadable_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        load(tmp_path)
    write(tmp_path, tokenizer_config={})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load(tmp_path)


# --- which tokens end an answer, and what of the sampling settings can be kept

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
    with pytest.raises(CheckpointError, match=rf"(?s)org/model.*{re.escape(told)}"):
        generation.stop_tokens(folder, "org/model")


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
