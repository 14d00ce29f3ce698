"""The comparison as text, Markdown and HTML, also when little or nothing was measured."""

import re
from html import unescape
from typing import Any

import pytest

from slmops import report
from slmops.core.values import HEADLINE_METRICS, Comparison, GateResult, Measurement, Room, VariantResult
from slmops.report import CHARTS, INTERVALS, html
from slmops.selection import policy
from slmops.selection.choice import choose
from tests.values import EXTENT, comparison, failed, result

REASON = "int4 is taken, the smallest that no gate refuses."


def gate(name: str = "kl_mean at most 0.1", outcome: str = "pass", **changes: Any) -> GateResult:
    others = {"advisory": False, "refuses": outcome == "fail", "value": 0.05, "limit": 0.1, "detail": "So it is."}
    return GateResult(gate=name, metric=name.split()[0], outcome=outcome, **{**others, **changes})


def judged(name: str, *gates: GateResult, figures: tuple[float, ...] = (110,), **changes: Any) -> VariantResult:
    """A variant with these verdicts; size, perplexity ratio and accuracy as figures."""
    return result(name, *figures).model_copy(update={"gates": gates, **changes})


IN_DOUBT = gate("accuracy at least 0.4", "inconclusive", advisory=True, value=0.45, low=0.3, high=0.6)
MIXED = comparison(
    judged("fp32", gate(), gate("accuracy at least 0.4", advisory=True), figures=(600,)),
    failed("int8", "Olive produced no model. KeyError: 'x'"),
    judged("int4", gate(value=0.0415), IN_DOUBT, figures=(110.04, 1.083, 0.45)),
    chosen="int4",
    reason=REASON,
)
WIDE = comparison(result("fp32", 600), result("int4", 110, 1.083, 0.45, spread=0.02), reason=REASON)
SHOWN = [title.replace("\n", " ") for title, metric, *_ in report.COLUMNS if not metric.startswith("hf_")]
TITLES = ["variant", *SHOWN, "gates", ""]
HF = {"hf_kl_mean": Measurement.exact(1.6e-5, "nats"), "hf_top1_agreement": Measurement.exact(0.97712, "1")}


def test_the_checkpoint_as_the_baseline() -> None:
    made = WIDE.model_copy(update={"baseline": result("checkpoint", 1200)})
    for said in (report.text(made), report.markdown(made, "url"), html(made)):
        assert "There is no fp32 variant: all is relative to the checkpoint itself (" in said
        assert "checkpoint" in said.partition("There is no")[0]
    assert "checkpoint" not in report.text(WIDE)


def test_what_the_job_took_is_beside_what_was_estimated() -> None:
    room = Room(memory_estimated_mb=4449, disk_estimated_mb=2160, memory_peak_mb=3120.4, disk_peak_mb=899)
    said = "3.1 GB of memory (a conversion alone was estimated at 4.4) and 0.9 GB of disk beyond the variants"
    made = WIDE.model_copy(update={"room": room})
    assert all(said in page for page in (report.text(made), report.markdown(made, "url"), html(made)))
    assert "estimated" not in report.text(WIDE)


