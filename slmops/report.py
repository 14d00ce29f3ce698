"""The comparison for people: a table, and an HTML page with charts."""

from __future__ import annotations

import io
from html import escape

from tabulate import tabulate

from slmops.models import Comparison, VariantResult

# Column title, metric, format.
COLUMNS = (
    ("size MB", "size_mb", "{:.1f}"),
    ("of fp32", "size_ratio", "{:.2f}"),
    ("bits/weight", "bits_per_weight", "{:.1f}"),
    ("first token ms", "ttft_ms_p50", "{:.0f}"),
    ("tokens/s", "decode_tok_s", "{:.1f}"),
    ("memory MB", "memory_peak_mb", "{:.0f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("accuracy", "accuracy", "{:.2f}"),
)
CHARTS = (
    ("Size (MB)", "size_mb"),
    ("Perplexity (lower is better)", "perplexity"),
    ("Tokens per second", "decode_tok_s"),
    ("Peak memory (MB)", "memory_peak_mb"),
)


def table(comparison: Comparison, style: str = "simple") -> str:
    """The variants as rows of text; ``style`` is one of tabulate's, as ``simple``, ``github`` or ``html``."""
    rows = [_row(result, comparison.choice.variant) for result in comparison.variants]
    headers = ["variant", *(title for title, _, _ in COLUMNS), ""]
    return str(
        tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=("left", *["right"] * 8, "left"))
    )


def text(comparison: Comparison) -> str:
    """What ``slmops run`` and ``slmops compare`` print."""
    return f"{table(comparison)}\n\n{comparison.choice.reason}{_failures(comparison)}"


def markdown(comparison: Comparison, run_url: str) -> str:
    """The same for Prefect's and MLflow's pages."""
    return (
        f"{table(comparison, 'github')}\n\n{comparison.choice.reason}{_failures(comparison)}\n\n[MLflow run]({run_url})"
    )


def html(comparison: Comparison) -> str:
    """A page that stands alone: table, choice, charts."""
    return (
        "<!doctype html><meta charset='utf-8'>"
        f"<title>{escape(comparison.model)}</title>"
        "<style>body{font:14px system-ui;margin:1em}td,th{padding:.2em .5em}svg{max-width:100%}</style>"
        f"<h1>{escape(comparison.model)}</h1>{table(comparison, 'html')}"
        f"<p>{escape(comparison.choice.reason + _failures(comparison))}</p>{_charts(comparison)}"
    )


def _row(result: VariantResult, chosen: str | None) -> list[str]:
    values = [form.format(result.metrics[metric]) if metric in result.metrics else "-" for _, metric, form in COLUMNS]
    mark = result.status if result.status != "ok" else "chosen" if result.name == chosen else ""
    return [result.name, *values, mark]


def _failures(comparison: Comparison) -> str:
    failed = [result for result in comparison.variants if result.status == "failed"]
    return "".join(f"\n\n{result.name} failed: {result.reason}" for result in failed)


def _charts(comparison: Comparison) -> str:
    measured = [result for result in comparison.variants if result.status == "ok"]
    if not measured:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, metric) in zip(figure.subplots(2, 2).flat, CHARTS, strict=True):
        bars = axes.bar([r.name for r in measured], [r.metrics[metric] for r in measured], color="#4477aa")
        axes.bar_label(bars, fmt="%.4g")
        axes.set_title(title)
        axes.margins(y=0.15)
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]
