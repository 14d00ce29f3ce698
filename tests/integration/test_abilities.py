"""Tool calls and thoughts, for real: through the SDK and through the service, of a checkpoint that has both."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from slmops.core.settings import Settings
from slmops.core.values import Variant
from slmops.evaluation import answers_worker, quality
from slmops.evaluation.answers_worker import AnswersRequest
from slmops.evaluation.dataset import Item
from slmops.foundry.layout import claimed
from slmops.foundry.register import register
from tests import fleets, making, tiny
from tests.served import HI, start, stop

pytestmark = pytest.mark.integration

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}


@dataclass(frozen=True)
class Caller:
    folder: Path
    variant: Variant
    home: Settings


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Caller:
    folder = tmp_path_factory.mktemp("caller")
    home = Settings(home=folder / "home")
    model = tiny.caller(folder / "caller")
    return Caller(model, making.variant("fp32", making.job(model), home), home)


def test_through_the_sdk(caller: Caller) -> None:
    asked = {"prompt": "Hi", "max_tokens": 24}
    with_tools = {**asked, "tools": [TOOL], "match": "tool_call"}
    items = (
        Item.model_validate({**with_tools, "expected": CALL}),
        Item.model_validate({**with_tools, "expected": {**CALL, "arguments": {"city": "Rome"}}}),
        Item.model_validate({**with_tools, "expected": CALL, "max_tokens": 2}),  # it ends within the thought
        Item.model_validate({**with_tools, "expected": CALL, "max_tokens": 5}),  # and within the call
        Item.model_validate({**asked, "match": "regex", "expected": "^<tool_call>"}),
        Item.model_validate({**asked, "expected": "x", "chat_template_kwargs": {"enable_thinking": False}}),
    )
    registration = register(caller.variant, "caller", making.job(caller.folder), caller.home)
    assert claimed(registration.path) == {"tools", "reasoning"}
    request = AnswersRequest(folder=caller.home.foundry, foundry_id=registration.foundry_id, items=items)
    answers = quality.in_child(answers_worker.handle, request, "caller", "answers", caller.home).answers
    assert [one.correct for one in answers] == [True, False, False, False, True, False]
    assert json.loads(answers[0].answer) == {"tool_calls": [CALL]}
    assert [one.finish_reason for one in answers] == ["tool_calls"] * 2 + ["length", "invalid_tool_call"] + ["stop"] * 2
    assert [one.completion_tokens for one in answers] == [7, 7, 2, 0, 7, 3]  # with thoughts; the last has none

    # The checkpoint itself says the same, in its own form.
    request = AnswersRequest(folder=caller.variant.checkpoint.path, items=(*items[:2], *items[4:]))
    with pytest.MonkeyPatch.context() as patch:
        making.work_in_process(patch)
        own = quality.in_child(answers_worker.handle, request, "caller", "own", caller.home).answers
    assert [one.answer for one in own] == [answers[number].answer for number in (0, 1, 4, 5)]
    assert [one.correct for one in own] == [True, False, True, False]


@pytest.fixture(scope="module")
def client(caller: Caller, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    installed = fleets.place(caller.variant, caller.folder, tmp_path_factory.mktemp("installed"))
    service = start(installed, tmp_path_factory.mktemp("serving") / "home")
    yield service.client
    stop(service)


def test_through_the_service(client: openai.OpenAI) -> None:
    asked: Any = {"model": "bot", "messages": HI, "tools": [TOOL], "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    [choice] = whole.choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert json.loads(call.function.arguments) == CALL["arguments"]
    assert choice.message.reasoning_content == "hm"
    assert whole.usage.completion_tokens_details.reasoning_tokens == 1

    pieces = [piece.choices[0].delta for piece in client.chat.completions.create(**asked, stream=True)]
    assert [one.reasoning_content for one in pieces if hasattr(one, "reasoning_content")] == ["hm"]
    [streamed] = [call for one in pieces for call in one.tool_calls or ()]
    assert (streamed.index, streamed.function) == (0, streamed.function.model_copy(update=call.function.model_dump()))

    answered = [*HI, choice.message.model_dump(exclude_none=True)]
    answered += [{"role": "tool", "tool_call_id": call.id, "content": "Sun."}]
    again = client.chat.completions.create(**{**asked, "messages": answered})
    assert again.usage.prompt_tokens > whole.usage.prompt_tokens

    named = {"type": "function", "function": {"name": "weather"}}
    for choice_of in ("required", named):
        assert client.chat.completions.create(**asked, tool_choice=choice_of).choices[0].message.tool_calls
    assert client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message.tool_calls
    none = client.chat.completions.create(**asked, tool_choice="none").choices[0].message
    assert (none.tool_calls, none.content[:11]) == (None, "<tool_call>")
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    unthinking = client.chat.completions.create(model="bot", messages=HI, extra_body=off).choices[0].message
    assert not hasattr(unthinking, "reasoning_content")

    responded = client.responses.create(
        model="bot", input="Hi", tools=[{"type": "function", **TOOL["function"]}], max_output_tokens=24
    )
    assert [one.type for one in responded.output] == ["reasoning", "message", "function_call"]


@pytest.mark.parametrize(
    ("wrong", "status", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "undeclared tool"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, 400, "unsupported tool_choice type"),
        ({"tool_choice": "often"}, 400, "invalid tool_choice 'often'; expected 'auto', 'none' or 'required'"),
        ({"tools": None, "tool_choice": "required"}, 400, "requires at least one declared tool"),
        ({"max_tokens": 5}, 422, "The model's tool call is not complete"),
    ],
)
def test_what_the_runtime_does_not_do_is_refused(
    client: openai.OpenAI, wrong: dict[str, Any], status: int, said: str
) -> None:
    asked: Any = {"model": "bot", "messages": HI, "tools": [TOOL], "max_tokens": 24, **wrong}
    with pytest.raises(openai.APIStatusError, match=said) as refused:
        client.chat.completions.create(**{name: value for name, value in asked.items() if value is not None})
    assert refused.value.status_code == status
