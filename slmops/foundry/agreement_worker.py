"""Child process: do Foundry Local's tokenizer and Jinja give what transformers' give for a checkpoint?"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from slmops.checkpoints import chat_template
from slmops.checkpoints.chat_template import ChatTemplate
from slmops.checkpoints.reading import read_if_there
from slmops.core.errors import CheckpointError
from slmops.core.values import Agreement, Frozen
from slmops.foundry import rewrite
from slmops.foundry.genai_library import LibraryError, RuntimeTokenizer

ALLOWED_SHARE = 0.05
OTHER_TEMPLATE = "Change that part of the template, or give one without it with --chat-template FILE."
_OTHER_TOKENIZER = (
    "Use a checkpoint whose tokenizer is byte-level BPE, as those of Qwen, Llama 3 and SmolLM are, without "
    "a normalizer and without flags on its added tokens."
)
_CODE = 'def area(r):\n    """Of a circle."""\n\tif r <= 0:\n        return 0\n\n\n    return 3.14 * r**2\n'
_TEXTS = """\
What is the capital of France?
It's 12,345.67 dollars (or 8 000 kr) on 2026-11-26; isn't it? We'll see...
Åsa åker till Örebro på fredag.
東京の天気はどうですか。明日は雨です。
我想知道今天的天气怎么样？
ما هي عاصمة فرنسا؟
מהי בירת צרפת?
भारत की राजधानी क्या है?
한국의 수도는 어디입니까?
Какая столица у России?
Ποια είναι η πρωτεύουσα;
Wie heißt die Straße? Où est le café naïf?
I ♥ it 🙂 👍
{'a': [1, 2], "b": null} <b>x & y</b> $x = \\frac{1}{2}$ `ls -la /tmp` # title
UPPER lower Title camelCase snake_case kebab-case""".splitlines()
_BLANKS = ("", " ", "  ", "\n", "\n\n\n", "\t\t", "a\r\nb", "a\u00a0b", "\u3000a", "a\u200bb", "\ufeffa", "a\u2028b")
_ODD = ("👨‍👩‍👧‍👦🇸🇪", "ﬁ½ⅧＡＢＣ", "e\u0301 a\u030a", "ไทย ภาษา", "𝔘𝔫𝔦", "!?!?!?...,,,;;;", "0123456789" * 3, "a" * 25)
_RARE = (*_BLANKS, *_ODD)
_TOOL = {
    "name": "weather",
    "description": 'The weather <in> a "place" in °C',
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
_Conversation = list[dict[str, Any]]
_Rendered = tuple[_Conversation, list[Any] | None]  # with tools, or without


class AgreementRequest(Frozen):
    folder: Path
    template: str | None
    trust_remote_code: bool
    work: Path


def handle(request: AgreementRequest) -> Agreement:
    """Compare them on many texts and conversations; a CheckpointError if they differ where it matters."""
    if not request.trust_remote_code:
        sys.modules["torch"] = None  # type: ignore[assignment]  # no tokenizer needs it, and it takes two seconds
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(request.folder, trust_remote_code=request.trust_remote_code)
    except Exception as error:  # whatever the tokenizer's class raises
        fix = "Save it again: tokenizer.save_pretrained(folder)."
        raise CheckpointError(f"transformers cannot load the tokenizer: {error}", fix) from error
    tokenizer.chat_template = request.template or tokenizer.chat_template
    tokenizer.save_pretrained(request.work)  # as the exporter does, which may write other files than there are
    said, config = (read_if_there(request.work, name) for name in ("tokenizer.json", "tokenizer_config.json"))
    files = rewrite.rewrite_tokenizer(said, config)
    for name, text in files.items():
        (request.work / name).write_text(text, encoding="utf-8", newline="")
    template = chat_template.load(request.work)
    if template is None:
        raise CheckpointError("The tokenizer has no chat template.", "Give one with --chat-template FILE.")
    runtime = _load(request.work, said.get("model", {}).get("type", "BPE"))
    if files:
        files["chat_template.jinja"] = template.text  # the folder's own may be in its tokenizer_config.json
    print("the runtime reads texts")
    _check_conversations(runtime, tokenizer, template)
    texts = list(dict.fromkeys(_texts(tokenizer)))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    mismatches = [found for text in texts if (found := _mismatch(runtime, tokenizer, template, special, text))]
    if len(mismatches) > ALLOWED_SHARE * len(texts):
        raise CheckpointError(
            f"Foundry Local's runtime reads or writes {len(mismatches)} of {len(texts)} texts otherwise than the "
            f"checkpoint, such as {'; '.join(mismatches[:2])}.",
            _OTHER_TOKENIZER,
        )
    print("the runtime renders the chat template")
    rewritten, why, left = _compare_templates(runtime, template)
    return Agreement(
        template=rewritten, why=why, files=files, tokenizer_mismatches=mismatches, template_mismatches=left
    )


def _load(folder: Path, kind: str) -> RuntimeTokenizer:
    if kind != "BPE":
        said = f"The tokenizer is a {kind} model, and Foundry Local's runtime reads BPE only."
        raise CheckpointError(said, _OTHER_TOKENIZER)
    print("the runtime loads the tokenizer")
    try:
        return RuntimeTokenizer(folder)
    except LibraryError as error:
        said = f"Foundry Local's runtime cannot load the tokenizer: {_line(error)}"
        raise CheckpointError(said, _OTHER_TOKENIZER) from None


def _check_conversations(runtime: RuntimeTokenizer, tokenizer: Any, template: ChatTemplate) -> None:
    for messages in _ordinary():
        try:
            text = chat_template.render(template, messages)
        except CheckpointError:  # the template refuses it
            continue
        if runtime.encode(text) != tokenizer.encode(text, add_special_tokens=False):
            said = "Foundry Local's runtime reads an ordinary conversation as other tokens than the checkpoint does"
            raise CheckpointError(f"{said}: {text!r}", _OTHER_TOKENIZER)


def _mismatch(
    runtime: RuntimeTokenizer, tokenizer: Any, template: ChatTemplate, special: set[int], text: str
) -> str | None:
    """How a text has other ids as a question, or another text comes from its own ids; None: all is well."""
    asked = text
    with suppress(CheckpointError):
        asked = chat_template.render(template, _said(text))
    if runtime.encode(asked) != tokenizer.encode(asked, add_special_tokens=False):
        return f"{text!r} read as other tokens"
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not special.isdisjoint(ids):
        return None  # no answer shows them
    # What becomes of an answer's first blanks depends on what stands before it.
    wanted = tokenizer.decode(ids, clean_up_tokenization_spaces=False).lstrip(" ")
    wrong = next((each for each in (runtime.decode(ids), runtime.stream(ids)) if each.lstrip(" ") != wanted), None)
    return wrong and f"{text!r} written as {wrong!r}"


def _texts(tokenizer: Any) -> Iterator[str]:
    for text in [*_TEXTS, _CODE]:
        yield from (text, f" {text}", f"{text}\n", f"{text.upper()}  ", unicodedata.normalize("NFC", f"\n\n{text}"))
    yield from _RARE
    added = [token for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    flagged = [str(token) for token in added if token.lstrip or token.rstrip or token.single_word or token.normalized]
    named = [token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)]
    for token in dict.fromkeys([*flagged[:10], *named, *map(str, added[:10])]):
        yield from (token, f"a {token} b", f"a{token}b", f"{token}{token}\n")


def _compare_templates(runtime: RuntimeTokenizer, template: ChatTemplate) -> tuple[str | None, str | None, list[str]]:
    """The rewritten template if it is needed, what was wrong with its own, and what is still wrong."""
    if "recursive" in rewrite.names(template.text):
        said = "The chat template has a recursive loop, which kills Foundry Local's runtime."
        raise CheckpointError(said, OTHER_TEMPLATE)
    needed, rare = _conversations(template)

    def differences(deployed: ChatTemplate, conversations: list[_Rendered]) -> list[str]:
        return [found for one in conversations if (found := _difference(runtime, template, deployed, *one))]

    wrong, odd = differences(template, needed), differences(template, rare)
    if not wrong and not odd:
        return None, None, []
    rewritten = template.model_copy(update={"text": rewrite.rewrite_template(template)})
    still, left = differences(rewritten, needed), differences(rewritten, rare)
    if wrong and still:
        said = f"Foundry Local's runtime renders the chat template otherwise: {still[0]}"
        raise CheckpointError(said, OTHER_TEMPLATE)
    if wrong or (not still and len(left) < len(odd)):
        return rewritten.text, (wrong or odd)[0], left
    return None, None, odd


def _difference(
    runtime: RuntimeTokenizer,
    template: ChatTemplate,
    deployed: ChatTemplate,
    messages: _Conversation,
    tools: list[Any] | None,
) -> str | None:
    """How ``deployed`` in the runtime, or in transformers, differs from ``template`` in transformers."""
    try:
        wanted = chat_template.render(template, messages, tools=tools)
    except CheckpointError:
        return None  # the template refuses it
    try:
        got = [runtime.render(deployed.text, messages, tools)]
        if deployed != template:
            got.append(chat_template.render(deployed, messages, tools=tools))
    except LibraryError as error:
        return f"{_line(error)} {_tag(deployed.text, str(error))}".strip()
    except CheckpointError as error:
        return error.message
    for text in got:
        if text != wanted:
            at = next((at for at, pair in enumerate(zip(wanted, text, strict=False)) if len(set(pair)) > 1), 0)
            at = at or min(len(wanted), len(text))
            theirs, ours = (json.dumps(each[max(at - 20, 0) : at + 40], ensure_ascii=False) for each in (wanted, text))
            return f"{'with tools ' if tools else ''}it writes {ours} where transformers writes {theirs}"
    return None


def _line(error: LibraryError) -> str:
    """What was wrong, without the place, which is one in the rewritten text, and without the text."""
    return str(error).split("\n")[0].split(" at row ")[0].rstrip(".") + "."


def _tag(text: str, said: str) -> str:
    """The tag that an error is about: the runtime names the innermost row and column first."""
    if (place := re.search(r"at row (\d+), column (\d+)", said)) is None:
        return ""
    lines = text.split("\n")
    row, column = min(int(place[1]), len(lines)), int(place[2])
    before, after = lines[row - 1][:column], lines[row - 1][column:]
    start = max(before.rfind("{{"), before.rfind("{%"), 0)
    return f"In: {(before[start:] + re.split('(?<=[%}]})', after)[0]).strip()[:200]}"


def _said(*contents: str, system: str | None = None) -> _Conversation:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(contents)]


def _ordinary() -> Iterator[_Conversation]:
    """Conversations as people have them."""
    question, answer = "What is the capital of France?", "Paris."
    yield _said(question)
    yield _said(question, system="You are a helpful assistant.")
    yield _said(question, answer, "And of Sweden?")
    yield _said(
        question, answer, "And of Sweden?", "Stockholm.", "Thanks!\n\n- one\n- two", system="Be brief.\nNo jokes."
    )
    for text in [*_TEXTS, _CODE]:
        yield _said(text, f"{text}\n\n{text}", text)
        yield _said(text, system=text)


def _conversations(template: ChatTemplate) -> tuple[list[_Rendered], list[_Rendered]]:
    """Those that have to be equal, and those that are counted if they are not: odd ones, and tools."""
    thought, blanks = "<think>\nhm\n</think>\n\nHello", (" \n a b \n ", "\n\nc ", "  d")
    needed = [*_ordinary(), _said("Hi /no_think", thought, "Bye"), _said(*blanks, system=" e\n")]
    needed += [_said(*[thought] * 5, system=thought), _said("{{ x }} {% y %} {# z #} {}", "%s \\n", "'\"")]
    for text in rewrite.constants(template.text):
        said = (f"{text} and", f"a{text}b {text}", f"or {text}")
        needed += [_said(text), _said(*said), _said(*said, system=f"With {text} in it")]
    rare: list[_Rendered] = [(_said(text, text, text, system=said), None) for text in _RARE for said in (text, None)]
    if "tools" in rewrite.names(template.text):
        tools = [{"type": "function", "function": _TOOL}]
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"place": "Å"}}}
        used = [
            *_said("Is it warm?"),
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": '{"C": 21}'},
        ]
        rare += [(each, tools) for each in (_said("Is it warm?"), _said("Is it?", system="Be brief."), used)]
    return [(each, None) for each in needed], rare
