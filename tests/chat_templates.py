"""Chat templates as published checkpoints carry them, and conversations to render with them."""

from pathlib import Path

from slmops.checkpoints.chat_template import ChatTemplate, render
from slmops.foundry.prompt_template import fill

TOKENS = {
    "im": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "s": {"bos_token": "<s>", "eos_token": "</s>"},
    "phi": {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "none": {"eos_token": "<|im_end|>"},
}
STYLES = {
    **dict.fromkeys(("chatml", "qwen2.5", "qwen3", "smollm3-answers", "numbered", "granite"), "none"),
    "smollm2": "im",
    # The first Llama 3 wrote the header of the answer whether it was asked for or not.
    **dict.fromkeys(("llama3-first", "llama3", "llama3.2"), "llama3"),
    "phi3": "phi",
    **dict.fromkeys(("gemma2", "gemma3"), "gemma"),
    **dict.fromkeys(("mistral", "llama2", "alpaca"), "s"),
}


def text_of(style: str) -> str:
    return Path(__file__).with_name("templates").joinpath(f"{style}.jinja").read_text(encoding="utf-8")


def template(style: str) -> ChatTemplate:
    special_tokens = TOKENS[STYLES[style]]
    return ChatTemplate(path=Path("model/chat_template.jinja"), text=text_of(style), special_tokens=special_tokens)


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
    bos = {"llama3": "<|begin_of_text|>", "gemma": "<bos>", "s": "<s>"}.get(STYLES[style], "")
    text = render(template(style), messages)
    return text if style == "llama2" else text.removeprefix(bos)


def proves(style: str, strings: dict[str, str], chats: list[list[dict[str, str]]]) -> bool:
    return all(fill(strings, messages) == body(style, messages) for messages in chats)