def test_peers_are_rows_for_reference_which_no_gate_judges() -> None:
    peers = (result("llama.cpp-Q8_0", 143, 1.005), failed("llama.cpp-Q4_K_M", "It cannot be loaded."))
    made = WIDE.model_copy(update={"peers": peers})
    assert (row(made, "Q8_0")[-2:], row(made, "Q4_K_M")[-1]) == (["-", "llama.cpp"], "failed")
    assert "Q8_0" not in report.gates(made)
    for said in (report.text(made), report.markdown(made, "url"), html(made)):
        assert "Q8_0, Q4_K_M: the same checkpoint in llama.cpp, for reference" in said
        assert "llama.cpp-Q4_K_M failed: It cannot be loaded." in said
    assert "llama.cpp-Q8_0" in html(made).partition("<svg")[2]
    assert "llama.cpp" not in report.text(WIDE)


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def pipes(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def row(made: Comparison, name: str) -> list[str]:
    return next(cells(line) for line in report.table(made).splitlines() if cells(line)[0] == name)


def test_text() -> None:
    table, gates, reason, failure = report.text(MIXED).split("\n\n")
    titles = table.split("---")[0]
    assert sorted(titles.split()) == sorted(" ".join(TITLES).split())
    assert len(titles.splitlines()) == 2  # one in Markdown and HTML
    assert [cells(line) for line in table.splitlines()[-3:]] == [
        ["fp32", "600.0", "1.00", "123", "45.7", "1200", "1.000", "0", "0.50", "2/2"],
        ["int8", *["-"] * 9, "failed"],
        ["int4", "110.0", "0.18", "123", "45.7", "220", "1.083", "0.041", "0.45", "1/2", "chosen"],
    ]
    assert [cells(line) for line in gates.splitlines() if not line.startswith("-")] == [
        ["gate", "fp32", "int4"],
        ["kl_mean at most 0.1", "pass 0.05", "pass 0.0415"],
        ["accuracy at least 0.4 (advisory)", "pass 0.05", "inconclusive 0.45"],
    ]
    assert (reason, failure) == (REASON, "int8 failed: Olive produced no model. KeyError: 'x'")


def test_what_foundry_local_reads_otherwise_is_shown_if_there_is_any() -> None:
    odd = comparison(judged("fp32"), judged("int4"), failed("int8", "no"))
    assert "otherwise" not in report.table(odd)
    for one in odd.variants[:2]:
        one.metrics.update(tokenizer_mismatches=4.0, template_mismatches=0.0)
    assert "texts read" in report.table(odd)
    assert "rendered" not in report.table(odd)
    assert row(odd, "fp32")[9:10] == ["4"]


def test_what_was_left_out_is_said() -> None:
    said = "Quality was measured with 512 of 9,000 tokens of the text (with all, intervals would be 4.2 times narrower)"
    few = EXTENT.model_copy(update={"questions": 8, "all_questions": 12})
    for extent, text in (
        (EXTENT, f"{said}."),
        (few, f"{said} and 8 of 12 questions (with all, intervals would be 1.2 times narrower)."),
        (few.model_copy(update={"all_tokens": 512, "all_questions": 8}), ""),
    ):
        made = comparison(failed("fp32", "No."), result("int4", 110).model_copy(update={"extent": extent}))
        pages = (report.text(made), report.markdown(made, "http://host/run"), html(made), made._repr_html_())
        assert all(text in page for page in pages)
        assert all(("Quality was measured" in page) == bool(text) for page in pages)


def test_the_distance_to_the_checkpoint_is_shown_if_it_was_measured() -> None:
    made = comparison(result("fp32", 600), result("int4", 110, 1.083, 0.45, changes=HF))
    assert report.table(made).count("HF") == 2
    assert row(made, "fp32")[7:11] == ["0", "-", "-", "0.50"]
    assert row(made, "int4")[7:11] == ["0.041", "1.6e-05", "0.977", "0.45"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        (
            {"perplexity_ratio": (1.105, 1.082, 1.129), "accuracy": (0.45, 0.3, 0.61), "decode_tok_s": (145, 140, 149)},
            ["145 [140, 149]", "220", "1.105 [1.082, 1.129]", "0.041", "0.45 [0.30, 0.61]"],
        ),
        (
            {"perplexity_ratio": (50, 45, 55), "decode_tok_s": (9.84, 9.8, 9.87), "kl_mean": (1.26e-6, 1e-6, 2e-6)},
            ["9.8 [9.8, 9.9]", "220", "50.0 [45.0, 55.0]", "1.3e-06", "0.45"],
        ),
        # No interval, an exact figure, a figure that is none.
        (
            {"accuracy": (0.45, None, None), "decode_tok_s": (145, 145, 145), "perplexity_ratio": (float("nan"),) * 3},
            ["145", "220", "nan", "0.041", "0.45"],
        ),
    ],
)
def test_intervals(changes: dict[str, tuple[float, float, float]], shown: list[str]) -> None:
    made = {m: Measurement(value=v, unit="1", low=low, high=high) for m, (v, low, high) in changes.items()}
    assert row(comparison(result("int4", 110, 1.083, 0.45, changes={**made})), "int4")[4:9] == shown


