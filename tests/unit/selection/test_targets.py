"""One variant a target: how variants are called by it, what is chosen, and what the report says."""

from typing import Any

import pytest

from slmops import report
from slmops.core import targets
from slmops.core.values import Choice, Comparison, Measurement, VariantResult
from slmops.foundry.layout import model_name
from slmops.selection import policy
from slmops.selection.choice import choose_variants
from tests.values import result

WHY = "Foundry Local finds no device for WebGpuExecutionProvider here"
OF_DEVICE = ("ttft_ms_p50", "decode_tok_s", "decode_consistency", "memory_peak_mb", "edge_cases_passed")


def unmeasured(name: str, size_mb: float, perplexity_ratio: float = 1.0, **changes: Any) -> VariantResult:
    made = result(name, size_mb, perplexity_ratio, changes=dict.fromkeys(OF_DEVICE))
    return made.model_copy(update={"not_run": WHY, **changes})


RESULTS = [
    *(result("fp32", 600), result("int8", 160), result("int4", 110, 1.5)),
    *(unmeasured("fp16-webgpu", 300), unmeasured("int4-webgpu", 112, 1.02)),
    unmeasured("int4-cuda", 112, 1.5),
]


@pytest.mark.parametrize("target", targets.TARGETS)
@pytest.mark.parametrize("precision", ["int4", "int4-small", "my-own"])
def test_a_variants_name_says_its_recipe_and_its_target(precision: str, target: str) -> None:
    assert targets.split(targets.variant_name(precision, target)) == (precision, target)


def test_foundrys_names_are_as_its_own_and_those_for_the_cpu_as_ever() -> None:
    names = [model_name("bot", name) for name in ("int4", "int4-webgpu", "fp16-cuda", "int4-dml", "fp16-trt-rtx")]
    assert names == [
        *("bot-int4-generic-cpu", "bot-int4-generic-gpu", "bot-fp16-cuda-gpu", "bot-int4-dml-gpu"),
        "bot-fp16-trtrtx-gpu",
    ]


def test_each_target_has_a_choice_of_its_own_and_what_its_device_would_measure_refuses_nothing() -> None:
    choices, judged = choose_variants(["cpu", "webgpu", "cuda"], RESULTS, policy.load(), {})
    assert {target: choice.variant for target, choice in choices.items()} == {
        **{"cpu": "int8", "webgpu": "int4-webgpu", "cuda": None}
    }
    outcomes = {one.name: {gate.metric: gate.outcome for gate in reversed(one.gates)} for one in judged}
    assert {outcomes["int4-webgpu"][metric] for metric in ("edge_cases_passed", "decode_consistency")} == {"skipped"}
    assert outcomes["int4-webgpu"]["hf_kl_mean"] == "inconclusive"  # which the CPU could have measured
    assert (outcomes["int4-webgpu"]["perplexity"], outcomes["int4-cuda"]["perplexity"]) == ("pass", "fail")
    assert [one.name for one in judged] == [one.name for one in RESULTS]


def test_a_target_is_compared_with_the_champions_figures_of_its_own() -> None:
    asked = policy.Policy(gates=(policy.Gate(metric="size_mb", of="ratio", to="champion", max=1.1),))
    small = {"size_mb": Measurement.exact(10, "MB")}
    choices, _ = choose_variants(["cpu", "webgpu"], RESULTS, asked, {"webgpu": small})
    assert (choices["cpu"].variant, choices["webgpu"].variant) == ("int4", None)


def test_each_target_has_a_section_of_its_own_in_the_report() -> None:
    made = Comparison(
        model="bot",
        run_id="run1",
        choice=Choice(variant="int8", reason="int8 is taken."),
        other_choices={"webgpu": Choice(variant="int4-webgpu", reason="int4-webgpu is taken.")},
        variants=tuple(RESULTS[:5]),
    )
    said = report.text(made)
    before, cpu, webgpu = (
        said.partition("int8 is taken.")[0].replace("cpu:\n", "@").replace("webgpu:\n", "@").split("@")
    )
    assert before == ""
    assert ["int4-webgpu" in part for part in (cpu, webgpu)] == [False, True]
    marks = [line.split("  ")[-1] for line in webgpu.splitlines() if "-webgpu" in line]
    assert marks == ["not measured here", "chosen, not measured here"]
    assert "For webgpu: int4-webgpu is taken." in said
    assert f"fp16-webgpu, int4-webgpu: made, not measured here: {WHY}." in said
    assert [name for name, chosen in made.to_frame()["chosen"].items() if chosen] == ["int8", "int4-webgpu"]
    page, cpu_only = report.html(made), report.html(made.model_copy(update={"variants": RESULTS[:3]}))
    assert (page.count("<h2>"), cpu_only.count("<h2>")) == (2, 0)
    assert page.count("<svg") == 2 * cpu_only.count("<svg")


def test_the_form_of_a_comparison_without_other_targets_is_as_ever() -> None:
    made = Comparison(model="bot", run_id="r", choice=Choice(variant="int8", reason=""), variants=tuple(RESULTS[:2]))
    assert "other_choices" not in made.model_dump()
    assert "not_run" not in made.model_dump()["variants"][0]
