"""A comparison for people: text for the terminal, Markdown for Prefect and MLflow, an HTML page with charts."""

import io
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import tabulate

from slmops.core.job import BASELINE, PEER_PREFIX
from slmops.core.targets import CPU, target_of
from slmops.core.values import Comparison, GateResult, Measurement, VariantResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

tabulate.MIN_PADDING = 0  # for the lines of a table to fit into a terminal

# Column title (its lines in text), metric, how a value is written, and whether there is room for its interval.
COLUMNS: tuple[tuple[str, str, Callable[[float], str], bool], ...] = (
    ("size\nMB", "size_mb", "{:.1f}".format, False),
    ("of\nfp32", "size_ratio", "{:.2f}".format, False),
    ("first\ntoken ms", "ttft_ms_p50", "{:.0f}".format, False),
    ("tokens/s", "decode_tok_s", lambda value: f"{value:.0f}" if value >= 100 else f"{value:.1f}", True),
    ("memory\nMB", "memory_peak_mb", "{:.0f}".format, False),
    ("perplexity\nratio", "perplexity_ratio", lambda value: f"{value:.1f}" if value >= 10 else f"{value:.3f}", True),
    ("KL\nmean", "kl_mean", "{:.2g}".format, False),
    ("KL\nto HF", "hf_kl_mean", "{:.2g}".format, False),
    ("top-1\nas HF", "hf_top1_agreement", "{:.3f}".format, False),
    ("accuracy", "accuracy", "{:.2f}".format, True),
)

MISMATCHES = (
    ("texts read\notherwise", "tokenizer_mismatches", "{:.0f}".format, False),
    ("rendered\notherwise", "template_mismatches", "{:.0f}".format, False),
)
SOMETIMES = {"hf_kl_mean", "hf_top1_agreement", *(metric for _, metric, *_ in MISMATCHES)}
"""Shown if a variant has them, and not 0."""
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


def table(comparison: Comparison, style: str = "simple") -> str:
    """The variants as rows of text; ``style`` is one of tabulate's, such as ``simple``, ``github`` or ``html``.

    What was measured on several devices does not compare: each target has a section of its own.
    """
    sections = _sections(comparison)
    made = [_section(found, comparison, style) for found in sections.values()]
    if len(made) == 1:
        return made[0]
    heading = "<h2>{}</h2>" if style == "html" else "{}:\n"
    return "\n\n".join(f"{heading.format(target)}\n{part}" for target, part in zip(sections, made, strict=True))


def _sections(comparison: Comparison) -> dict[str, list[VariantResult]]:
    """The variants by their targets, with the peers beside those for the CPU."""
    sections: dict[str, list[VariantResult]] = {}
    for one in (*comparison.variants, *comparison.peers):
        sections.setdefault(target_of(one.name), []).append(one)
    return sections or {CPU: []}


def _section(results: Sequence[VariantResult], comparison: Comparison, style: str) -> str:
    shown = {metric for result in results for metric, value in result.metrics.items() if value}
    columns = [one for one in (*COLUMNS, *MISMATCHES) if one[1] in shown or one[1] not in SOMETIMES]
    rows = [
        [
            result.name.removeprefix(PEER_PREFIX),
            *(_cell(result, *column[1:]) for column in columns),
            _gates_of(result),
            _mark(result, comparison),
        ]
        for result in results
    ]
    headers = ["variant", *(_of_baseline(title, comparison) for title, *_ in columns), "gates", ""]
    return _tabulate(rows, headers, style, ["left", *["right"] * len(columns), "left", "left"])


def gates(comparison: Comparison, style: str = "simple") -> str:
    """The gates as rows, the variants as columns; empty if no gate judged anything."""
    judged = {result.name: {gate.gate: gate for gate in result.gates} for result in comparison.variants if result.gates}
    rows = {
        gate.gate: gate.gate + " (advisory)" * gate.advisory
        for one in judged.values()
        for gate in one.values()
        if gate.outcome != "skipped"  # a champion's gates while there is none
    }
    if not rows:
        return ""
    cells = [[label, *(_verdict(one.get(gate)) for one in judged.values())] for gate, label in rows.items()]
    return _tabulate(cells, ["gate", *judged], style, ["left"] * (len(judged) + 1))


def text(comparison: Comparison) -> str:
    """What ``slmops run`` and ``slmops compare`` print."""
    return "\n\n".join([*tables(comparison, "simple"), *comparison.reasons, *remarks(comparison)])


def markdown(comparison: Comparison, run_url: str) -> str:
    """The same for Prefect's and MLflow's pages."""
    said = [escape(part, quote=False) for part in (*comparison.reasons, *remarks(comparison))]
    return "\n\n".join([*tables(comparison, "github"), *said, f"[MLflow run]({run_url})"])


def tables(comparison: Comparison, style: str) -> list[str]:
    """Both tables, or the one that there is."""
    return [part for part in (table(comparison, style), gates(comparison, style)) if part]


def _of_baseline(title: str, comparison: Comparison) -> str:
    """The same with the baseline's name."""
    return title.replace(BASELINE, comparison.baseline.name) if comparison.baseline else title


def _tabulate(rows: list[list[str]], headers: list[str], style: str, align: list[str]) -> str:
    if style != "simple":
        headers = [header.replace("\n", " ") for header in headers]
    if style == "github":  # tabulate escapes in HTML only
        headers, *rows = ([escape(cell, quote=False).replace("|", r"\|") for cell in row] for row in (headers, *rows))
    return str(tabulate.tabulate(rows, headers, tablefmt=style, disable_numparse=True, colalign=align))


