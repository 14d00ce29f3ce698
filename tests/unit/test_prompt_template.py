import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from slmops.errors import CheckpointError
from slmops.prompt_template import ChatTemplate, derive, fill, load, render

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SMOLLM3_ANSWERS = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {% generation %}
{{ message.content + '<|im_end|>\\n' }}
    {%- endgeneration %}
{% else %}
{{ message.content + '<|im_end|>\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant' }}
{% endif %}"""
# The first Llama 3 wrote the header of the answer whether it was asked for or not.
LLAMA3_FIRST = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLAMA3 = LLAMA3_FIRST.replace("{{ '<|start", "{% if add_generation_prompt %}{{ '<|start") + "{% endif %}"
LLAMA32 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] "
    "+ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ALPACA = (
    "Below is an instruction.\n\n{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n"
    "{{ message['content'] }}\n\n{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}"
    "{{ eos_token }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
NUMBERED = (
    "{% for message in messages %}### {{ loop.index }} {{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### answer\n{% endif %}"
)
DATED = "{% for message in messages %}[{{ strftime_now('%Y-%m-%d') }}] {{ message['content'] }}\n{% endfor %}"
GRANITE = (
    "{% if messages[0]['role'] != 'system' %}<|start_of_role|>system<|end_of_role|>Today's Date: "
    "{{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}{% for message in messages %}<|start_of_role|>"
    "{{ message['role'] }}<|end_of_role|>{{ message['content'] }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

TOKENS = {
    "im": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "s": {"bos_token": "<s>", "eos_token": "</s>"},
    "phi": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "none": {"eos_token": "<|im_end|>"},
}
STYLES = {
    "chatml": (CHATML, "none"),
    "smollm2": (SMOLLM2, "im"),
    "qwen2.5": (QWEN25, "none"),
    "qwen3": (QWEN3, "none"),
    "smollm3-answers": (SMOLLM3_ANSWERS, "none"),
    "llama3-first": (LLAMA3_FIRST, "llama3"),
    "llama3": (LLAMA3, "llama3"),
    "llama3.2": (LLAMA32, "llama3"),
    "phi3": (PHI3, "phi"),
    "gemma2": (GEMMA2, "gemma"),
    "gemma3": (GEMMA3, "gemma"),
    "mistral": (MISTRAL, "s"),
    "llama2": (LLAMA2, "s"),
    "alpaca": (ALPACA, "s"),
    "numbered": (NUMBERED, "none"),
    "granite": (GRANITE, "none"),
}


def template(style: str) -> ChatTemplate:
    text, tokens = STYLES[style]
    return ChatTemplate(path=Path("model/chat_template.jinja"), text=text, special_tokens=TOKENS[tokens])


def broken(text: str) -> ChatTemplate:
    return ChatTemplate(path=Path("model/chat_template.jinja"), text=text)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = enumerate(contents)
    return first + [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in turns]


# Others than the module proves itself with.
CHATS = [
    chat("What is the capital of France?"),
    chat("Hi {name}, {{ x }} {% if %} {# y #}\n\n- a\n- b", "Ünïcode 東京 🙂", "Back\\slash 'q' \"q\" & <tag>"),
    chat("One", "Two", "Three", "Four", "Five", "Six", "Seven"),
    chat("Hello", system="You are a pirate."),
    chat("Hello", "Ahoy", "Bye", system="Two\nlines, {braces}"),
    chat("One", "Two", "Three", "Four", "Five", "Six", "Seven", system="S"),
]
WITHOUT_SYSTEM, WITH_SYSTEM = CHATS[:3], CHATS[3:]


def body(style: str, messages: list[dict[str, str]]) -> str:
    """What the strings have to give: the rendering less the BOS that the tokenizer adds."""
    bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "s": "<s>"}.get(STYLES[style][1], "")
    text = render(template(style), messages)
    return text if style == "llama2" else text.removeprefix(bos)


def proves(style: str, strings: dict[str, str] | None, chats: list[list[dict[str, str]]]) -> bool:
    assert strings is not None
    return all(fill(strings, messages) == body(style, messages) for messages in chats)


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


IM = {role: f"<|im_start|>{role}\n{{Content}}<|im_end|>\n" for role in ("system", "user", "assistant")}
IM["prompt"] = IM["user"] + "<|im_start|>assistant\n"
HEADERS = {
    role: f"<|start_header_id|>{role}<|end_header_id|>\n\n{{Content}}<|eot_id|>"
    for role in ("system", "user", "assistant")
}
HEADERS["prompt"] = HEADERS["user"] + "<|start_header_id|>assistant<|end_header_id|>\n\n"
PHI = {role: f"<|{role}|>\n{{Content}}<|end|>\n" for role in ("system", "user", "assistant")}
PHI["prompt"] = PHI["user"] + "<|assistant|>\n"
TURNS = {
    "user": "<start_of_turn>user\n{Content}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{Content}<end_of_turn>\n",
    "prompt": "<start_of_turn>user\n{Content}<end_of_turn>\n<start_of_turn>model\n",
}
INST = {"user": " [INST] {Content} [/INST]", "assistant": " {Content}</s>", "prompt": " [INST] {Content} [/INST]"}
BLANKS = "The chat template changes contents with outer blanks, PromptTemplate keeps them."
THINK = "The chat template changes contents with <think> blocks, PromptTemplate keeps them."


@pytest.mark.parametrize(
    ("style", "strings", "reason"),
    [
        ("chatml", IM, None),
        ("phi3", PHI, None),
        ("llama3", HEADERS, BLANKS),
        ("qwen3", IM, THINK),
        ("smollm3-answers", IM, None),
    ],
)
def test_exact_templates(style, strings, reason):
    derived = derive(template(style))
    assert (derived.prompt_template, derived.exact, derived.reason) == (strings, True, reason)
    assert proves(style, derived.prompt_template, CHATS)


def test_answer_header_that_is_always_written_is_exact_too():
    derived = derive(template("llama3-first"))
    assert derived.exact
    assert proves("llama3-first", derived.prompt_template, CHATS)


@pytest.mark.parametrize("style", ["smollm2", "qwen2.5"])
def test_default_system_message_is_named_and_the_rest_is_exact(style):
    derived = derive(template(style))
    assert derived.prompt_template == IM
    assert not derived.exact
    default = {
        "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    }[style]
    start = f"<|im_start|>system\n{default}<|im_end|>\n"
    assert derived.reason == (
        "Conversations without a system message differ, because the chat template starts them with "
        f"{json.dumps(start)}."
    )
    assert proves(style, derived.prompt_template, WITH_SYSTEM)
    for messages in WITHOUT_SYSTEM:
        assert body(style, messages) == start + fill(IM, messages)


def test_refused_system_message_is_exact_and_said():
    derived = derive(template("gemma2"))
    assert derived.prompt_template == TURNS
    assert derived.exact
    assert derived.reason == (
        "The chat template refuses conversations with a system message (System role not supported); "
        "the chat template changes contents with outer blanks, PromptTemplate keeps them."
    )
    assert proves("gemma2", derived.prompt_template, WITHOUT_SYSTEM)


@pytest.mark.parametrize(("style", "strings"), [("gemma3", TURNS), ("mistral", INST)])
def test_folded_system_message_is_not_exact_and_the_rest_is(style, strings):
    derived = derive(template(style))
    assert derived.prompt_template == strings
    assert not derived.exact
    assert derived.reason is not None
    assert derived.reason.startswith(
        "Conversations with a system message cannot be said, because the chat template does not write each of their "
        "messages on its own"
    )
    assert proves(style, derived.prompt_template, WITHOUT_SYSTEM)
    assert fill(strings, WITH_SYSTEM[0]) is None


def test_bos_before_each_question_belongs_to_the_strings():
    derived = derive(template("llama2"))
    assert derived.exact
    assert derived.prompt_template is not None
    assert derived.prompt_template["prompt"] == "<s>[INST] {Content} [/INST]"
    assert proves("llama2", derived.prompt_template, WITHOUT_SYSTEM)


def test_text_before_everything_leaves_single_questions_exact():
    derived = derive(template("alpaca"))
    assert not derived.exact
    assert derived.reason is not None
    assert derived.reason.startswith("Conversations of several turns without a system message differ: the chat")
    assert proves("alpaca", derived.prompt_template, WITHOUT_SYSTEM[:1])


def test_turn_numbers_leave_single_questions_exact():
    derived = derive(template("numbered"))
    assert not derived.exact
    assert derived.reason is not None
    assert derived.reason.startswith("Conversations of several turns without a system message differ: the chat")
    assert "### 3 user" in derived.reason
    assert proves("numbered", derived.prompt_template, WITHOUT_SYSTEM[:1])


@pytest.mark.parametrize("text", [DATED, LLAMA32])
def test_date_in_a_string_leaves_none(text):
    derived = derive(ChatTemplate(path=Path("t"), text=text, special_tokens=TOKENS["llama3"]))
    assert (derived.prompt_template, derived.exact) == (None, False)
    assert derived.reason == "The chat template writes the current date, which fixed strings cannot."


def test_date_in_the_default_system_message_only_keeps_the_strings():
    derived = derive(template("granite"))
    assert not derived.exact
    assert derived.reason is not None
    assert "starts them with" in derived.reason
    assert str(datetime.now().year) in derived.reason
    assert proves("granite", derived.prompt_template, WITH_SYSTEM)


def test_only_the_last_question_is_written():
    derived = derive(broken("### {{ messages[-1].content }}\n>"))
    assert derived.prompt_template == {"prompt": "### {Content}\n>"}
    assert not derived.exact
    assert derived.reason == (
        "Conversations with a system message or several turns cannot be said, because the chat template does not "
        "write each of their messages on its own."
    )


@pytest.mark.parametrize("text", ["Hello", "{{ messages[0].content | upper }}", "{{ messages[-1].content * 2 }}"])
def test_nothing_to_cut_out_gives_no_strings(text):
    derived = derive(broken(text))
    assert (derived.prompt_template, derived.exact) == (None, False)
    assert derived.reason == "The chat template does not write the user's message once and unchanged."


def test_contents_that_are_always_changed_give_no_strings():
    derived = derive(
        broken("{% for m in messages %}{{ m.role }}: {{ m.content | replace('?', '!') | e }}\n{% endfor %}")
    )
    assert (derived.prompt_template, derived.exact) == (None, False)
    assert derived.reason is not None
    assert "All conversations differ: the chat template writes" in derived.reason


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
        with pytest.raises(CheckpointError, match=message) as raised:
            attempt(broken(text))
        assert "model/chat_template.jinja" in raised.value.message
        assert "--chat-template" in (raised.value.fix or "")


def test_template_may_be_hostile_to_some_conversations_only():
    text = CHATML + "{% if messages[0].role == 'system' %}{{ ''.__class__ }}{{ x.y.z }}{% endif %}"
    derived = derive(broken(text))
    assert derived.exact
    assert derived.reason is not None
    assert derived.reason.startswith("The chat template refuses conversations with a system message (")


def write(folder: Path, **files: object) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def test_load_prefers_the_jinja_file(tmp_path):
    write(tmp_path, tokenizer_config={"chat_template": "config"}, chat_template={"chat_template": "json"})
    (tmp_path / "chat_template.jinja").write_text("jinjaé", encoding="utf-8")
    loaded = load(tmp_path)
    assert loaded == ChatTemplate(path=tmp_path / "chat_template.jinja", text="jinjaé")


@pytest.mark.parametrize(
    ("files", "file"),
    [
        ({"tokenizer_config": {"chat_template": "x"}}, "tokenizer_config.json"),
        (
            {
                "tokenizer_config": {
                    "chat_template": [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]
                }
            },
            "tokenizer_config.json",
        ),
        ({"tokenizer_config": {}, "chat_template": {"chat_template": "x"}}, "chat_template.json"),
    ],
)
def test_load_finds_the_template(tmp_path, files, file):
    write(tmp_path, **files)
    loaded = load(tmp_path)
    assert loaded is not None
    assert (loaded.text, loaded.path) == ("x", tmp_path / file)


@pytest.mark.parametrize(
    "files",
    [{}, {"tokenizer_config": {"bos_token": "<s>"}}, {"tokenizer_config": {"chat_template": [{"name": "rag"}]}}],
)
def test_load_without_a_template(tmp_path, files):
    write(tmp_path, **files)
    assert load(tmp_path) is None


def test_load_reads_tokens_in_all_their_forms(tmp_path):
    write(
        tmp_path,
        tokenizer_config={"chat_template": "x", "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None},
        special_tokens_map={"bos_token": "no", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"},
    )
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_load_of_unreadable_files(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not JSON"):
        load(tmp_path)
    write(tmp_path, tokenizer_config={})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("style", ["smollm2", "mistral", "phi3"])
def test_loads_what_a_tokenizer_saves(tmp_path, style):
    source = template(style)
    backend = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=source.text, unk_token="<unk>", **source.special_tokens
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.special_tokens == {"unk_token": "<unk>", **source.special_tokens}
    for messages in WITHOUT_SYSTEM:
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render(loaded, messages) == theirs
