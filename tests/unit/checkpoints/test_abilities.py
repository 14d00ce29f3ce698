"""What a checkpoint can do, from templates in the forms of real ones and their tokenizers' added tokens."""

import json
from pathlib import Path

import pytest

from slmops.checkpoints import abilities
from slmops.checkpoints.abilities import Abilities

TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for message in messages %}" + TURN + END
HERMES = (
    '{% if tools %}<|im_start|>system\nCall so: <tool_call>\n{"name": ...}\n</tool_call>\n'
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}{% for message in messages %}"
    + TURN
    + "{% for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}\n<tool_call>\n"
    '{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>{% endfor %}' + END
)
QWEN3 = HERMES.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
R1 = "{% for m in messages %}{% if '</think>' in m.content %}x{% endif %}{% endfor %}<｜Assistant｜><think>\n"
LLAMA31 = (
    "{% if tools is not none %}{{ tools | tojson }}{% endif %}{% for message in messages %}"
    "{% if 'tool_calls' in message %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ message.tool_calls[0].function.name }}", '
    '"parameters": {{ message.tool_calls[0].function.arguments | tojson }}}<|eot_id|>{% else %}'
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for message in messages %}"
    "{% if message.tool_calls is defined %}[TOOL_CALLS] [{% for call in message.tool_calls %}"
    "{{ call.function | tojson }}{% endfor %}]</s>{% else %}[INST] {{ message.content }}[/INST]{% endif %}{% endfor %}"
)
PHI4_MINI = (  # it never writes a call
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}"
    "<|{{ message.role }}|>{{ message.content }}<|tool|>{{ message.tools }}<|/tool|><|end|>{% else %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}{% endfor %}<|assistant|>"
)
TEXT_ARGUMENTS = HERMES.replace("tool_call.arguments | tojson", "'' + tool_call.arguments")
ELSEWHERE = HERMES.replace('\n<tool_call>\n{"name": "', '\nCALL {"name": "')
CALLS, THOUGHTS = ("<tool_call>", "</tool_call>"), ("<think>", "</think>")
NO_CALLS, NO_THOUGHTS = "the variants cannot call any", "Thoughts stay part of the answers"
PHI4_CALLS, LFM2_CALLS = ("<|tool_call|>", "<|/tool_call|>"), ("<|tool_call_start|>", "<|tool_call_end|>")


def derive(folder: Path, template: str, *tokens: str) -> Abilities:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    added = [{"id": number, "content": token, "special": False} for number, token in enumerate(tokens, 10)]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    return abilities.derive(folder)


@pytest.mark.parametrize(
    ("template", "tokens", "tools", "reasoning"),
    [
        (HERMES, CALLS, CALLS, None),
        (QWEN3, (*CALLS, "<tool_response>", "</tool_response>", *THOUGHTS), CALLS, THOUGHTS),
        (R1, ("<｜Assistant｜>", *THOUGHTS), None, THOUGHTS),
        (PHI4_MINI, ("<|tool|>", "<|/tool|>", *PHI4_CALLS), PHI4_CALLS, None),
        (PHI4_MINI, LFM2_CALLS, LFM2_CALLS, None),
        (TEXT_ARGUMENTS, CALLS, CALLS, None),
        (PLAIN + "</think>", ("[THINK]", "[/THINK]"), None, ("[THINK]", "[/THINK]")),
        (PLAIN, CALLS, None, None),  # Qwen2.5's tokenizer below a template that knows no tools
        (PLAIN, (), None, None),
    ],
)
def test_what_is_certain_is_claimed(
    tmp_path: Path, template: str, tokens: tuple[str, ...], tools: tuple[str, str], reasoning: tuple[str, str]
) -> None:
    found = derive(tmp_path, template, *tokens)
    for pair, expected in ((found.tools, tools), (found.reasoning, reasoning)):
        assert (pair and (pair.opening, pair.closing)) == expected
        assert pair is None or pair.ids == tuple(10 + tokens.index(token) for token in expected)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("template", "tokens", "said"),
    [
        (LLAMA31, ("<|eot_id|>", "<|python_tag|>"), NO_CALLS),
        (MISTRAL, ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"), NO_CALLS),
        (HERMES, (), NO_CALLS),  # its marks are several tokens each
        (HERMES, (*CALLS, "<|tool_call|>", "<|/tool_call|>"), NO_CALLS),  # which of them?
        (ELSEWHERE, CALLS, NO_CALLS),
        ("{{ tools }}{{ messages[1].tool_calls.nothing.at_all }}", CALLS, NO_CALLS),
        (R1, (), NO_THOUGHTS),
        (PLAIN, THOUGHTS, NO_THOUGHTS),
    ],
)
def test_what_is_not_certain_is_said_and_not_claimed(
    tmp_path: Path, template: str, tokens: tuple[str, ...], said: str
) -> None:
    found = derive(tmp_path, template, *tokens)
    assert (found.tools, found.reasoning) == (None, None)
    [remark] = found.remarks
    assert said in remark
