"""Speed, memory and machine: figures from raw results that were made up, worked out by hand or by NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.core.values import Evaluation, Measurement
from slmops.evaluation import summary
from slmops.evaluation.speed import Speed
from tests.measured import BUSY, quality, speed, timed, turn
from tests.values import variant

NOTE = "the machine was busy with something else"


def evaluate(raw: Speed, **changes: Any) -> Evaluation:
    """Of a variant that has no baseline."""
    return summary.evaluation(variant(Path("int4"), **changes), raw, quality(), None, None)


def figures(raw: Speed) -> dict[str, Measurement]:
    return evaluate(raw).measurements


def test_speed_of_one_request() -> None:
    # 10 gaps in 1 s after the first token: 100 ms each, 10 tokens/s. 40 prompt tokens in 0.2 s: 200 tokens/s.
    found = figures(speed(turn(timed(0.2, 1.2), throughput={1: 20.0, 4: 41.0})))
    expected = {
        "throughput_tok_s_c1": (20, "tokens/s"),
        "throughput_tok_s_c4": (41, "tokens/s"),
        "decode_tok_s": (10, "tokens/s"),
        "prefill_tok_s": (200, "tokens/s"),
        "ttft_model_ms_p50": (150, "ms"),
        "decode_consistency": (1, "1"),
        "load_s": (1.5, "s"),
        **{f"ttft_ms_p{percent}": (200, "ms") for percent in (50, 90, 99)},
        **{f"itl_ms_p{percent}": (100, "ms") for percent in (50, 90, 99)},
        **{f"response_s_p{percent}": (1.7, "s") for percent in (50, 90, 99)},
    }
    assert {name: found[name].value for name in expected} == pytest.approx({n: one[0] for n, one in expected.items()})
    assert {name: found[name].unit for name in expected} == {n: one[1] for n, one in expected.items()}
    assert {(found[name].samples, found[name].low) for name in expected} == {(1, None)}  # which shows no spread


def test_percentiles_over_all_rounds() -> None:
    random = np.random.default_rng(0)
    firsts, gaps, tokenized = random.uniform(0.1, 0.3, 12), random.uniform(0.02, 0.06, 12), random.uniform(0, 0.05, 12)
    rows = [
        timed(first, first + 15 * gap, 16, tokenize_s=share)
        for first, gap, share in zip(firsts, gaps, tokenized, strict=True)
    ]
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


def test_defect_8_intervals_of_speed_know_that_rounds_differ() -> None:
    """Ten requests in each of three rounds, and each round has its own speed."""
    rounds = [turn(*(timed(first + 0.001 * n, 1.2) for n in range(10))) for first in (0.1, 0.2, 0.3)]
    ttft = figures(speed(*rounds))["ttft_ms_p50"]
    assert ttft.low < 110
    assert ttft.high > 300


GRID = ((128, 16), (32, 16), (512, 16))


def test_single_figures_are_those_of_the_headline_cell() -> None:
    headline = [timed(0.2, 1.2), timed(0.4, 2.4)]
    others = [timed(0.01, 0.02, cell=1), timed(9.0, 99.0, cell=2, prompt_tokens=512)]
    found = figures(speed(turn(*headline, *others), cells=GRID))
    alone = figures(speed(turn(*headline)))
    for name in ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "response_s_p90", "decode_tok_s", "ttft_model_ms_p50"):
        assert found[name] == alone[name]
        assert found[name].samples == 2


def test_prefill_is_that_of_the_longest_prompt() -> None:
    rows = [timed(0.1, 1.1), timed(0.1, 1.1, cell=1)]
    longest = [timed(second, second + 1, cell=2, prompt_tokens=500) for second in (2.0, 1.0)]
    found = figures(speed(turn(*rows, longest[0]), turn(*rows, longest[1]), cells=GRID))["prefill_tok_s"]
    assert (found.value, found.samples) == (pytest.approx((250 + 500) / 2), 2)


def test_requests_with_a_single_token_have_no_gap_but_a_first_token() -> None:
    found = figures(speed(turn(timed(0.2, 1.2), timed(0.4, 0.4, completion=1), timed(0.6, 0.6, completion=5))))
    assert (found["itl_ms_p50"].value, found["itl_ms_p50"].samples) == (pytest.approx(100), 1)
    assert (found["ttft_ms_p50"].value, found["ttft_ms_p50"].samples) == (pytest.approx(400), 3)


def test_what_there_are_no_samples_of_is_left_out() -> None:
    # The longest prompt gave no text at all, the shortest a single token, the headline all in one piece.
    made = evaluate(speed(turn(timed(0.2, 0.2), timed(0.3, 0.3, completion=1, cell=1)), cells=GRID))
    assert made.measurements["ttft_ms_p50"].value == pytest.approx(200)
    gone = {"decode_tok_s", "itl_ms_p50", "prefill_tok_s", "decode_consistency"}
    assert not gone & made.measurements.keys()
    points = {(one.name, one.prompt_tokens) for one in made.curves}
    assert points == {
        (name, tokens) for name in ("ttft_ms", "prefill_tok_s", "response_s_out16") for tokens in (32, 128)
    }


def test_decode_rate_at_the_longest_prompt_as_a_share_of_that_at_the_shortest() -> None:
    def rows(shortest: float, longest: float) -> list[Any]:
        return [timed(1, 2), timed(1, 1 + 10 * shortest, cell=1), timed(1, 1 + 10 * longest, cell=2)]

    found = figures(speed(turn(*rows(0.1, 0.2)), turn(*rows(0.1, 0.125)), cells=GRID))["decode_consistency"]
    assert found.value == pytest.approx((0.5 * 0.8) ** 0.5)  # the geometric mean over the rounds
    assert found.samples == 2
    assert found.low < found.value
    # A round in which one of the two could not be timed says nothing.
    some = [timed(1, 2), timed(1, 2, cell=1)]
    found = figures(speed(turn(*rows(0.1, 0.2)), turn(*some), cells=GRID))["decode_consistency"]
    assert (found.value, found.samples) == (pytest.approx(0.5), 1)


def test_curves_over_prompt_and_output_lengths() -> None:
    cells = ((128, 16), (128, 64), (32, 16), (32, 64))
    rows = [
        timed(0.2, 1.2, cell=0, prompt_tokens=128),
        timed(0.4, 2.4, cell=0, prompt_tokens=128),
        timed(0.3, 3.3, cell=1, prompt_tokens=126),
        timed(0.1, 0.6, cell=2, prompt_tokens=30),
        timed(0.1, 0.1, cell=3, prompt_tokens=30, completion=1),
    ]
    found = {(one.name, one.prompt_tokens): one.measurement for one in evaluate(speed(turn(*rows), cells=cells)).curves}
    expected = {
        ("ttft_ms", 32): 100,
        ("ttft_ms", 128): 300,
        ("prefill_tok_s", 32): 300,
        ("prefill_tok_s", 128): np.median([128 / 0.2, 128 / 0.4, 126 / 0.3]),
        ("itl_ms", 32): 50,
        ("itl_ms", 128): 200,
        ("decode_tok_s", 32): 20,
        ("decode_tok_s", 128): 5,
        ("response_s_out16", 32): 1.1,
        ("response_s_out16", 128): (1.7 + 2.9) / 2,
        ("response_s_out64", 32): 0.6,
        ("response_s_out64", 128): 3.8,
    }
    assert {key: one.value for key, one in found.items()} == pytest.approx(expected)
    assert found["ttft_ms", 128].samples == 3
    assert found["response_s_out16", 128].samples == 2


def test_disturbed_turns_are_kept_and_not_counted() -> None:
    quiet = turn(timed(0.2, 1.2), cpu_s=5, wall_s=5)
    busy = turn(timed(0.9, 9.9), loops=BUSY, cpu_s=1, wall_s=5, load_s=7, energy_j=7.0)
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
    assert {"decode_tok_s", "prefill_tok_s", "load_s", "response_s_p99", "cpu_percent", "energy_j_per_token"} <= said
    assert not said & {"size_mb", "memory_peak_mb", "perplexity", "accuracy", "noise_percent", "edge_cases_passed"}
    assert found["decode_consistency"].note == NOTE  # it has an interval, and no note of its own


def test_loads_cold_and_warm() -> None:
    loads = [turn(timed(0.2, 1.2), load_s=seconds, cold=cold) for seconds, cold in ((9, True), (1, False), (2, False))]
    found = figures(speed(*loads))
    assert (found["load_cold_s"].value, found["load_cold_s"].samples, found["load_cold_s"].unit) == (9, 1, "s")
    assert (found["load_s"].value, found["load_s"].samples) == (1.5, 2)
    assert "load_cold_s" not in figures(speed(*loads[1:]))
    assert "load_s" not in figures(speed(loads[0]))


def test_a_disturbed_load_counts_only_if_there_is_no_other() -> None:
    cold = turn(timed(0.2, 1.2), load_s=9, cold=True, loops=BUSY, throughput={1: 20.0})
    warm = [turn(timed(0.2, 1.2), load_s=5, loops=BUSY), turn(timed(0.2, 1.2), load_s=2)]
    found = figures(speed(cold, *warm))
    assert (found["load_s"].value, found["load_s"].samples) == (2, 1)
    assert NOTE not in (found["load_s"].note or "")
    assert found["load_cold_s"].value == 9
    assert NOTE in (found["load_cold_s"].note or "")
    assert found["throughput_tok_s_c1"].note == NOTE


def test_memory_by_windows() -> None:
    # Windows of a turn: before 0-1, loaded 2-3, measured 3-8, unloaded 9-10. What runs after that is of other sessions.
    first = [(0.0, 50.0), (1.0, 55.0), (1.5, 800.0), (2.0, 710.0), (2.9, 700.0), (5.0, 900.0), (8.0, 720.0)]
    first += [(8.5, 950.0), (9.5, 300.0), (11.0, 2000.0)]
    second = [(at, mb + 10) for at, mb in first]
    third = [(0.5, 100.0), (2.5, 600.0), (1.5, 5000.0)]
    rows = [turn(timed(0.2, 1.2), memory=tuple(memory)) for memory in (first, second, third)]
    found = figures(speed(*rows))
    expected = {
        "memory_before_mb": np.median([55, 65, 100]),
        "memory_loaded_mb": np.median([710, 720, 600]),
        "memory_unloaded_mb": np.median([300, 310]),
        "memory_peak_mb": np.median([900, 910, 5000]),
    }
    assert {name: found[name].value for name in expected} == expected
    assert {name: found[name].samples for name in expected} == {**dict.fromkeys(expected, 3), "memory_unloaded_mb": 2}
    assert {found[name].unit for name in expected} == {"MB"}


def test_memory_after_several_sessions_is_left_out() -> None:
    memory = tuple((at, 100.0 * (at + 1)) for at in (0.5, 2.5, 5.0, 9.5))
    several = turn(timed(0.2, 1.2), memory=memory, unloaded=None, throughput={1: 20.0, 2: 33.0})
    alone = turn(timed(0.2, 1.2), memory=((0.5, 50.0), (9.5, 300.0)))
    found = figures(speed(several, alone, alone))
    # At 9.5 s the first turn has 1050 MB, which no window claims.
    assert (found["memory_unloaded_mb"].value, found["memory_unloaded_mb"].samples) == (300, 2)
    assert (found["memory_before_mb"].value, found["memory_before_mb"].samples) == (50, 3)
    assert (found["memory_loaded_mb"].value, found["memory_loaded_mb"].samples) == (350, 1)
    found = figures(speed(several))
    assert ("memory_unloaded_mb" in found, found["memory_peak_mb"].value) == (False, 600)
    unsampled = figures(speed(turn(timed(0.2, 1.2), memory=((11.0, 50.0),))))
    assert not [name for name in unsampled if name.startswith("memory_")]


@pytest.mark.parametrize(
    ("energies", "expected"),
    [
        pytest.param([200.0, 300.0, 600.0], 3, id="all"),
        pytest.param([200.0, -9000.0, 600.0], 4, id="one counter wrapped round"),
        pytest.param([200.0, None, None], 2, id="one is known"),
        pytest.param([None, None, None], None, id="unknown"),
        pytest.param([-1.0, -2.0, 0.0], None, id="all wrapped, or none used"),
    ],
)
def test_energy(energies: list[float | None], expected: float | None) -> None:
    found = figures(speed(*(turn(timed(0.2, 1.2), energy_j=energy, energy_tokens=100) for energy in energies)))
    if expected is None:
        assert "energy_j_per_token" not in found
    else:
        assert (found["energy_j_per_token"].value, found["energy_j_per_token"].unit) == (expected, "J/token")


def test_processor() -> None:
    found = figures(speed(*(turn(timed(0.2, 1.2), cpu_s=cpu, wall_s=5) for cpu in (5, 9, 10)), cores=4))
    assert (found["cpu_percent"].value, found["cpu_percent"].unit) == (pytest.approx(180), "% of one core")
    assert (found["cpu_percent_total"].value, found["cpu_percent_total"].unit) == (pytest.approx(45), "% of all cores")


def test_noise_of_the_machine() -> None:
    loops = [(1.0, 1.1), (0.9, 1.3), (1.0, 2.0)]
    found = figures(speed(*(turn(timed(0.2, 1.2), loops=pair) for pair in loops)))["noise_percent"]
    flat = np.array(loops).ravel()
    deviation = np.median(np.abs(flat - np.median(flat)))
    assert found.value == pytest.approx(100 * 1.4826 * deviation / np.median(flat), rel=1e-4)
    assert (found.samples, found.unit) == (6, "%")


def test_rows_of_all_requests() -> None:
    raw = speed(turn(timed(0.2, 1.2), timed(0.3, 2.3, cell=1, prompt_tokens=31), loops=(1.0, 1.25)), cells=GRID)
    of_turn = {"round": 0, "disturbed": 0, "calibration_before_s": 1.0, "calibration_after_s": 1.25}
    both = {**of_turn, "output_tokens_wanted": 16, "completion_tokens": 11, "tokenize_s": 0.05}
    first, second = (
        {"first_s": 0.2, "last_s": 1.2, "total_s": 1.7, "prompt_tokens": 40, "prompt_tokens_wanted": 128},
        {"first_s": 0.3, "last_s": 2.3, "total_s": 2.8, "prompt_tokens": 31, "prompt_tokens_wanted": 32},
    )
    assert evaluate(raw).samples == ({**both, **first}, {**both, **second})


def test_figures_of_the_conversion() -> None:
    # The tokenizer is no part of the model's size; the checkpoint has 0.004 MB.
    found = evaluate(
        speed(turn(timed(0.2, 1.2))), files={"model.onnx": 2_000, "model.onnx.data": 1_000, "tokenizer.json": 9_000}
    ).measurements
    expected = {
        "size_mb": (0.003, "MB"),
        "size_source_ratio": (0.75, "1"),
        "bits_per_weight": (4.5, "bits"),
        "convert_s": (20, "s"),
        "convert_memory_peak_mb": (900, "MB"),
    }
    assert {name: (found[name].value, found[name].unit) for name in expected} == expected
    assert found["size_mb"].low == found["size_mb"].high == 0.003
