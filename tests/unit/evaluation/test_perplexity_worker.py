"""Perplexity of made-up models whose answer is known, without ONNX Runtime."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from slmops.errors import EvaluationError
from slmops.evaluation import perplexity_worker as worker

VOCABULARY = 8
Score = Callable[[Any], Any]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., worker.Result]:
    """Score ``count`` words with a function from token ids to logits."""

    def run(logits: Score, count: int, tokens: int = 10_000) -> worker.Result:
        backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.enable_truncation(4)  # some tokenizer files ask for it; a text must be scored whole
        backend.save(str(tmp_path / "tokenizer.json"))
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"w{n % VOCABULARY}" for n in range(count)), encoding="utf-8")
        fake = SimpleNamespace(OnnxModel=lambda _folder: SimpleNamespace(logits=logits))
        monkeypatch.setitem(sys.modules, "slmops.logits", fake)
        return worker.handle(worker.Request(folder=tmp_path, text=text, tokens=tokens))

    return run


def uniform(ids: Any) -> Any:
    return np.full((len(ids), VOCABULARY), 3.0, np.float32)


def knows_the_next(ids: Any) -> Any:
    """Each word is followed by the next one, with 6 nats over all others."""
    return np.eye(VOCABULARY, dtype=np.float32)[(ids + 1) % VOCABULARY] * 6


def test_uniform_guess_has_the_vocabulary_as_perplexity(score: Callable[..., worker.Result]) -> None:
    found = score(uniform, 100)
    assert math.exp(found.nll) == pytest.approx(VOCABULARY)
    assert found.tokens == 99  # the first has no context


def test_each_token_is_scored_by_what_was_said_before_it(score: Callable[..., worker.Result]) -> None:
    expected = -math.log(math.exp(6) / (math.exp(6) + VOCABULARY - 1))
    assert score(knows_the_next, 200).nll == pytest.approx(expected)


def test_first_token_of_each_window_is_not_scored(score: Callable[..., worker.Result]) -> None:
    seen: list[int] = []

    def counting(ids: Any) -> Any:
        seen.append(len(ids))
        return uniform(ids)

    assert score(counting, 2 * worker.WINDOW + 10).tokens == 2 * (worker.WINDOW - 1) + 9
    assert seen == [worker.WINDOW, worker.WINDOW, 10]


def test_last_window_of_one_token_is_left_out(score: Callable[..., worker.Result]) -> None:
    assert score(uniform, worker.WINDOW + 1).tokens == worker.WINDOW - 1


def test_no_more_than_the_tokens_asked_for(score: Callable[..., worker.Result]) -> None:
    assert score(uniform, 500, tokens=100).tokens == 99


@pytest.mark.parametrize("count", [0, 1])
def test_too_short_a_text(score: Callable[..., worker.Result], count: int) -> None:
    with pytest.raises(EvaluationError, match="fewer than two tokens"):
        score(uniform, count)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(score: Callable[..., worker.Result], value: float) -> None:
    with pytest.raises(EvaluationError, match="not finite numbers"):
        score(lambda ids: uniform(ids) * value, 100)


def test_perplexity_too_large_for_a_number(score: Callable[..., worker.Result]) -> None:
    with pytest.raises(EvaluationError, match="all but impossible"):
        score(lambda ids: -2000 * knows_the_next(ids), 100)
