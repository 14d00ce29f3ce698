"""Chat templates as PromptTemplates, and rewritten for the runtime, as tokenizers are: each proven by rendering."""

import json
from pathlib import Path

import pytest

from slmops.checkpoints.chat_template import ChatTemplate, render
from slmops.core.errors import CheckpointError
from slmops.foundry.prompt_template import derive, fill
from slmops.foundry.rewrite import constants, rewrite_template, rewrite_tokenizer
from tests import chat_templates
from tests.chat_templates import CHATS, WITH_SYSTEM, WITHOUT_SYSTEM, broken, chat, template


def strings_of(before: str, after: str) -> dict[str, str]:
    made = {role: before.format(role) + "{Content}" + after for role in ("system", "user", "assistant")}
    return {**made, "prompt": made["user"] + before.format("assistant")}


IM = strings_of("<|im_start|>{}\n", "<|im_end|>\n")
HEADERS = strings_of("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>")
PHI = strings_of("<|{}|>\n", "<|end|>\n")
TURNS = {
    "user": "<start_of_turn>user\n{Content}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{Content}<end_of_turn>\n",
    "prompt": "<start_of_turn>user\n{Content}<end_of_turn>\n<start_of_turn>model\n",
}
INST = {"user": " [INST] {Content} [/INST]", "assistant": " {Content}</s>", "prompt": " [INST] {Content} [/INST]"}


@pytest.mark.parametrize(
    ("style", "strings", "right"),
    [
        ("chatml", IM, CHATS),
        ("phi3", PHI, CHATS),
        ("smollm3-answers", IM, CHATS),
        ("llama3", HEADERS, CHATS),
        ("llama3-first", None, CHATS),  # always writes the header of an answer
        ("qwen3", IM, CHATS),
        ("smollm2", IM, WITH_SYSTEM),
        ("qwen2.5", IM, WITH_SYSTEM),
        ("gemma2", TURNS, WITHOUT_SYSTEM),
        ("gemma3", TURNS, WITHOUT_SYSTEM),
        ("mistral", INST, WITHOUT_SYSTEM),
        ("llama2", None, WITHOUT_SYSTEM),
        ("alpaca", None, WITHOUT_SYSTEM[:1]),
        ("numbered", None, WITHOUT_SYSTEM[:1]),
        # The date stands in the default system message only.
        ("granite", None, WITH_SYSTEM),
    ],
)
def test_published_templates(style: str, strings: dict[str, str] | None, right: list[list[dict[str, str]]]) -> None:
    derived = derive(template(style))
    assert strings is None or derived == strings
    assert chat_templates.proves(style, derived, right)


def test_default_system_message_is_what_is_missing() -> None:
    start = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for messages in WITHOUT_SYSTEM:
        assert chat_templates.body("smollm2", messages) == start + (fill(IM, messages) or "")


def test_bos_before_each_question_belongs_to_the_strings() -> None:
    assert (derive(template("llama2")) or {})["prompt"] == "<s>[INST] {Content} [/INST]"


def test_only_the_last_question_is_written() -> None:
    assert derive(broken("### {{ messages[-1].content }}\n>")) == {"prompt": "### {Content}\n>"}
    assert fill({"prompt": "{Content}"}, WITH_SYSTEM[0]) is None  # a role without a string


@pytest.mark.parametrize(
    "text",
    [
        chat_templates.text_of("dated"),
        chat_templates.text_of("llama3.2"),
        "Hello",
        "{{ messages[0].content | upper }}",
        "{{ messages[-1].content * 2 }}",
        "{% for m in messages %}{{ m.content | replace('?', '!') | e }}\n{% endfor %}",
    ],
)
def test_no_strings_can_be_trusted(text: str) -> None:
    assert derive(ChatTemplate(path=Path("t"), text=text, special_tokens=chat_templates.TOKENS["llama3"])) is None


# --- rewritten for the runtime

