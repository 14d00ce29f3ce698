"""Foundry Local's SDK. For child processes only: it has one manager per process, and never gives memory back."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import foundry_local_sdk as sdk
from foundry_local_sdk.exception import FoundryLocalException

from slmops.core.errors import EvaluationError
from slmops.core.targets import CPU, TARGETS, of_model
from slmops.foundry import layout

Fault = FoundryLocalException
ABILITIES = {"tools": "supports_tool_calling", "reasoning": "supports_reasoning"}

# Nobody listens there, which the runtime takes for an empty catalog. The public one would cost seconds of retries
# without a network, and nothing here comes from it.
NO_CATALOG = "http://127.0.0.1:9/asset-gallery/v1.0/models"


@dataclass(frozen=True)
class TimedReply:
    """One answered request; tokens are as the runtime counts them, and seconds begin with the request."""

    text: str  # without thoughts
    reasoning: str  # the thoughts, if the variant's are known from the rest
    tool_calls: tuple[dict[str, str], ...]  # each with name and arguments, which are JSON if the model wrote JSON
    finish_reason: str  # "stop" (the model ended), "length" (the token limit) or another of the runtime's names
    prompt_tokens: int  # of the rendered conversation
    completion_tokens: int
    first_s: float | None  # to the first non-empty piece of text; None if there was none
    last_s: float  # to the last piece
    total_s: float  # to the end


def manager(
    home: Path, *, models: Path | None = None, logs: Path | None = None, catalog: str = NO_CATALOG, web: Any = None
) -> Any:
    """Start the runtime with its data below ``home``, and with all telemetry off that can be switched off."""
    return sdk.FoundryLocalManager(
        sdk.Configuration(
            app_name="slmops",
            app_data_dir=str(home),
            model_cache_dir=str(models or home / "models"),
            logs_dir=str(logs or home / "logs"),
            catalog_urls=[(catalog, None)],
            disable_nonessential_telemetry=True,
            web=web,
        )
    )


@cache
def started(home: Path) -> Any:
    """Start the runtime, once in a process."""
    return manager(home)


def local_catalog(home: Path, to_load: str | None = None) -> Any:
    """Start the runtime, with the execution provider of a model ``to_load``; return the catalog of our own models."""
    running = started(home)
    missing(running, of_model(to_load or "").provider)  # each process registers it anew; if it is gone, loading says so
    return running.get_catalog(sdk.CatalogType.LOCAL)


def missing(running: Any, provider: str) -> str | None:
    """Why a manager cannot load models for an execution provider, after it was fetched if that is possible; or None."""
    if provider == TARGETS[CPU].provider:
        return None
    known = {one.name: one.is_registered for one in running.discover_eps()}
    if provider not in known:
        return f"Foundry Local finds no device for {provider} here"
    why = ""
    try:
        if known[provider] or running.download_and_register_eps([provider]).success:
            return None
    except Fault as error:  # such as without a network
        why = f": {error}"
    return f"Foundry Local could not get {provider}{why}"


def add(catalog: Any, folder: Path, foundry_id: str, display_name: str) -> Any:
    """Register ``folder``, which stays where it is, unless it is registered already, and return the model."""
    known = catalog.get_model_variant(foundry_id)
    if known is not None and Path(known.get_path()) != folder:
        catalog.unregister_model(foundry_id)  # the folder moved: the same home under another path
        known = None
    if known is None:
        with sdk.ModelInfoBuilder() as metadata:
            metadata.set_string_property("task", "chat-completion")
            metadata.set_string_property("display_name", display_name)
            for ability in layout.claimed(folder):
                metadata.set_int_property(ABILITIES[ability], 1)
            catalog.register_model(folder, foundry_id, metadata)
    return catalog.get_model_variant(foundry_id)


def registered(home: Path, foundry_id: str) -> Any:
    """Start the runtime and return a model of its local catalog; an EvaluationError if it has no such model."""
    if (model := local_catalog(home, foundry_id).get_model_variant(foundry_id)) is None:
        raise EvaluationError(f"{foundry_id} is not registered in Foundry Local at {home}.")
    return model


def ask(
    model: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> TimedReply:
    """Send one conversation in a session of its own, decoded greedily, and time the text as it streams in.

    ``tools`` are in OpenAI's form; a model that begins a call and breaks it off is a Fault. ``chat_template_kwargs``
    are for the chat template, such as ``{"enable_thinking": False}``.
    """
    more = {"chat_template_kwargs": json.dumps(chat_template_kwargs)} if chat_template_kwargs else {}
    search = sdk.SearchOptions(max_output_tokens=max_tokens, temperature=0.0, do_sample=False)
    request = sdk.Request()
    for message in messages:
        request.add_item(getattr(sdk.MessageItem, message["role"])(message["content"]))
    pieces: dict[Any, list[str]] = {sdk.TextItemType.DEFAULT: [], sdk.TextItemType.REASONING: []}
    calls: list[dict[str, str]] = []
    first: float | None = None
    with sdk.ChatSession(model) as session:  # a session left open keeps its model from being unloaded
        session.set_streaming(True)
        session.set_options(sdk.RequestOptions(search=search, additional_options=more))
        for tool in (one["function"] for one in tools):
            session.add_tool_definition(tool["name"], tool["description"], json.dumps(tool["parameters"]))
        started = last = time.perf_counter()
        with session.process_streaming_request(request) as stream:
            for item in stream:
                if isinstance(item, sdk.ToolCallItem):
                    calls.append({"name": item.name, "arguments": item.arguments})
                elif text := item.text:
                    last = time.perf_counter()
                    first = last if first is None else first
                    pieces[item.type].append(text)
            ended = time.perf_counter()
            with stream.final_response as final:
                usage = final.get_usage()
                reason = final.finish_reason.name.lower()
    return TimedReply(
        text="".join(pieces[sdk.TextItemType.DEFAULT]),
        reasoning="".join(pieces[sdk.TextItemType.REASONING]),
        tool_calls=tuple(calls),
        finish_reason=reason,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        first_s=None if first is None else first - started,
        last_s=last - started,
        total_s=ended - started,
    )
