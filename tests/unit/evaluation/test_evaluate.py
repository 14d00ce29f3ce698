"""Metrics from raw figures that were made up so that the answers can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slmops.errors import EvaluationError
from slmops.evaluation import evaluate
from slmops.evaluation.chat_worker import Result, Timed
from slmops.models import Evaluation, Measurement
from slmops.process import Finished
from tests.values import variant


def timed(first_s: float, last_s: float, completion: int = 11, prompt_tokens: int = 40, **other: Any) -> Timed:
    values = {"prompt": 0, "repetition": 0, "total_s": last_s + 0.5, **other}
    return Timed(prompt_tokens=prompt_tokens, completion_tokens=completion, first_s=first_s, last_s=last_s, **values)


def chat(*requests: Timed, loaded: tuple[float, float] = (10.0, 11.0)) -> Result:
    return Result(load_s=1.5, loaded_from=loaded[0], loaded_to=loaded[1], cpu_percent=180.0, timed=requests, answers=())


def values(measured: dict[str, Measurement]) -> dict[str, float]:
    return {name: measurement.value for name, measurement in measured.items()}


def test_speed_of_one_request() -> None:
    # 10 gaps in 1 s after the first token: 100 ms each, 10 tokens/s. 40 prompt tokens in 0.2 s: 200 tokens/s.
    found = evaluate._speed(chat(timed(0.2, 1.2)))
    assert values(found) == pytest.approx(
        {
            "load_s": 1.5,
            "decode_tok_s": 10,
            "prefill_tok_s": 200,
            **{f"ttft_ms_p{percent}": 200 for percent in (50, 90, 99)},
            **{f"itl_ms_p{percent}": 100 for percent in (50, 90, 99)},
            **{f"response_s_p{percent}": 1.7 for percent in (50, 90, 99)},
        }
    )
    assert {name: measurement.unit for name, measurement in found.items() if name.endswith("_p50")} == {
        "ttft_ms_p50": "ms",
        "itl_ms_p50": "ms",
        "response_s_p50": "s",
    }
    assert (found["load_s"].unit, found["decode_tok_s"].unit) == ("s", "tokens/s")


def test_speed_takes_percentiles_over_requests() -> None:
    # Gaps of 100, 200 and 400 ms; first tokens after 100, 200 and 300 ms.
    found = evaluate._speed(chat(timed(0.1, 1.1), timed(0.2, 2.2), timed(0.3, 4.3)))
    assert {name: found[name].value for name in ("ttft_ms_p50", "itl_ms_p50", "decode_tok_s")} == pytest.approx(
        {"ttft_ms_p50": 200, "itl_ms_p50": 200, "decode_tok_s": 5}
    )
    assert found["ttft_ms_p90"].value == pytest.approx(280)
    assert found["itl_ms_p99"].value == pytest.approx(396)
    assert found["response_s_p50"].value == pytest.approx(2.7)
    assert {found[name].samples for name in ("ttft_ms_p50", "itl_ms_p90", "response_s_p99", "decode_tok_s")} == {3}


def test_prefill_is_that_of_the_longest_prompt() -> None:
    requests = [timed(0.1, 1.1, prompt_tokens=40), timed(2.0, 3.0, prompt_tokens=500)]
    found = evaluate._speed(chat(*requests, timed(1.0, 2.0, prompt_tokens=500)))
    assert found["prefill_tok_s"].value == pytest.approx((250 + 500) / 2)
    assert found["prefill_tok_s"].samples == 2


def test_requests_with_a_single_token_have_no_gap_but_a_first_token() -> None:
    found = evaluate._speed(chat(timed(0.2, 1.2), timed(0.4, 0.4, completion=1)))
    assert found["itl_ms_p50"].value == pytest.approx(100)
    assert found["itl_ms_p50"].samples == 1
    assert found["ttft_ms_p50"].value == pytest.approx(300)
    assert found["ttft_ms_p50"].samples == 2


@pytest.mark.parametrize(
    "requests",
    [
        [],  # the worker leaves requests without any text out
        [timed(0.2, 0.2, completion=1)],
        [timed(0.2, 0.9, completion=1), timed(0.2, 0.9, completion=0)],
        [timed(0.2, 0.2, completion=5)],  # all in one piece
    ],
)
def test_answers_of_less_than_two_tokens_cannot_be_timed(requests: list[Timed]) -> None:
    with pytest.raises(EvaluationError, match="less than two tokens") as raised:
        evaluate._speed(chat(*requests))
    assert "chat template" in (raised.value.fix or "")


def finished(*memory: tuple[float, float]) -> Finished:
    return Finished(returncode=0, seconds=1.0, memory=list(memory), timed_out=False)


def test_memory_at_its_peak_and_with_the_model_loaded_at_rest() -> None:
    samples = [(9.9, 50), (10.0, 700), (10.5, 710), (11.0, 730), (11.1, 900), (12, 650)]
    found = evaluate._memory(chat(), finished(*samples))
    assert values(found) == {"memory_peak_mb": 900, "memory_loaded_mb": 710, "cpu_percent": 180}
    assert (found["memory_peak_mb"].samples, found["memory_loaded_mb"].samples) == (6, 3)
    assert {measurement.unit for name, measurement in found.items() if "memory" in name} == {"MB"}


def test_memory_that_was_not_sampled_at_rest() -> None:
    with pytest.raises(EvaluationError, match="Memory could not be sampled"):
        evaluate._memory(chat(), finished((9.9, 50), (11.1, 900)))


def evaluation(perplexity: float) -> Evaluation:
    measurements = {"perplexity": Measurement(value=perplexity, unit="1", samples=3000)}
    return Evaluation(
        measurements=measurements, answers=(), samples=(), evaluation_set_digest="e" * 64, text_digest="t" * 64
    )


def test_against_the_baseline() -> None:
    # The tokenizer is no part of the model's size.
    small = variant(Path("int4"), files={"model.onnx": 1_000_000, "model.onnx.data": 99_000_000, "tokenizer.json": 7})
    large = variant(Path("fp32"), "fp32", files={"model.onnx": 400_000_000})
    before = evaluation(12.0)
    found = evaluate.against_baseline(before, small, evaluation(10.0), large)
    assert found.metrics == {"perplexity": 12, "size_ratio": 0.25, "perplexity_ratio": pytest.approx(1.2)}
    assert found.measurements["perplexity_ratio"].samples == 3000
    assert before.metrics == {"perplexity": 12}


def test_baseline_against_itself() -> None:
    large = variant(Path("fp32"), "fp32")
    found = evaluate.against_baseline(evaluation(11.8), large, evaluation(11.8), large)
    assert (found.metrics["size_ratio"], found.metrics["perplexity_ratio"]) == (1, 1)


def test_figures_of_the_conversion() -> None:
    made = variant(Path("int4"), files={"model.onnx": 2_500_000, "model.onnx.data": 500_000, "genai_config.json": 9})
    assert values(evaluate._of_variant(made)) == {
        "size_mb": 3.0,
        "bits_per_weight": 4.5,
        "convert_s": 20.0,
        "convert_memory_peak_mb": 900.0,
    }