def test_a_terminal_has_room_for_it() -> None:
    results = [result(name, 110, 1.083, 0.45, spread=0.02, changes=HF) for name in ("fp32", "fp16", "int8", "int4")]
    made, with_gates = choose(results, policy.load())
    shown = report.text(comparison(*with_gates, chosen=made.variant, reason=""))
    assert 100 < max(len(line) for line in shown.splitlines()) <= 145


@pytest.mark.parametrize(
    ("gates", "shown"),
    [
        ([], "-"),
        ([gate(), gate(), gate()], "3/3"),
        ([gate(), gate(outcome="fail", refuses=False, advisory=True)], "1/2"),
        ([gate(), gate(outcome="inconclusive", refuses=False)], "1/2"),
        ([gate(), gate(outcome="skipped", value=None)], "1/1"),
        ([gate(outcome="skipped", value=None)], "-"),
        ([gate(), gate("accuracy at least 1", "fail")], "accuracy"),
        ([gate(), gate("accuracy at least 1", "inconclusive", refuses=True)], "accuracy"),
        ([gate(outcome="fail"), gate("accuracy at least 1", "fail"), gate("load_s at most 1", "fail")], "kl_mean +2"),
    ],
)
def test_gates_of_a_variant(gates: list[GateResult], shown: str) -> None:
    assert row(comparison(judged("int4", *gates), chosen="int4"), "int4")[-2:] == [shown, "chosen"]


@pytest.mark.parametrize(
    ("made", "mark"),
    [
        (judged("int4", gate()), "1/1"),  # no mark: the gates come last
        (judged("int4", gate(), dominated_by="mine"), "dominated by mine"),
        (failed("int4", "r"), "failed"),
        (VariantResult(name="int4", status="skipped"), "skipped"),
    ],
)
def test_mark(made: VariantResult, mark: str) -> None:
    assert row(comparison(result("fp32", 600), made, chosen="fp32"), "int4")[-1] == mark
    assert row(comparison(made, chosen="int4"), "int4")[-1] == ("chosen" if made.status == "ok" else mark)


def test_verdicts() -> None:
    made = comparison(
        judged("a", gate("one"), gate("two", "fail", value=123.456), gate("three", "skipped", value=None)),
        judged("b", gate("one", "inconclusive", value=None), gate("two", "inconclusive"), gate("three", "skipped")),
        judged("c", gate("one", "fail")),
        failed("d", "r"),
    )
    assert [cells(line) for line in report.gates(made).splitlines() if not line.startswith("-")] == [
        ["gate", "a", "b", "c"],
        ["one", "pass 0.05", "inconclusive", "FAIL 0.05"],
        ["two", "FAIL 123.5", "inconclusive 0.05", "-"],
    ]  # three, of a champion that is not there yet, judged nothing
    assert report.gates(WIDE) == ""  # without gates there is no second table
    assert html(WIDE).count("<table") == 1


def test_markdown() -> None:
    table, gates, reason, failure, link = report.markdown(MIXED, "http://host/run").split("\n\n")
    heading, rule, *rows = table.splitlines()
    assert pipes(heading) == TITLES
    assert set(rule) <= set("|:- ")
    assert [pipes(line)[0] for line in rows] == ["fp32", "int8", "int4"]
    assert [pipes(line)[-2:] for line in rows] == [["2/2", ""], ["-", "failed"], ["1/2", "chosen"]]
    assert [pipes(line)[0] for line in gates.splitlines()[::2]] == ["gate", "kl_mean at most 0.1"]
    assert (reason, link) == (REASON, "[MLflow run](http://host/run)")
    assert failure == "int8 failed: Olive produced no model. KeyError: 'x'"


