"""Judging a soak on series with known leaks, which variant is meant, and the command."""

import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmops.core.errors import EvaluationError, UsageError
from slmops.core.values import Measurement
from slmops.evaluation import prompts, soak, statistics
from slmops.evaluation.soak import Soak, SoakError, Target
from tests import values

LIMIT = 10.0
TARGET = Target(model="tiny", variant="int8", foundry_id="tiny-int8-generic-cpu:1")


def series(requests: int, leak: float, noise: float = 50.0, *, step_at: int | None = None) -> list[float]:
    """Memory in KB: a leak per request, noise of neighbours that hang together, spikes, and a step of 5 MB."""
    draw = random.Random(17)
    level, made = 0.0, []
    for number in range(requests):
        level = 0.8 * level + draw.gauss(0, noise)
        spike = 20_000 if draw.random() < 0.02 else 0
        step = 5_000 if step_at is not None and number >= step_at else 0
        made.append(500_000 + leak * number + level + spike + step)
    return made


@pytest.mark.parametrize(
    ("memory_kb", "outcome"),
    [
        *((series(300, leak), "pass") for leak in (0, 2, -5)),
        *((series(requests, leak), "fail") for requests, leak in ((300, 30), (60, 100))),
        *((series(3000, 11, 20), "fail"), (series(3000, 9, 20), "pass")),
        *((series(300, 10), "inconclusive"), (series(30, 0, 2000), "inconclusive")),
        ([500_000.0] * 30, "pass"),
        (series(300, 0, step_at=290), "pass"),  # a step near the end is no slope
    ],
)
def test_the_whole_interval_decides(memory_kb: list[float], outcome: str) -> None:
    result = soak.judge(TARGET, memory_kb, LIMIT)
    slope = result.slope
    assert result.outcome == outcome, slope
    assert slope.low <= slope.value <= slope.high
    assert {"pass": slope.high <= LIMIT, "fail": slope.low > LIMIT}.get(outcome, slope.low <= LIMIT < slope.high)
    assert (slope.unit, slope.samples) == ("KB/request", len(memory_kb))
    if outcome != "inconclusive":
        assert result.more_requests is None


def test_a_slope_is_found_in_its_unit() -> None:
    result = soak.judge(TARGET.model_copy(update={"version": 4}), series(300, 30, 1), LIMIT)
    assert (result.version, result.foundry_id) == (4, TARGET.foundry_id)
    assert result.slope.value == pytest.approx(30, abs=0.5)
    assert (result.memory_start_mb, result.memory_end_mb) == (pytest.approx(500, abs=1), pytest.approx(509, abs=1))
    slopes = {f"soak_slope_kb_per_request{end}" for end in ("", "_low", "_high")}
    assert set(result.metrics) == {*slopes, "soak_requests", "memory_start_mb", "memory_end_mb"}
    assert result.metrics["soak_requests"] == 300


@pytest.mark.parametrize(
    ("slope", "outcome", "said", "fix"),
    [
        ((1, 0, 10), "pass", "by 1.00 KB a request (95 % interval 0.00 to 10.00), which is within the limit", None),
        ((12, 10.1, 14), "fail", "which is above the limit of 10", "soak_memory_mb"),
        # 100 requests, and an interval twice as wide as it may be: it takes four times as many.
        ((5, 0, 15), "inconclusive", "either side of the limit of 10; about 300 more requests", "--requests 400."),
        ((10, 0, 20), "inconclusive", "either side of the limit of 10.", "More requests would hardly settle it"),
        ((1, None, None), "inconclusive", "(no interval)", "hardly"),
    ],
)
def test_what_is_said(
    slope: tuple[Any, ...], outcome: str, said: str, fix: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, low, high = slope
    fit = Measurement(value=value, unit="KB/request", samples=100, low=low, high=high)
    monkeypatch.setattr(statistics, "slope", lambda *_: fit)
    result = soak.judge(TARGET, [0.0] * 100, LIMIT)
    assert result.outcome == outcome
    assert said in result.detail
    assert result.text.startswith(f"{outcome}: int8: over 100 requests the memory grows by ")
    if fix is not None:
        error = SoakError(result)
        assert (error.exit_code, error.result) == (3, result)
        assert fix in (error.fix or "")
    if slope[1] is None:
        assert not {name for name in result.metrics if name.endswith(("_low", "_high"))}


@pytest.mark.parametrize(
    ("chosen", "wanted", "found"),
    [
        *(("int8", None, "int8"), ("int8", "fp32", "fp32"), (None, "fp32", "fp32")),
        *((None, None, "No variant of"), ("int8", "int2", "no variant 'int2'"), ("int8", "int4", "Olive failed")),
    ],
)
def test_which_variant(chosen: str | None, wanted: str | None, found: str) -> None:
    ok = {name: values.result(name, 100) for name in ("fp32", "int8")}
    registered = [one.model_copy(update={"foundry_id": f"tiny-{name}-generic-cpu:1"}) for name, one in ok.items()]
    both = values.comparison(*registered, values.failed("int4", "Olive failed"), chosen=chosen)
    if found in ok:
        assert soak.find(both, wanted) == Target(model="tiny", variant=found, foundry_id=f"tiny-{found}-generic-cpu:1")
        return
    with pytest.raises(UsageError, match=found) as caught:
        soak.find(both, wanted)
    assert "fp32, int8." in (caught.value.fix or "")


@pytest.mark.parametrize("champion", [True, False])
@pytest.mark.parametrize("asked", [{}, {"name": "bot"}, {"variant": "int8"}, {"name": "bot", "variant": "int8"}])
def test_a_champion_is_that_of_a_model_and_of_no_variant(champion: bool, asked: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--champion") if champion and asked.keys() != {"name"} else nullcontext():
        soak.check(Soak(champion=champion, **asked))


def test_requests_that_warm_up() -> None:
    warm_ups = {30: 20, 200: 20, 300: 30, 5000: 500}
    assert {requests: Soak(requests=requests).warm_up for requests in warm_ups} == warm_ups


def test_memory_that_is_kept_is_seen() -> None:
    process = psutil.Process()
    before = soak.private_kb(process)
    kept = b"x" * 50_000_000
    after = soak.private_kb(process)
    assert 45_000 < after - before < 60_000
    del kept
    assert soak.private_kb(process) < after - 40_000
    # Platforms that count otherwise.
    unique = SimpleNamespace(memory_full_info=lambda: SimpleNamespace(rss=9_000_000, uss=5_000_000))
    assert soak.private_kb(unique) == 5000
    swapped = SimpleNamespace(memory_full_info=lambda: SimpleNamespace(rss=9_000_000, shared=2_000_000, swap=500_000))
    assert soak.private_kb(swapped) == 7500


def test_conversations_fit_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "counter", lambda _: lambda text: len(text.split()))
    config = tmp_path / "genai_config.json"
    for context, lengths in ((8192, [32, 64, 128, 256]), (512, [32, 64, 128]), (200, [32])):
        config.write_text(json.dumps({"model": {"context_length": context}}))
        talks = soak.conversations(tmp_path)
        assert [len(talk[0]["content"].split()) for talk in talks[:-1]] == lengths
        assert [message["role"] for message in talks[-1]] == ["user", "assistant", "user", "assistant", "user"]
        assert sum(len(message["content"].split()) for message in talks[-1]) + soak.SOAK_TOKENS <= context
    config.write_text('{"model": {"context_length": 100}}')
    with pytest.raises(EvaluationError, match="No prompt length"):
        soak.conversations(tmp_path)
