"""The comparison as text, Markdown and HTML, also when little or nothing was measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from slmops import report
from slmops.models import Comparison, VariantResult
from tests.values import comparison, failed, result

REASON = "int4 is the smallest satisfactory variant."
MIXED = comparison(
    result("fp32", 600),
    failed("int8", "Olive produced no model. KeyError: 'x'"),
    result("int4", 110.04, 1.083, 0.45),
    chosen="int4",
    reason=REASON,
)
TITLES = [title for title, _, _ in report.COLUMNS]


def cells(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_text() -> None:
    lines = report.text(MIXED).splitlines()
    assert cells(lines[0]) == ["variant", *TITLES]
    assert [cells(line) for line in lines[2:5]] == [
        ["fp32", "600.0", "1.00", "30.0", "123", "45.7", "1200", "10.00", "0.50"],
        ["int8", "-", "-", "-", "-", "-", "-", "-", "-", "failed"],
        ["int4", "110.0", "0.18", "5.5", "123", "45.7", "220", "10.83", "0.45", "chosen"],
    ]
    assert lines[5:] == ["", REASON, "", "int8 failed: Olive produced no model. KeyError: 'x'"]


def test_markdown() -> None:
    heading, rule, *rows, _, reason, _, failure, _, link = report.markdown(MIXED, "http://host/run").splitlines()
    assert [cell.strip() for cell in heading.strip("|").split("|")] == ["variant", *TITLES, ""]
    assert set(rule) <= set("|:-")
    assert [row.strip("|").split("|")[0].strip() for row in rows] == ["fp32", "int8", "int4"]
    assert [row.strip("|").split("|")[-1].strip() for row in rows] == ["", "failed", "chosen"]
    assert (reason, link) == (REASON, "[MLflow run](http://host/run)")
    assert failure == "int8 failed: Olive produced no model. KeyError: 'x'"


class Page(HTMLParser):
    """What a browser would show: texts by element, and which elements there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.tags.append(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags[-1] in {"td", "th"}:
            self.cells[-1] += data


def test_html_holds_the_table_and_the_charts() -> None:
    page = Page(report.html(MIXED))
    assert [cell.strip() for cell in page.cells[: len(TITLES) + 1]] == ["variant", *TITLES]
    assert page.tags.count("tr") == 4
    assert "110.0" in [cell.strip() for cell in page.cells]
    assert page.tags.count("svg") == 1
    assert REASON in page.text
    assert "int8 failed: Olive produced no model." in page.text


def test_html_stands_alone() -> None:
    page = report.html(MIXED)
    assert page.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe"} & set(Page(page).tags)


def test_html_escapes_what_others_wrote() -> None:
    nasty = "<script>alert('x')</script> & \"more\""
    made = Comparison(
        model=nasty,
        run_id="r",
        choice=MIXED.choice.model_copy(update={"reason": f"Because {nasty}"}),
        variants=(VariantResult(name=nasty, status="failed", reason=f"It said {nasty}"),),
    )
    page = Page(report.html(made))
    assert "script" not in page.tags
    # Title, heading, cell, reason, name and reason of the failure.
    assert page.text.count(nasty) == 6


def test_charts_show_each_measured_variant() -> None:
    page = report.html(MIXED)
    # Matplotlib notes each text that it draws as shapes in a comment.
    drawn = re.findall(r"<!-- (.*?) -->", page)
    assert {title for title, _ in report.CHARTS} <= set(drawn)
    assert [drawn.count(name) for name in ("fp32", "int4", "int8")] == [4, 4, 0]
    assert {"600", "110", "10.83", "45.67", "1200"} <= set(drawn)


@pytest.mark.parametrize("results", [[], [failed("fp32", "It broke.")]])
def test_nothing_was_measured(results: list[VariantResult]) -> None:
    made = comparison(*results, reason="No variant is chosen.")
    for text in (report.text(made), report.markdown(made, "u"), report.html(made)):
        assert "No variant is chosen." in text
        assert ("It broke." in text) is bool(results)
        assert "<svg" not in text


def test_metric_that_is_missing_is_a_dash() -> None:
    made = comparison(VariantResult(name="fp32", status="ok", metrics={"size_mb": 600}))
    assert cells(report.text(made).splitlines()[2]) == ["fp32", "600.0", *["-"] * 7]


def test_skipped_variant_is_marked() -> None:
    made = comparison(VariantResult(name="int4", status="skipped"))
    assert cells(report.text(made).splitlines()[2])[-1] == "skipped"
