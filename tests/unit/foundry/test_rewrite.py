"""Chat templates and tokenizers rewritten for the runtime, which tests/integration/test_agreement.py asks."""

import json

import pytest

from slmops.checkpoints.chat_template import render
from slmops.core.errors import CheckpointError
from slmops.foundry.rewrite import constants, rewrite_template, rewrite_tokenizer
from tests.chat_templates import CHATS, STYLES, broken, chat, template

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


@pytest.mark.parametrize("style", STYLES)
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
