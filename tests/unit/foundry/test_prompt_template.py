"""Deriving a PromptTemplate: for which conversations it is right, each proven by rendering."""

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
    assert proves(style, derived, right)


def test_default_system_message_is_what_is_missing() -> None:
    start = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    for messages in WITHOUT_SYSTEM:
        assert body("smollm2", messages) == start + (fill(IM, messages) or "")


def test_bos_before_each_question_belongs_to_the_strings() -> None:
    assert (derive(template("llama2")) or {})["prompt"] == "<s>[INST] {Content} [/INST]"


def test_only_the_last_question_is_written() -> None:
    assert derive(broken("### {{ messages[-1].content }}\n>")) == {"prompt": "### {Content}\n>"}
    assert fill({"prompt": "{Content}"}, WITH_SYSTEM[0]) is None  # a role without a string


@pytest.mark.parametrize(
    "text",
    [
        text_of("dated"),
        text_of("llama3.2"),
        "Hello",
        "{{ messages[0].content | upper }}",
        "{{ messages[-1].content * 2 }}",
        "{% for m in messages %}{{ m.content | replace('?', '!') | e }}\n{% endfor %}",
    ],
)
def test_no_strings_can_be_trusted(text: str) -> None:
    assert derive(ChatTemplate(path=Path("t"), text=text, special_tokens=TOKENS["llama3"])) is None
