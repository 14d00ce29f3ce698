"""The comparison as an HTML page that stands alone, with charts."""

from __future__ import annotations

import io
import math
from html import escape
from typing import TYPE_CHECKING

from slmops.core.values import Comparison, VariantResult
from slmops.report.tables import interval_of, remarks, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHARTS = (
    ("Size (MB)", "size_mb"),
    ("Perplexity (lower is better)", "perplexity"),
    ("Tokens per second", "decode_tok_s"),
    ("Peak memory (MB)", "memory_peak_mb"),
)
INTERVALS = (
    ("Perplexity ratio to fp32", "perplexity_ratio"),
    ("Mean KL divergence from fp32", "kl_mean"),
    ("Accuracy", "accuracy"),
    ("Tokens per second", "decode_tok_s"),
)


def html(comparison: Comparison) -> str:
    """A page that stands alone: tables, choice, charts."""
    said = "".join(f"<p>{escape(part)}</p>" for part in (comparison.choice.reason, *remarks(comparison)))
    return (
        "<!doctype html><meta charset='utf-8'>"
        f"<title>{escape(comparison.model)}</title>"
        "<style>body{font:14px system-ui;margin:1em}table{margin-bottom:1em}td,th{padding:.2em .5em}"
        "svg{max-width:100%}</style>"
        f"<h1>{escape(comparison.model)}</h1>{''.join(tables(comparison, 'html'))}{said}{_charts(comparison)}"
    )


def _charts(comparison: Comparison) -> str:
    measured = [result for result in comparison.variants if result.status == "ok"]
    if not measured:
        return ""
    from matplotlib.figure import Figure

    bars = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, metric) in zip(bars.subplots(2, 2).flat, CHARTS, strict=True):
        known = {r.name: r.metrics[metric] for r in measured if math.isfinite(r.metrics.get(metric, math.nan))}
        axes.bar_label(axes.bar(list(known), list(known.values()), color="#4477aa"), fmt="%.4g")
        axes.set_title(title)
        axes.margins(y=0.15)
    return _svg(bars) + _interval_chart(measured)


def _interval_chart(measured: list[VariantResult]) -> str:
    """What is uncertain, with 95 % intervals; a variant without one is a point."""
    shown = [
        (title, metric) for title, metric in INTERVALS if any(interval_of(r.measurements.get(metric)) for r in measured)
    ]
    if not shown:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(shown), 3.5), layout="constrained")
    figure.suptitle("95 % intervals")
    for axes, (title, metric) in zip(figure.subplots(1, len(shown), squeeze=False).flat, shown, strict=True):
        known = {r.name: r.measurements[metric] for r in measured if metric in r.measurements}
        known = {name: one for name, one in known.items() if math.isfinite(one.value)}
        values = [one.value for one in known.values()]
        ends = [interval_of(one) or (one.value, one.value) for one in known.values()]
        # A bootstrap's interval need not hold the value itself.
        below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
        axes.errorbar(list(known), values, yerr=[below, above], fmt="o", capsize=4, color="#4477aa")
        axes.set_title(title)
        axes.margins(x=0.2)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]
