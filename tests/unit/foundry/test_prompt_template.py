"""Deriving a PromptTemplate: what is exact, what is not and why, each proven by rendering."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from slmops.checkpoints.chat_template import ChatTemplate
from slmops.foundry.prompt_template import derive, fill
from tests.chat_templates import CHATS, TOKENS, WITH_SYSTEM, WITHOUT_SYSTEM, body, broken, proves, template, text_of


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
BLANKS = "contents with outer blanks"
THINK = "contents with <think> blocks"
ON_ITS_OWN = "does not write each of their messages on its own"
SEVERAL_TURNS = "Conversations of several turns without a system message differ"


@pytest.mark.parametrize(
    ("style", "strings", "exact", "named", "right"),
    [
        ("chatml", IM, True, None, CHATS),
        ("phi3", PHI, True, None, CHATS),
        ("smollm3-answers", IM, True, None, CHATS),
        ("llama3", HEADERS, True, [BLANKS], CHATS),
        ("llama3-first", None, True, [], CHATS),  # always writes the header of an answer
        ("qwen3", IM, True, [THINK], CHATS),
        ("smollm2", IM, False, ["Conversations without a system message", "named SmolLM"], WITH_SYSTEM),
        ("qwen2.5", IM, False, ["Conversations without a system message", "You are Qwen"], WITH_SYSTEM),
        ("gemma2", TURNS, True, ["refuses conversations with a system message", BLANKS], WITHOUT_SYSTEM),
        ("gemma3", TURNS, False, ["Conversations with a system message", ON_ITS_OWN], WITHOUT_SYSTEM),
        ("mistral", INST, False, ["Conversations with a system message", ON_ITS_OWN], WITHOUT_SYSTEM),
        ("llama2", None, True, [], WITHOUT_SYSTEM),
        ("alpaca", None, False, [SEVERAL_TURNS], WITHOUT_SYSTEM[:1]),
        ("numbered", None, False, [SEVERAL_TURNS, "### 3 user"], WITHOUT_SYSTEM[:1]),
        # The date stands in the default system message only.
        ("granite", None, False, ["starts them with", str(datetime.now().year)], WITH_SYSTEM),
    ],
)
def test_published_templates(
    style: str, strings: dict[str, str] | None, exact: bool, named: list[str] | None, right: list[list[dict[str, str]]]
) -> None:
    derived = derive(template(style))
    assert derived.exact == exact
    assert strings is None or derived.prompt_template == strings
    assert named is not None or derived.reason is None
    assert all(words in (derived.reason or "") for words in named or ())
    assert proves(style, derived.prompt_template, right)


def test_default_system_message_is_what_is_missing() -> None:
    start = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert json.dumps(start) in (derive(template("smollm2")).reason or "")
    for messages in WITHOUT_SYSTEM:
        assert body("smollm2", messages) == start + (fill(IM, messages) or "")


def test_bos_before_each_question_belongs_to_the_strings() -> None:
    assert (derive(template("llama2")).prompt_template or {})["prompt"] == "<s>[INST] {Content} [/INST]"


def test_only_the_last_question_is_written() -> None:
    derived = derive(broken("### {{ messages[-1].content }}\n>"))
    assert (derived.prompt_template, derived.exact) == ({"prompt": "### {Content}\n>"}, False)
    assert "with a system message or several turns" in (derived.reason or "")
    assert fill({"prompt": "{Content}"}, WITH_SYSTEM[0]) is None  # a role without a string


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (text_of("dated"), "current date"),
        (text_of("llama3.2"), "current date"),
        ("Hello", "user's message"),
        ("{{ messages[0].content | upper }}", "user's message"),
        ("{{ messages[-1].content * 2 }}", "user's message"),
        ("{% for m in messages %}{{ m.content | replace('?', '!') | e }}\n{% endfor %}", "All conversations differ"),
    ],
)
def test_no_strings_can_be_trusted(text: str, named: str) -> None:
    derived = derive(ChatTemplate(path=Path("t"), text=text, special_tokens=TOKENS["llama3"]))
    assert (derived.prompt_template, derived.exact) == (None, False)
    assert named in (derived.reason or "")