NASTY = "<script>alert('x')</script> & | \"more\""


def nasty() -> Comparison:
    """Text of others wherever there can be some."""
    dominated = VariantResult(
        name="mine", status="ok", dominated_by=NASTY, gates=(gate(f"accuracy.{NASTY} at least 1", "fail"),)
    )
    made = comparison(failed(NASTY, f"It said {NASTY}"), dominated, chosen="int4", reason=f"Because {NASTY}")
    return made.model_copy(update={"model": NASTY})


def test_what_others_wrote_is_escaped() -> None:
    shown = report.markdown(nasty(), "u")
    assert "<" not in shown
    # In the cells: name, mark, gate. In the text: reason, name and reason of the failure.
    assert shown.count("&lt;script&gt;alert('x')&lt;/script&gt; &amp; \\| \"more\"") == 3
    assert shown.count("&lt;script&gt;alert('x')&lt;/script&gt; &amp; | \"more\"") == 3
    for part in shown.split("\n\n")[:2]:
        assert len({len(pipes(line)) for line in part.splitlines()}) == 1
    assert "script" not in tags(html(nasty()))
    # Title, heading, cells (name, mark, gate), reason, name and reason of the failure.
    assert unescape(html(nasty())).count(NASTY) == 8


def tags(page: str) -> list[str]:
    return re.findall(r"<(\w+)", page)


def test_html_holds_the_tables_and_the_charts_and_stands_alone() -> None:
    page = html(MIXED)
    assert page.startswith("<!doctype html>")
    shown = re.findall(r"<t[dh]\b[^>]*>\s*(.*?)\s*</t[dh]>", page)
    assert shown[: len(TITLES)] == TITLES
    assert {"110.0", "inconclusive 0.45"} <= set(shown)
    assert [tags(page).count(tag) for tag in ("tr", "svg")] == [4 + 3, 1]
    assert not {"script", "link", "img", "iframe"} & {*tags(page), *tags(html(WIDE))}
    assert REASON in page
    assert "int8 failed: Olive produced no model." in page


def drawn(made: Comparison) -> list[str]:
    """Matplotlib notes each text that it draws as shapes in a comment."""
    return re.findall(r"<!-- (.*?) -->", html(made))


def test_charts_show_each_measured_variant_and_the_intervals_that_there_are() -> None:
    shown = drawn(MIXED)  # all exact
    assert {title for title, _ in CHARTS} <= set(shown)
    assert "95 % intervals" not in shown
    assert [shown.count(name) for name in ("fp32", "int4", "int8")] == [4, 4, 0]
    assert {"600", "110", "10.83", "45.67", "1200"} <= set(shown)
    shown = drawn(WIDE)
    assert {"95 % intervals", *(title for title, _ in INTERVALS)} <= set(shown)
    assert [shown.count(name) for name in ("fp32", "int4")] == [8, 8]
    assert tags(html(WIDE)).count("svg") == 2


@pytest.mark.parametrize(
    ("low", "high", "panels"),
    [
        pytest.param(0.4, 0.5, 1, id="an interval"),
        pytest.param(0.46, 0.5, 1, id="above the value, as a bootstrap's can be"),
        pytest.param(0.4, float("inf"), 0, id="no end to draw"),
        pytest.param(None, None, 0, id="none"),
    ],
)
def test_chart_of_one_interval(low: float | None, high: float | None, panels: int) -> None:
    made = comparison(
        result("fp32", 600, changes={"accuracy": None}),
        result("fp16", 600, accuracy=float("nan")),
        result("int4", 110, changes={"accuracy": Measurement(value=0.45, unit="1", low=low, high=high)}),
    )
    assert drawn(made).count("Accuracy") == panels
    assert "Perplexity ratio to fp32" not in drawn(made)


