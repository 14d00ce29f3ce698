"""The public names, and what a comparison is in a notebook."""

import slmops
from slmops.core.values import HEADLINE_METRICS
from slmops.report import COLUMNS
from tests.values import comparison, failed, result

PUBLIC = {
    *("optimize", "Job", "Comparison"),
    *("SlmopsError", "UsageError", "CheckpointError", "RecipeError", "PrerequisiteError", "BusyError", "WorkError"),
    *("ConversionError", "RegistrationError", "EvaluationError", "TrackingError", "GateError"),
}


def test_the_public_names_are_these() -> None:
    assert set(slmops.__all__) == PUBLIC
    assert all(hasattr(slmops, name) for name in PUBLIC)
    assert all(name in (slmops.__doc__ or "") for name in ("optimize", "Job", "Comparison"))


def test_a_comparison_is_a_frame_and_a_table() -> None:
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


def test_the_table_has_the_figures_of_the_report() -> None:
    assert [metric for _, metric, *_ in COLUMNS] == list(HEADLINE_METRICS)
