"""Prompts with a given number of tokens: the same text for every variant of a checkpoint."""

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from slmops.checkpoints import chat_template
from slmops.core.errors import EvaluationError

_REPORT = (
    "The harbour master writes down each ship that comes in: its name, its flag, its cargo and the hour. "
    "On quiet days the book has one line, on others it has forty, and in the evening the pages go to the archive. "
)


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """A function that gives the token ids of a user's message, including the template."""
    from tokenizers import Tokenizer

    template = chat_template.load(folder)
    if template is None:
        raise EvaluationError(f"{folder} has no chat template.")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()

    def encode(text: str) -> list[int]:
        rendered = chat_template.render(template, [{"role": "user", "content": text}])
        return list(tokenizer.encode(rendered, add_special_tokens=False).ids)

    return encode


def counter(folder: Path) -> Callable[[str], int]:
    """A function that counts the tokens of a user's message, including the template."""
    encode = encoder(folder)
    return lambda text: len(encode(text))


def of_length(tokens: int, count: Callable[[str], int]) -> str | None:
    """A message of ``tokens`` tokens, or as close below as whole words allow; None if that is over a tenth below."""
    words = (_REPORT * (tokens // 30 + 1)).split()
    fits = bisect_right(range(1, len(words) + 1), tokens, key=lambda number: count(" ".join(words[:number])))
    text = " ".join(words[:fits])
    return text if fits and count(text) >= 0.9 * tokens else None


def of_lengths(wanted: list[int], context: int, folder: Path) -> dict[int, str]:
    """Length to message, for the lengths that fit a context of ``context`` tokens; EvaluationError if none does."""
    count = counter(folder)
    made = {tokens: of_length(tokens, count) for tokens in sorted(set(wanted)) if tokens <= context}
    prompts = {tokens: text for tokens, text in made.items() if text is not None}
    if not prompts:
        empty = count("")
        raise EvaluationError(
            f"No prompt length of {', '.join(map(str, wanted))} can be measured: the chat template alone is {empty} "
            f"tokens, and the context leaves room for {context}.",
            "Give --prompt-lengths between the two.",
        )
    return prompts