@pytest.mark.parametrize("results", [[], [failed("fp32", "It broke.")]])
def test_nothing_was_measured(results: list[VariantResult]) -> None:
    made = comparison(*results, reason="No variant is chosen.")
    for text in (report.text(made), report.markdown(made, "u"), html(made)):
        assert "No variant is chosen." in text
        assert ("It broke." in text) is bool(results)
        assert "<svg" not in text


def test_what_is_missing_is_a_dash() -> None:
    made = comparison(VariantResult(name="fp32", status="ok", metrics={"size_mb": 600}))
    assert row(made, "fp32") == ["fp32", "600.0", *["-"] * 8]
    assert drawn(made).count("fp32") == 1  # one bar in four charts


def test_comparison_that_was_stored_without_measurements() -> None:
    old = comparison(result("int4", 110, 1.083, 0.45).model_copy(update={"measurements": {}}), chosen="int4")
    stored = old.model_dump(mode="json")
    for one in stored["variants"]:
        for key in ("measurements", "gates", "dominated_by"):
            del one[key]
    made = Comparison.model_validate(stored)
    assert row(made, "int4") == ["int4", "110.0", "0.18", "123", "45.7", "220", "1.083", "0.041", "0.45", "-", "chosen"]
    assert "<svg" in html(made)


def test_in_a_notebook_a_comparison_is_a_frame_and_a_table() -> None:
    shown = comparison(
        result("fp32", 600), failed("int8", "No."), result("int4", 110.04, 1.083, 0.45), chosen="int4", reason="<b>"
    )
    frame = shown.to_frame()
    assert list(frame.index) == ["fp32", "int8", "int4"]
    assert list(frame["status"]) == ["ok", "failed", "ok"]
    assert list(frame.index[frame["chosen"]]) == ["int4"]
    assert frame.loc["int4", "size_mb"] == 110.04
    table = shown._repr_html_()
    assert table.startswith("<table")
    assert all(f"<th>{cell}</th>" in table for cell in ("fp32", "int8", "int4", "size_mb"))
    assert "<td>1.083</td>" in table
    assert table.endswith("<p>&lt;b&gt;</p>")
    nothing = comparison(failed("fp32", "No."))
    assert list(nothing.to_frame().columns) == ["status", "chosen"]
    assert "<th>fp32</th>" in nothing._repr_html_()


def test_disturbed_figures_are_marked_wherever_they_are_shown() -> None:
    busy = Measurement(value=45.67, unit="tokens/s", low=40, high=50, disturbed=True)
    rough = result("int4", 110, changes={"decode_tok_s": busy}).model_copy(
        update={"gates": (gate("decode_tok_s at least 40", value=45.67, disturbed=True),)}
    )
    steady = result("fp32", 600)
    made = comparison(steady, rough)
    assert row(made, "int4")[4] == "~45.7 [40.0, 50.0]*"
    assert row(made, "fp32")[4] == "45.7"
    said = "* The machine was busy with something else while int4 took a turn: these figures are rough, do not compare "
    said += "with those of fp32, which were not disturbed, and take no part in choosing the fastest."
    for page in (report.text(made), report.markdown(made, "url"), html(made), made._repr_html_()):
        assert said in unescape(page)
        assert "~45" in page
    assert cells(report.gates(made).splitlines()[-1])[-1] == "pass ~45.67*"
    assert "~45.67*" in html(made)  # in the gates and the chart
    assert busy.text == "~45.67 [40, 50]*"
    shown = made.model_dump(mode="json")["variants"][1]["measurements"]
    assert [name for name, one in shown.items() if one["disturbed"]] == ["decode_tok_s"]
    alone = comparison(rough)
    assert "these figures are rough and take no part in choosing" in report.text(alone)
    elsewhere = {"load_cold_s": Measurement(value=3, unit="s", disturbed=True)}  # which no table shows
    assert "busy" not in report.text(comparison(steady, result("int4", 110, changes=elsewhere)))


def test_the_table_has_the_figures_of_the_report() -> None:
    assert [metric for _, metric, *_ in report.COLUMNS] == list(HEADLINE_METRICS)
