"""Prompts of a wanted length, counted by made-up counters and by a real tokenizer with a template."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from slmops.core.errors import EvaluationError
from slmops.evaluation import prompts


def words(template: int = 0, each: int = 1) -> Callable[[str], int]:
    """``each`` tokens a word, and those of a template around it all."""
    return lambda text: template + each * len(text.split())


@pytest.mark.parametrize(
    ("tokens", "template", "each", "expected"),
    [
        (50, 10, 1, 40),
        (32, 31, 1, 1),
        (100, 0, 3, 33),  # nearest below
        (20, 0, 6, 3),  # off by just a tenth
        *((16, template, each, None) for template, each in ((16, 1), (20, 1), (0, 7), (0, 17))),  # 14 are too far below
        (4096, 7, 2, 2044),  # much longer than the text it is made of
    ],
)
def test_as_many_words_as_fit(tokens: int, template: int, each: int, expected: int | None) -> None:
    count = words(template, each)
    text = prompts.of_length(tokens, count)
    assert (text and len(text.split())) == expected
    if text is not None:
        assert 0.9 * tokens <= count(text) <= tokens
        assert count(f"{text} word") > tokens


def test_longer_prompts_go_on_where_shorter_ones_end_and_words_are_not_counted_one_by_one() -> None:
    made = [prompts.of_length(tokens, words(template=5)) for tokens in (16, 17, 33, 128, 1024)]
    assert all(str(longer).startswith(f"{shorter} ") for shorter, longer in itertools.pairwise(made))
    calls: list[str] = []
    prompts.of_length(1024, lambda text: calls.append(text) or len(text.split()))
    assert len(calls) < 20


@pytest.mark.parametrize(
    ("wanted", "context", "made"),
    [
        ([32, 128, 512], 2048, [32, 128, 512]),
        ([128, 32, 128, 32], 2048, [32, 128]),
        ([32, 128, 512], 511, [32, 128]),
        ([32, 128, 512], 512, [32, 128, 512]),
        ([16, 20, 21], 2048, [21]),
        *(([32, 64], context, []) for context in (31, 0, -8)),
        *((wanted, context, []) for wanted, context in (([16, 20], 2048), ([16, 64], 31))),
    ],
)
def test_the_lengths_that_there_is_room_for(
    wanted: list[int], context: int, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "counter", lambda _folder: words(template=20))
    if made:
        found = prompts.of_lengths(wanted, context, Path())
        assert {tokens: 20 + len(text.split()) for tokens, text in found.items()} == {tokens: tokens for tokens in made}
        assert list(found) == made
        return
    with pytest.raises(EvaluationError) as raised:
        prompts.of_lengths(wanted, context, Path())
    assert f"length of {', '.join(map(str, wanted))} can" in raised.value.message
    assert f"template alone is 20 tokens, and the context leaves room for {context}." in raised.value.message


def test_lengths_by_a_tokenizer_that_truncates_and_adds_special_tokens(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<a>": 1, "<unk>": 2, "one": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("<s> {{ messages[0]['content'] }} <a>")
    for text in ("", "one", "one two three", "word " * 100):
        assert prompts.counter(tmp_path)(text) == 2 + len(text.split())
    found = prompts.of_lengths([16, 64, 128], 100, tmp_path)
    assert {tokens: len(text.split()) for tokens, text in found.items()} == {16: 14, 64: 62}
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(EvaluationError, match="has no chat template"):
        prompts.of_lengths([32], 2048, tmp_path)
