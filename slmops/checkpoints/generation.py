"""How a checkpoint wants its answers generated: the tokens that end them, and its sampling settings."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from slmops.checkpoints import chat_template
from slmops.checkpoints.chat_template import ChatTemplate
from slmops.checkpoints.reading import read_if_there, read_json
from slmops.core.errors import CheckpointError

SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty")
"""What generation_config.json may set and the runtime knows, beside ``do_sample``."""

# What transformers takes for them where nothing is said.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_UNKNOWN_TO_RUNTIME: dict[str, Any] = {
    **dict.fromkeys(("min_p", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "stop_strings")),
    **{"typical_p": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1},
}
_CONTENT = "zqstopjx"  # letters only: trimming leaves them alone


def stop_tokens(folder: Path, where: str | None = None) -> dict[int, str]:
    """The tokens that end an answer, by id: those of both configs, the tokenizer's EOS, and what ends a turn.

    A model that was fine-tuned from a base model often ends its turns with a token that the configs do not name. If
    nothing stops it there, it goes on in the user's place. The text of a token is "" where the tokenizer's files do not
    tell. A CheckpointError, which calls the folder ``where``, if nothing names such a token.
    """
    ends = _named(folder, "generation_config.json") | _named(folder, "config.json")
    known = added_tokens(folder)
    template = chat_template.load(folder, where)
    eos = known.get(template.special_tokens.get("eos_token", "")) if template else None
    turn_end = _turn_end(template, known) if template else None
    if not ends and eos is None:
        example = f" The chat template ends a turn with {turn_end}, which is {known[turn_end]}." if turn_end else ""
        raise CheckpointError(
            f"{where or folder} does not say with which token an answer ends: neither generation_config.json nor "
            "config.json has eos_token_id, and the tokenizer has no eos_token.",
            f"Add eos_token_id, the id of that token, to config.json.{example}",
        )
    ends |= {number for number in (eos, known.get(turn_end or "")) if number is not None}
    texts = {number: text for text, number in known.items()}
    return {number: texts.get(number, "") for number in sorted(ends)}


def settings(folder: Path) -> dict[str, Any]:
    """``do_sample`` and those of :data:`SETTINGS` that ``generation_config.json`` sets."""
    content = read_if_there(folder, "generation_config.json")
    return {key: content[key] for key in ("do_sample", *SETTINGS) if content.get(key) is not None}


def remarks(folder: Path) -> list[str]:
    """What a user should know of how the variants will answer, in sentences."""
    content, found = read_if_there(folder, "generation_config.json"), []
    named = _named(folder, "generation_config.json") or _named(folder, "config.json")
    if added := [f"{text} ({number})" for number, text in stop_tokens(folder).items() if number not in named]:
        found.append(f"Answers also end at {', '.join(added)}, which eos_token_id does not name.")
    if lacking := [key for key, usual in _UNKNOWN_TO_RUNTIME.items() if content.get(key, usual) not in (usual, None)]:
        found.append(f"generation_config.json sets {', '.join(lacking)}, which the runtime does not have.")
    idle = [key for key, usual in _SAMPLING.items() if content.get(key, usual) not in (usual, None)]
    if idle and not content.get("do_sample"):
        found.append(
            f"generation_config.json sets {', '.join(idle)} without do_sample, so the variants answer greedily. "
            "Pass --temperature if they should sample."
        )
    return found


def _named(folder: Path, name: str) -> set[int]:
    ids = read_if_there(folder, name).get("eos_token_id")
    return {one for one in (ids if isinstance(ids, list) else [ids]) if isinstance(one, int)}


def added_tokens(folder: Path) -> dict[str, int]:
    """Id by text of the tokens that are not learnt from text, such as ``<|im_end|>``."""
    decoder = read_if_there(folder, "tokenizer_config.json").get("added_tokens_decoder") or {}
    found = {token["content"]: int(number) for number, token in decoder.items()}
    path = folder / "tokenizer.json"
    return found | (_of_tokenizer(path, path.stat().st_mtime_ns) if path.is_file() else {})


@lru_cache(maxsize=2)  # it can have 30 MB, and is asked for with each variant
def _of_tokenizer(path: Path, _changed: int) -> dict[str, int]:
    return {token["content"]: token["id"] for token in read_json(path, str(path)).get("added_tokens") or ()}


def _turn_end(template: ChatTemplate, known: Mapping[str, int]) -> str | None:
    """The token that the chat template writes after an answer."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _CONTENT}]
    try:
        after = chat_template.render(template, messages, add_generation_prompt=False).partition(_CONTENT)[2].lstrip()
    except CheckpointError:  # it takes single questions only
        return None
    return max((text for text in known if after.startswith(text)), key=len, default=None)
