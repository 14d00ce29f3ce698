"""Deriving a PromptTemplate: what is exact, what is not and why, each proven by rendering."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from slmops.checkpoints.chat_template import ChatTemplate
from slmops.foundry.prompt_template import derive, fill
from tests.chat_templates import (
    CHATS,
    DATED,
    LLAMA32,
    TOKENS,
    WITH_SYSTEM,
    WITHOUT_SYSTEM,
    body,
    broken,
    proves,
    template,
)

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
