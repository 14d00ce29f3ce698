"""Distributions of made-up models, against what NumPy and SciPy compute in float64; no ONNX Runtime, no torch."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr
from tokenizers import Tokenizer, models, pre_tokenizers

from slmops.core.errors import EvaluationError
from slmops.evaluation import logits_worker as worker

VOCABULARY = 8
Logits = Callable[[Any], Any]
Score = Callable[..., worker.LogitsResult]


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Score ``count`` words with a function from token ids to logits."""

    def run(logits: Logits, count: int, **asked: Any) -> worker.LogitsResult:
        backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.enable_truncation(4)  # some tokenizer files ask for it; a text must be scored whole
        backend.save(str(tmp_path / "tokenizer.json"))
        text = tmp_path / "text.txt"
        text.write_text(" ".join(f"w{n % VOCABULARY}" for n in range(count)), encoding="utf-8")
        fake = SimpleNamespace(OnnxModel=lambda _folder: SimpleNamespace(logits=logits))
        monkeypatch.setitem(sys.modules, "slmops.conversion.logits", fake)
        asked = {"context_length": 2048, "tokens": 10_000, **asked}
        return worker.handle(worker.LogitsRequest(folder=tmp_path, text=text, **asked))

    return run


def uniform(ids: Any) -> Any:
    return np.full((len(ids), VOCABULARY), 3.0, np.float32)


def random_logits(seed: int, rows: int, vocabulary: int, scale: float) -> Any:
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


MOST = worker.WINDOW


@pytest.mark.parametrize(
    ("count", "asked", "windows"),
    [
        *((1300, {"context_length": context}, [MOST, MOST, 276]) for context in (2048, 1300)),
        (1300, {"context_length": 256}, [256] * 5 + [20]),
        (2 * MOST + 10, {}, [MOST, MOST, 10]),
        (MOST + 1, {}, [MOST]),  # a last window of one token is left out
        (500, {"tokens": 100}, [100]),
    ],
)
def test_windows_are_no_longer_than_the_context_and_their_first_token_is_not_scored(
    score: Score, count: int, asked: dict[str, int], windows: list[int]
) -> None:
    seen: list[int] = []

    def logits(ids: Any) -> Any:
        seen.append(len(ids))
        return uniform(ids)

    assert len(score(logits, count, **asked).nll) == sum(windows) - len(windows)
    assert seen == windows


@pytest.mark.parametrize("scale", [1.0, 10.0, 300.0])
def test_equal_distributions_are_no_distance_apart(scale: float) -> None:
    logits = random_logits(4, 64, 5000, scale)
    own, _ = worker._compare(logits, np.zeros(64, int), 0, references={})
    # The same up to a constant, which is the same distribution, rounded otherwise.
    for shifted in (logits, logits + np.float32(17.3)):
        _, found = worker._compare(shifted, np.zeros(64, int), 0, references={"r": own})
        assert all(0 <= kl < 1e-4 for kl in found.distances["r"].kl)
        assert np.mean(found.distances["r"].kl) < 1e-5
        assert all(found.distances["r"].same_top)


@pytest.mark.parametrize(
    ("count", "scale"),
    [
        *((count, 3.0) for count in (2, worker.ROWS, worker.ROWS + 1, worker.ROWS + 2, worker.WINDOW + 1, 1300)),
        *((300, scale) for scale in (0.1, 30.0)),
    ],
)
def test_what_is_left_for_others(score: Score, tmp_path: Path, count: int, scale: float) -> None:
    file = tmp_path / "baseline.f32"

    def seeded(seed: int) -> Logits:
        """Logits that look random and are the same for the same ids."""
        return lambda ids: random_logits(seed + int(ids.sum()), len(ids), VOCABULARY, scale)

    one, two = seeded(1), seeded(2)
    first = score(one, count, write=file)
    ids = np.arange(count) % VOCABULARY
    windows = [ids[start : start + worker.WINDOW] for start in range(0, count, worker.WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    logits = [np.concatenate([model(window)[:-1] for window in windows]) for model in (one, two)]
    p, q = (log_softmax(one.astype(float), axis=1) for one in logits)
    targets = np.concatenate([window[1:] for window in windows])
    written = np.fromfile(file, np.float32).reshape(-1, VOCABULARY)
    assert (written.shape, written.dtype) == ((len(targets), VOCABULARY), np.float32)
    np.testing.assert_allclose(written, p, atol=1e-5 * max(scale, 1))
    assert first.nll == pytest.approx(-p[np.arange(len(targets)), targets], rel=1e-5, abs=1e-5)

    same = score(one, count, references={"baseline": file})
    assert same.nll == first.nll
    assert set(same.distances["baseline"].kl) == {0.0}
    other = score(two, count, references={"baseline": file, "again": file})
    assert other.nll == pytest.approx(-q[np.arange(len(targets)), targets], rel=1e-5, abs=1e-5)
    divergence = rel_entr(np.exp(p), np.exp(q)).sum(axis=1)
    assert other.distances["baseline"].kl == pytest.approx(divergence, rel=1e-4, abs=1e-6)
    assert other.distances["baseline"].same_top == tuple(p.argmax(axis=1) == q.argmax(axis=1))
    assert other.distances["again"] == other.distances["baseline"]
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "text.txt", "baseline.f32"}


def test_too_short_a_text_and_another_vocabulary(score: Score, tmp_path: Path) -> None:
    for count in (0, 1):
        with pytest.raises(EvaluationError, match="fewer than two tokens"):
            score(uniform, count)
    np.zeros((99, VOCABULARY + 1), np.float32).tofile(tmp_path / "hf.f32")
    with pytest.raises(EvaluationError, match=r"vocabulary has 8 tokens, and that of hugging_face 9"):
        score(uniform, 100, references={"hugging_face": tmp_path / "hf.f32"})


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("places", [..., (70, 3), ([0, 98], [0, 1])], ids=["all", "one", "two"])
def test_logits_that_are_no_numbers(score: Score, tmp_path: Path, value: float, places: Any) -> None:
    def broken(ids: Any) -> Any:
        made = uniform(ids)
        made[places] = value
        return made

    reference = tmp_path / "reference.f32"
    score(uniform, 100, write=reference)
    with pytest.raises(EvaluationError, match="not finite numbers"):
        score(broken, 100, references={"r": reference}, write=tmp_path / "baseline.f32")
    with pytest.raises(EvaluationError, match="all but impossible"):
        score(lambda ids: np.eye(VOCABULARY, dtype=np.float32)[ids] * 9000, 100, write=tmp_path / "baseline.f32")
    assert not list(tmp_path.glob("baseline*"))  # nobody is compared with half of it
