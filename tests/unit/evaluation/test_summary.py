"""Speed, memory and machine: figures from raw results that were made up, worked out by hand or by NumPy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.core.values import Evaluation, Measurement
from slmops.evaluation import summary
from slmops.evaluation.speed import Speed, Turn
from tests import making
from tests.measured import BUSY, quality, speed, timed, turn
from tests.values import variant

NOTE = "the machine was busy with something else"
GRID = ((128, 16), (32, 16), (512, 16))
ONE = timed(0.2, 1.2)


def evaluate(raw: Speed, **changes: Any) -> Evaluation:
    """Of a variant that has no baseline."""
    return summary.evaluation(variant(Path("int4"), **changes), raw, quality(), None, None)


def figures(raw: Speed) -> dict[str, Measurement]:
    return evaluate(raw).measurements


def test_percentiles_over_all_rounds() -> None:
    random = np.random.default_rng(0)
    firsts, gaps, tokenized = random.uniform(0.1, 0.3, 12), random.uniform(0.02, 0.06, 12), random.uniform(0, 0.05, 12)
    each = zip(firsts, gaps, tokenized, strict=True)
    rows = [timed(first, first + 15 * gap, 16, tokenize_s=share) for first, gap, share in each]
    found = figures(speed(turn(*rows[:4]), turn(*rows[4:8]), turn(*rows[8:])))
    lasts = firsts + 15 * gaps
    expected = {
        "decode_tok_s": np.median(1 / gaps),
        "prefill_tok_s": np.median(40 / firsts),
        "ttft_model_ms_p50": np.median(firsts - tokenized) * 1e3,
    }
    for percent in (50, 90, 99):
        expected[f"ttft_ms_p{percent}"] = np.percentile(firsts, percent) * 1e3
        expected[f"itl_ms_p{percent}"] = np.percentile(gaps, percent) * 1e3
        expected[f"response_s_p{percent}"] = np.percentile(lasts + 0.5, percent)
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    assert {found[name].samples for name in expected} == {12}
    middle = [found[name] for name in expected if not name.endswith(("90", "99"))]
    assert all(one.low is not None and one.high is not None and one.low < one.value < one.high for one in middle)
    assert {found[f"{name}_p99"].note for name in ("ttft_ms", "itl_ms", "response_s")} == {"indicative: 12 samples"}
    # Defect 8: ten requests in each of three rounds, and each round has its own speed.
    rounds = [turn(*(timed(first + 0.001 * n, 1.2) for n in range(10))) for first in (0.1, 0.2, 0.3)]
    ttft = figures(speed(*rounds))["ttft_ms_p50"]
    assert ttft.low < 110 < 300 < ttft.high


def test_what_there_are_no_samples_of_is_left_out() -> None:
    # The longest prompt gave no text at all, the shortest a single token, the headline all in one piece.
    made = evaluate(speed(turn(timed(0.2, 0.2), timed(0.3, 0.3, completion=1, cell=1)), cells=GRID))
    assert made.measurements["ttft_ms_p50"].value == pytest.approx(200)
    assert not {"decode_tok_s", "itl_ms_p50", "prefill_tok_s", "decode_consistency"} & made.measurements.keys()
    assert {(one.name, one.prompt_tokens) for one in made.curves} == {
        (name, tokens) for name in ("ttft_ms", "prefill_tok_s", "response_s_out16") for tokens in (32, 128)
    }


def test_single_figures_of_the_headline_cell_and_curves_over_prompt_and_output_lengths() -> None:
    rows = [
        timed(0.2, 1.2, cell=0, prompt_tokens=128),
        timed(0.4, 2.4, cell=0, prompt_tokens=128),
        timed(0.3, 3.3, cell=1, prompt_tokens=126),
        timed(0.1, 0.6, cell=2, prompt_tokens=30),
        timed(0.1, 0.1, cell=3, prompt_tokens=30, completion=1),
    ]
    made = evaluate(speed(turn(*rows), cells=((128, 16), (128, 64), (32, 16), (32, 64))))
    headline = {"ttft_ms_p50": 300, "ttft_ms_p99": 398, "itl_ms_p50": 150, "response_s_p90": 2.78}
    headline |= {"decode_tok_s": 7.5, "ttft_model_ms_p50": 250}
    assert {name: made.measurements[name].value for name in headline} == pytest.approx(headline)
    assert {made.measurements[name].samples for name in headline} == {2}
    found = {(one.name, one.prompt_tokens): one.measurement for one in made.curves}
    expected = {  # of 32 and of 128 tokens
        "ttft_ms": (100, 300),
        "prefill_tok_s": (300, np.median([128 / 0.2, 128 / 0.4, 126 / 0.3])),
        **{"itl_ms": (50, 200), "decode_tok_s": (20, 5)},
        **{"response_s_out16": (1.1, (1.7 + 2.9) / 2), "response_s_out64": (0.6, 3.8)},
    }
    assert {name: (found[name, 32].value, found[name, 128].value) for name in expected} == {
        name: pytest.approx(both) for name, both in expected.items()
    }
    assert len(found) == 2 * len(expected)
    assert (found["ttft_ms", 128].samples, found["response_s_out16", 128].samples) == (3, 2)


def test_disturbed_turns_are_kept_and_not_counted() -> None:
    quiet = turn(ONE, cpu_s=5)
    busy = turn(timed(0.9, 9.9), loops=BUSY, cpu_s=1, load_s=7, energy_j=7.0)
    found = evaluate(speed(busy, quiet, busy))
    alone = evaluate(speed(quiet))
    # Memory is none the larger for what others do.
    counted = [name for name in alone.measurements if name != "noise_percent" and not name.startswith("memory_")]
    assert {name: found.measurements[name] for name in counted} == {name: alone.measurements[name] for name in counted}
    assert "energy_j_per_token" not in found.measurements
    assert found.curves == alone.curves
    assert NOTE not in str(found.measurements)
    assert [(row["round"], row["disturbed"]) for row in found.samples] == [(0, 1), (1, 0), (2, 1)]


def test_if_all_turns_were_disturbed_all_are_used_and_it_is_said() -> None:
    rows = [turn(timed(first, first + 1), loops=BUSY, energy_j=100.0) for first in (0.2, 0.4, 0.9)]
    found = figures(speed(*rows))
    assert (found["ttft_ms_p50"].value, found["ttft_ms_p50"].samples) == (pytest.approx(400), 3)
    assert found["load_s"].samples == 3
    assert found["ttft_ms_p50"].note == f"indicative: 3 samples; {NOTE}"  # both
    said = {name for name, one in found.items() if one.note and NOTE in one.note}
    assert said == {name for name, one in found.items() if one.disturbed}
    assert {"decode_tok_s", "prefill_tok_s", "load_s", "response_s_p99", "cpu_percent", "energy_j_per_token"} <= said
    assert not said & {"size_mb", "memory_peak_mb", "perplexity", "accuracy", "noise_percent", "edge_cases_passed"}
    assert found["decode_consistency"].note == NOTE  # it has an interval, and no note of its own
    loads = figures(BUSY_LOADS)
    assert NOTE not in (loads["load_s"].note or "")
    assert NOTE in (loads["load_cold_s"].note or "")
    assert loads["throughput_tok_s_c1"].note == NOTE


def consistency(*gaps: tuple[float, float]) -> Speed:
    """Rounds of the grid with gaps of so many seconds after the shortest and the longest prompt."""
    rounds = (turn(ONE, timed(1, 1 + 10 * short, cell=1), timed(1, 1 + 10 * long, cell=2)) for short, long in gaps)
    return speed(*rounds, cells=GRID)


def prefill(second: float) -> Turn:
    return turn(ONE, timed(0.1, 1.1, cell=1), timed(second, second + 1, cell=2, prompt_tokens=500))


def rounds(name: str, *values: Any, **same: Any) -> Speed:
    """Rounds of one request, which differ in one thing."""
    return speed(*(turn(ONE, **{name: value, **same}) for value in values))


# Windows of a turn: before 0-1, loaded 2-3, measured 3-8, unloaded 9-10. What runs after that is of other sessions.
MEMORY = ((0, 50), (1, 55), (1.5, 800), (2, 710), (2.9, 700), (5, 900), (8, 720), (8.5, 950), (9.5, 300), (11, 2000))
LARGER = tuple((at, mb + 10) for at, mb in MEMORY)
# At 9.5 s it has 1050 MB, which no window claims: several sessions leave more behind.
SESSIONS = turn(ONE, memory=((0.5, 150), (2.5, 350), (5, 600), (9.5, 1050)), unloaded=None)
ALONE = turn(ONE, memory=((0.5, 50), (9.5, 300)))
COLD, *WARM = (turn(ONE, load_s=seconds, cold=cold) for seconds, cold in ((9, True), (1, False), (2, False)))
BUSY_COLD = turn(ONE, load_s=9, cold=True, loops=BUSY, throughput={1: 20.0})
BUSY_LOADS = speed(BUSY_COLD, turn(ONE, load_s=5, loops=BUSY), WARM[1])
BEFORE, LOADED, UNLOADED, PEAK = (f"memory_{when}_mb" for when in ("before", "loaded", "unloaded", "peak"))
ENERGY = "energy_j_per_token"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            speed(turn(ONE, throughput={1: 20.0, 4: 41.0})),
            {"throughput_tok_s_c1": (20, 1), "throughput_tok_s_c4": (41, 1), "decode_consistency": (1, 1)},
        ),
        # A single token has no gap, but it is a first token.
        (
            speed(turn(ONE, timed(0.4, 0.4, completion=1), timed(0.6, 0.6, completion=5))),
            {"itl_ms_p50": (100, 1), "ttft_ms_p50": (400, 3)},
        ),
        (speed(prefill(2.0), prefill(1.0), cells=GRID), {"prefill_tok_s": ((250 + 500) / 2, 2)}),  # the longest prompt
        # The geometric mean over the rounds; one in which a length could not be timed says nothing.
        (consistency((0.1, 0.2), (0.1, 0.125)), {"decode_consistency": ((0.5 * 0.8) ** 0.5, 2)}),
        (consistency((0.1, 0.2), (0.1, 0)), {"decode_consistency": (0.5, 1)}),
        (speed(COLD, *WARM), {"load_cold_s": (9, 1), "load_s": (1.5, 2)}),
        (speed(*WARM), {"load_cold_s": None, "load_s": (1.5, 2)}),
        (speed(COLD), {"load_cold_s": (9, 1), "load_s": None}),
        (BUSY_LOADS, {"load_cold_s": (9, 1), "load_s": (2, 1)}),  # a disturbed load counts if there is no other
        (
            rounds("memory", MEMORY, LARGER, ((0.5, 100), (2.5, 600), (1.5, 5000))),
            {BEFORE: (65, 3), LOADED: (710, 3), UNLOADED: (305, 2), PEAK: (910, 3)},
        ),
        (speed(SESSIONS, ALONE, ALONE), {UNLOADED: (300, 2), BEFORE: (50, 3), LOADED: (350, 1)}),
        (speed(SESSIONS), {UNLOADED: None, PEAK: (600, 1)}),
        (rounds("memory", ((11, 50),)), dict.fromkeys((BEFORE, LOADED, UNLOADED, PEAK))),
        (rounds("energy_j", 200, 300, 600), {ENERGY: (3, 3)}),
        (rounds("energy_j", 200, -9000, 600), {ENERGY: (4, 2)}),  # one counter wrapped round
        (rounds("energy_j", 200, None, None), {ENERGY: (2, 1)}),
        (rounds("energy_j", -1, -2, 0), {ENERGY: None}),
        (rounds("cpu_s", 5, 9, 10), {"cpu_percent": (180, 3), "cpu_percent_total": (45, 3)}),
        # 1.4826 median absolute deviations from the median of 1.05.
        (rounds("loops", (1.0, 1.1), (0.9, 1.3), (1.0, 2.0)), {"noise_percent": (148.26 * 0.1 / 1.05, 6)}),
    ],
)
def test_single_figures(raw: Speed, expected: dict[str, tuple[float, int] | None]) -> None:
    found = figures(raw)
    units = {**making.UNITS, "load_cold_s": "s", ENERGY: "J/token"}
    units |= dict.fromkeys(("throughput_tok_s_c1", "throughput_tok_s_c4"), "tokens/s")
    for name, wanted in expected.items():
        assert (name in found) == (wanted is not None)
        if wanted is not None:
            assert (found[name].value, found[name].samples) == (pytest.approx(wanted[0], rel=1e-4), wanted[1])
            assert found[name].unit == units[name]
            assert found[name].samples > 1 or found[name].low is None  # one sample shows no spread


def test_rows_of_all_requests() -> None:
    raw = speed(turn(ONE, timed(0.3, 2.3, cell=1, prompt_tokens=31), loops=(1.0, 1.25)), cells=GRID)
    both = {"round": 0, "disturbed": 0, "calibration_before_s": 1.0, "calibration_after_s": 1.25}
    both |= {"output_tokens_wanted": 16, "completion_tokens": 11, "tokenize_s": 0.05}
    first, second = (
        {"first_s": 0.2, "last_s": 1.2, "total_s": 1.7, "prompt_tokens": 40, "prompt_tokens_wanted": 128},
        {"first_s": 0.3, "last_s": 2.3, "total_s": 2.8, "prompt_tokens": 31, "prompt_tokens_wanted": 32},
    )
    assert evaluate(raw).samples == ({**both, **first}, {**both, **second})


def test_figures_of_the_conversion() -> None:
    # The tokenizer is no part of the model's size; the checkpoint has 0.004 MB.
    files = {"model.onnx": 2_000, "model.onnx.data": 1_000, "tokenizer.json": 9_000}
    found = evaluate(speed(turn(ONE)), files=files).measurements
    expected = {"size_mb": (0.003, "MB"), "size_source_ratio": (0.75, "1"), "bits_per_weight": (4.5, "bits")}
    expected |= {"tokenizer_mismatches": (0, "texts"), "template_mismatches": (0, "conversations")}
    expected |= {"convert_s": (20, "s"), "convert_memory_peak_mb": (900, "MB")}
    assert {name: (found[name].value, found[name].unit) for name in expected} == expected
    assert found["size_mb"].low == found["size_mb"].high == 0.003