THOUGHTS = [chat("a", "<think>\nhm\n</think>\n\nb", "c"), chat("/no_think", " b ", "\nc", system=" s ")]
PIECES = {
    "blanks": "  \n{% for m in messages %}\n    {% if true %}\n <s> {{ m.content }} \n  {% endif %}\n{% endfor %}\n\n",
    "marks": "{%- for m in messages -%}\n a {{- m.content -}} b \n{%+ endfor %} \n {#- c -#} \n x \n",
    "raw": "{% raw %} {{ x }} {% endraw %}\n{{ 'q' }}\n",
    "quotes": '{{ "it\'s" + \'\\u00e9\\x41\\\\n\\t\' + "a\nb" }}',
    "in": "{% for m in messages %}{{ 'b' in m.content }}{{ 'x' not in m.content|trim and not ('a') in m['content'] }}"
    "{% if 'content' in m and m.role in ['user', 'x'] or 'a' in m.content.split('\\n')[0] %}y{% endif %}{% endfor %}",
    "in nothing": "{{ 'x' in nowhere }}{{ 'x' in none if none else 'no' }}{{ '' in 'a' }}{{ 'a' in ('a', 'b') }}",
    "replace": "{% for m in messages %}{{ m.content.replace('e', \"'\").replace( 'a' , '' ).strip() }}"
    "{{ 'a' | replace('a','b') }}{{ m['content'].split('o')[0].replace('n', 'm', 1) }}"
    "{% if 'x' in m.role.replace('e', 'x') %}!{% endif %}{% endfor %}",
    "first": "{% set m = messages | first %}{{ (messages|last).role }}{{ m.content|trim|first }}"
    "{{ messages[-1:][0].role }}{{ namespace(a = 'b' in m.content).a }}"
    "{{ messages[::-1]|length - 1 }}{{ {'a': ['b', -1]}.a[1] }}",
    "tools": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ tools }}",
}


@pytest.mark.parametrize("style", chat_templates.STYLES)
def test_published_templates_render_as_before(style: str) -> None:
    own = template(style)
    new = own.model_copy(update={"text": rewrite_template(own)})
    for messages in [*CHATS, *THOUGHTS]:
        for prompt in (True, False):
            try:
                wanted = render(own, messages, prompt)
            except CheckpointError:
                with pytest.raises(CheckpointError):
                    render(new, messages, prompt)
            else:
                assert render(new, messages, prompt) == wanted


@pytest.mark.parametrize("name", PIECES)
def test_pieces_render_as_before(name: str) -> None:
    own = broken(PIECES[name])
    new = broken(rewrite_template(own))
    for messages in [*CHATS, *THOUGHTS]:
        assert render(new, messages) == render(own, messages)


IN_X = "{{ ('<' in x.y[0]|trim if x.y[0]|trim is not string else (x.y[0]|trim).split('<')|length > 1) }}"
IN_LOOP = "{% for a in b if ('k' not in a if a is not string else (a).split('k')|length == 1) %}{% endfor %}"
DEFINED = "{% if pad_token is not defined %}{% set pad_token = '<p>' %}{% endif %}{{ pad_token }}"
ONLY_LOOKS_SO = "{{ 'a' ~ 'b' in x }}{{ 'a' in x ~ y }}{{ 'a' in [x] }}"


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("a{% if x %}\n b{% endif %}", "a{% if x %}{{ ' b' }}{% endif %}"),
        ("{{- x -}}\n y", "{{ x }}y"),
        ("{# c #}\n{{ pad_token }}", DEFINED),
        ("{{ '<' in x.y[0]|trim }}", IN_X),
        ("{% for a in b if 'k' not in a %}{% endfor %}", IN_LOOP),
        (ONLY_LOOKS_SO, ONLY_LOOKS_SO),
    ],
)
def test_what_is_written(text: str, rewritten: str) -> None:
    assert rewrite_template(broken(text).model_copy(update={"special_tokens": {"pad_token": "<p>"}})) == rewritten


def test_constants_are_what_to_try_in_conversations() -> None:
    assert constants("{% if 'a\\n' in x or x == \"b\" %}{{ 'a\\n' + '' }}{% endif %} c") == ["a\n", "b"]


@pytest.mark.parametrize(("number", "removed"), [(1, True), (2, False)])
def test_gemmas_runs_of_blanks_are_left_to_the_vocabulary(number: int, *, removed: bool) -> None:
    added = [{"id": 0, "content": "<end>"}, {"id": number, "content": "▁▁"}]
    tokenizer = {"model": {"type": "BPE", "vocab": {"<end>": 0, "▁▁": 1}}, "added_tokens": added}
    files = rewrite_tokenizer(tokenizer, {"eos_token": "<end>"})
    assert bool(files) == removed
    if removed:
        assert json.loads(files["tokenizer.json"]) == {**tokenizer, "added_tokens": added[:1]}
        assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "<end>"}


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_blank_before_the_text(scheme: str) -> None:
    before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    tokenizer = {"model": {"type": "BPE", "vocab": {}}, "normalizer": None, "pre_tokenizer": before}
    files = rewrite_tokenizer(tokenizer, {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    assert bool(files) == (scheme == "first")
    if files:
        new, config = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json"))
        assert (new["normalizer"]["content"], new["pre_tokenizer"]["type"]) == ("▁", "Split")
        assert config == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