def _cell(result: VariantResult, metric: str, write: Callable[[float], str], interval: bool) -> str:
    if metric not in result.metrics:
        return "-"
    ends = interval_of(result.measurements.get(metric)) if interval else None
    value = write(result.metrics[metric])
    return marked(result, metric, f"{value} [{write(ends[0])}, {write(ends[1])}]" if ends else value)


def marked(result: VariantResult, metric: str, text: str) -> str:
    """A text of a figure, as ``~62*`` if it was disturbed."""
    measurement = result.measurements.get(metric)
    return measurement.marked(text) if measurement else text


def interval_of(measurement: Measurement | None) -> tuple[float, float] | None:
    """The ends of the interval, where there is more to it than the value."""
    ends = measurement.interval if measurement else None
    return ends if ends and all(map(math.isfinite, ends)) else None


def _gates_of(result: VariantResult) -> str:
    """The first gate that refuses the variant and how many more do; or how many it passes of those that apply."""
    refusing = [gate.metric for gate in result.gates if gate.refuses]
    if refusing:
        return refusing[0] + (f" +{len(refusing) - 1}" if len(refusing) > 1 else "")
    outcomes = [gate.outcome for gate in result.gates if gate.outcome != "skipped"]
    return f"{outcomes.count('pass')}/{len(outcomes)}" if outcomes else "-"


def _mark(result: VariantResult, comparison: Comparison) -> str:
    if result.status != "ok":
        return result.status
    if result in comparison.peers:
        return "llama.cpp"
    if result in comparison.chosen:
        return "chosen, not measured here" if result.not_run else "chosen"
    if result.not_run:
        return "not measured here"
    return f"dominated by {result.dominated_by}" if result.dominated_by else ""


def _verdict(gate: GateResult | None) -> str:
    if gate is None:
        return "-"
    outcome = "FAIL" if gate.outcome == "fail" else gate.outcome
    if gate.value is None:
        return outcome
    return f"{outcome} ~{gate.value:.4g}*" if gate.disturbed else f"{outcome} {gate.value:.4g}"


def remarks(comparison: Comparison) -> list[str]:
    """What was disturbed or left out, what the baseline is if no variant, what the job took, why a variant failed."""
    said = [text for text in (comparison.busy, comparison.left_out) if text]
    if one := comparison.baseline:
        known = [name for name in ("perplexity", "accuracy") if name in one.metrics]
        figures = [f"{name} {one.measurements[name].text}" for name in known]
        said.append(f"There is no fp32 variant: all is relative to the checkpoint itself ({', '.join(figures)}).")
    if earlier := comparison.measured_earlier:
        dated = " and ".join(f"{what} on {when:%Y-%m-%d at %H:%M} UTC" for what, when in earlier.items())
        said.append(f"Nothing has changed since an earlier job measured {dated}; --remeasure measures anew.")
    if comparison.peers:
        names = ", ".join(result.name.removeprefix(PEER_PREFIX) for result in comparison.peers)
        said.append(
            f"{names}: the same checkpoint in llama.cpp, for reference; no gate judges it, and it is not chosen."
        )
    for why in dict.fromkeys(result.not_run for result in comparison.variants if result.not_run):
        names = ", ".join(result.name for result in comparison.variants if result.not_run == why)
        said.append(f"{names}: made, not measured here: {why}. The CPU has answered the questions and scored the text.")
    if comparison.room:
        said.append(comparison.room.text)
    return said + [
        f"{result.name}{' failed' if result.status == 'failed' else ''}: {result.reason}"
        for result in (*comparison.variants, *comparison.peers)
        if result.reason
    ]


def html(comparison: Comparison) -> str:
    """A page that stands alone: tables, choice, charts."""
    said = "".join(f"<p>{escape(part)}</p>" for part in (*comparison.reasons, *remarks(comparison)))
    return (
        "<!doctype html><meta charset='utf-8'>"
        f"<title>{escape(comparison.model)}</title>"
        "<style>body{font:14px system-ui;margin:1em}table{margin-bottom:1em}td,th{padding:.2em .5em}"
        "svg{max-width:100%}</style>"
        f"<h1>{escape(comparison.model)}</h1>{''.join(tables(comparison, 'html'))}{said}"
        + "".join(_charts(found, comparison) for found in _sections(comparison).values())
    )


def _charts(results: Sequence[VariantResult], comparison: Comparison) -> str:
    measured = [result for result in results if result.status == "ok"]
    if not measured:
        return ""
    from matplotlib.figure import Figure

    bars = Figure(figsize=(10, 6), layout="constrained")
    for axes, (title, metric) in zip(bars.subplots(2, 2).flat, CHARTS, strict=True):
        known = {r.name: r.metrics[metric] for r in measured if math.isfinite(r.metrics.get(metric, math.nan))}
        labels = [marked(r, metric, f"{known[r.name]:.4g}") for r in measured if r.name in known]
        axes.bar_label(axes.bar(list(known), list(known.values()), color="#4477aa"), labels)
        axes.set_title(title)
        axes.margins(y=0.15)
    return _svg(bars) + _interval_chart(measured, comparison)


def _interval_chart(measured: list[VariantResult], comparison: Comparison) -> str:
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
        found = {r.name: r.measurements[metric] for r in measured if metric in r.measurements}
        known = {one.marked(name): one for name, one in found.items() if math.isfinite(one.value)}
        values = [one.value for one in known.values()]
        ends = [interval_of(one) or (one.value, one.value) for one in known.values()]
        # A bootstrap's interval need not hold the value itself.
        below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
        axes.errorbar(list(known), values, yerr=[below, above], fmt="o", capsize=4, color="#4477aa")
        axes.set_title(_of_baseline(title, comparison))
        axes.margins(x=0.2)
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    return picture.getvalue()[picture.getvalue().index("<svg") :]
