"""From raw results to the figures of a variant. Pure functions.

Definitions, as the serving benchmarks of the field use them. Times of a request run from its start; all pieces of text
come from the runtime's stream and all token counts from its usage, since a piece need not be one token.

- time to first token: to the first non-empty piece; rendering the chat template and tokenizing included. ``ttft_model``
  is less the time that rendering and tokenizing the same prompt take here.
- inter-token latency: (last piece - first piece) / (generated tokens - 1). Decode rate: its inverse.
- prefill rate: prompt tokens / time to first token.
- response time: to the end of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slmops.core.values import Answer, CurvePoint, Evaluation, Measurement, Variant
from slmops.evaluation import edge_cases, speed_worker, statistics
from slmops.evaluation.quality import BASELINE, HUGGING_FACE, Quality
from slmops.evaluation.speed import Speed, Turn, memory_in
from slmops.evaluation.speed_worker import Timed, Window

PERCENTILES = (50, 90, 99)
MACHINE_BUSY = "the machine was busy with something else"
Measurements = dict[str, Measurement]


def evaluation(
    variant: Variant,
    speed: Speed,
    quality: Quality,
    baseline: tuple[Variant, Quality] | None,
    checkpoint_nll: tuple[float, ...] | None,
) -> Evaluation:
    """All figures of a variant; those relative to the baseline only if there is one."""
    measured = {
        **_sizes(variant, baseline[0] if baseline else None),
        **of_speed(speed),
        **_distributions(quality, baseline[1] if baseline else None, checkpoint_nll),
        **_answers(quality.answers, baseline[1].answers if baseline else None),
        **({"edge_cases_passed": edge_cases.measurement(quality.cases)} if quality.cases else {}),
    }
    return Evaluation(
        measurements=measured,
        answers=quality.answers,
        cases=quality.cases,
        curves=tuple(_curves(speed)),
        samples=tuple(_rows(speed)),
        evaluation_set_digest=quality.evaluation_set_digest,
        text_digest=quality.text_digest,
    )


def of_speed(speed: Speed) -> Measurements:
    """The figures that depend on the machine."""
    return {**_times(speed), **_memory(speed), **_machine(speed)}


def _sizes(variant: Variant, baseline: Variant | None) -> Measurements:
    size = variant.model_mb
    sizes = {
        "size_mb": Measurement.exact(size, "MB"),
        "size_source_ratio": Measurement.exact(size / variant.checkpoint.size_mb, "1"),
        "bits_per_weight": Measurement.exact(variant.weights.bits_per_weight, "bits"),
        "convert_s": Measurement(value=variant.convert_s, unit="s"),
        "convert_memory_peak_mb": Measurement(value=variant.convert_memory_peak_mb, unit="MB"),
    }
    if baseline is not None:
        sizes["size_ratio"] = Measurement.exact(size / baseline.model_mb, "1")
    return sizes


def undisturbed(turns: Sequence[Turn]) -> list[Turn]:
    """The turns to take figures from: those that nothing disturbed, or all if there is no such."""
    return [turn for turn in turns if not turn.disturbed] or list(turns)


def _marked(measured: Measurements, turns: Sequence[Turn]) -> Measurements:
    """The same with a note if all the turns that they come from were disturbed."""
    if not all(turn.disturbed for turn in turns):
        return measured
    return {
        name: one.model_copy(update={"note": f"{one.note}; {MACHINE_BUSY}" if one.note else MACHINE_BUSY})
        for name, one in measured.items()
    }


def _times(speed: Speed) -> Measurements:
    """Times and rates; single figures are those of the grid's first cell, the headline.

    What a model gave no samples of is left out: of a broken one, some answers may be no text.
    """
    turns = undisturbed(speed.turns)
    headline = [timed for turn in turns for timed in turn.measured.timed if timed.cell == 0]
    gaps = _gaps(headline)
    series = {
        "decode_tok_s": ([1 / gap for gap in gaps], 50, "tokens/s"),
        "prefill_tok_s": (_prefill(speed, _lengths(speed)[-1]), 50, "tokens/s"),
        "ttft_model_ms_p50": ([(timed.first_s - timed.tokenize_s) * 1e3 for timed in headline], 50, "ms"),
    }
    for metric, samples, unit in (
        ("ttft_ms", [timed.first_s * 1e3 for timed in headline], "ms"),
        ("itl_ms", [gap * 1e3 for gap in gaps], "ms"),
        ("response_s", [timed.total_s for timed in headline], "s"),
    ):
        series |= {f"{metric}_p{percent}": (samples, percent, unit) for percent in PERCENTILES}
    measured = {name: statistics.of_percentile(*one) for name, one in series.items() if one[0]}
    if shares := _consistency(turns, speed):
        measured["decode_consistency"] = statistics.of_ratios(shares)
    return {**_marked(measured, turns), **_loads(speed), **_throughput(speed)}


def _loads(speed: Speed) -> Measurements:
    measured: Measurements = {}
    for metric, cold in (("load_s", False), ("load_cold_s", True)):
        turns = undisturbed([turn for turn in speed.turns if turn.measured.cold == cold])
        if turns:
            load = statistics.of_percentile([turn.measured.load_s for turn in turns], 50, "s")
            measured |= _marked({metric: load}, turns)
    return measured


def _throughput(speed: Speed) -> Measurements:
    """Of the one round that has it."""
    measured: Measurements = {}
    for turn in speed.turns:
        rates = {
            f"throughput_tok_s_c{sessions}": Measurement(value=rate, unit="tokens/s")
            for sessions, rate in turn.measured.throughput.items()
        }
        measured |= _marked(rates, [turn])
    return measured


def _gaps(timed: Sequence[Timed]) -> list[float]:
    return [(one.last_s - one.first_s) / (one.completion_tokens - 1) for one in timed if _has_gap(one)]


def _has_gap(timed: Timed) -> bool:
    return timed.completion_tokens > 1 and timed.last_s > timed.first_s


def _lengths(speed: Speed) -> list[int]:
    return sorted({cell.prompt_tokens for cell in speed.cells})


def _of_length(speed: Speed, prompt_tokens: int) -> list[Timed]:
    cells = {number for number, cell in enumerate(speed.cells) if cell.prompt_tokens == prompt_tokens}
    return [timed for turn in undisturbed(speed.turns) for timed in turn.measured.timed if timed.cell in cells]


def _consistency(turns: Sequence[Turn], speed: Speed) -> list[float]:
    """Per turn, the decode rate at the longest prompt as a share of that at the shortest."""
    shares = []
    for turn in turns:
        shortest, longest = (
            _gaps([one for one in turn.measured.timed if speed.cells[one.cell].prompt_tokens == tokens])
            for tokens in (_lengths(speed)[0], _lengths(speed)[-1])
        )
        if shortest and longest:
            shares.append(statistics.percentile(shortest, 50) / statistics.percentile(longest, 50))
    return shares


def _prefill(speed: Speed, prompt_tokens: int) -> list[float]:
    return [timed.prompt_tokens / timed.first_s for timed in _of_length(speed, prompt_tokens)]


def _curves(speed: Speed) -> list[CurvePoint]:
    """Each figure over the prompt length; the response time for each output length."""
    points = []
    for tokens in _lengths(speed):
        timed = _of_length(speed, tokens)
        gaps = _gaps(timed)
        series = {
            "ttft_ms": ([one.first_s * 1e3 for one in timed], "ms"),
            "prefill_tok_s": (_prefill(speed, tokens), "tokens/s"),
            "itl_ms": ([gap * 1e3 for gap in gaps], "ms"),
            "decode_tok_s": ([1 / gap for gap in gaps], "tokens/s"),
        }
        for output in sorted({cell.output_tokens for cell in speed.cells}):
            of_output = [one.total_s for one in timed if speed.cells[one.cell].output_tokens == output]
            series[f"response_s_out{output}"] = (of_output, "s")
        points += [
            CurvePoint(name=name, prompt_tokens=tokens, measurement=statistics.of_percentile(samples, 50, unit))
            for name, (samples, unit) in series.items()
            if samples
        ]
    return points


def _rows(speed: Speed) -> list[dict[str, float]]:
    """Every timed request, disturbed turns included."""
    return [
        {
            "round": number,
            "disturbed": float(turn.disturbed),
            "calibration_before_s": turn.calibration_s[0],
            "calibration_after_s": turn.calibration_s[1],
            "prompt_tokens_wanted": speed.cells[timed.cell].prompt_tokens,
            "output_tokens_wanted": speed.cells[timed.cell].output_tokens,
            **timed.model_dump(exclude={"cell"}),
        }
        for number, turn in enumerate(speed.turns)
        for timed in turn.measured.timed
    ]


def _memory(speed: Speed) -> Measurements:
    """Medians over the rounds; the peak while one user's requests are answered, loading included."""
    windows: dict[str, Callable[[speed_worker.SpeedResult], Window | None]] = {
        "memory_before_mb": lambda measured: measured.before,
        "memory_loaded_mb": lambda measured: measured.loaded,
        "memory_unloaded_mb": lambda measured: measured.unloaded,
        "memory_peak_mb": lambda measured: Window(start=measured.before.start, end=measured.measured.end),
    }
    found = {}
    for metric, window in windows.items():
        sampled = [samples for turn in speed.turns if (samples := _samples(turn, window(turn.measured)))]
        if sampled:
            found[metric] = statistics.of_percentile([max(samples) for samples in sampled], 50, "MB")
    return found


def _samples(turn: Turn, window: Window | None) -> list[float]:
    return memory_in(turn, window) if window else []


def _machine(speed: Speed) -> Measurements:
    """Processor, energy where the machine reports it, and how steady the machine was."""
    turns = undisturbed(speed.turns)
    cpu = [100 * turn.measured.cpu_s / turn.measured.wall_s for turn in turns]
    measured = {
        "cpu_percent": statistics.of_percentile(cpu, 50, "% of one core"),
        "cpu_percent_total": statistics.of_percentile([one / speed.cores for one in cpu], 50, "% of all cores"),
    }
    energy = [
        turn.measured.energy_j / turn.measured.energy_tokens
        for turn in turns
        if turn.measured.energy_j is not None and turn.measured.energy_j > 0
    ]
    if energy:
        measured["energy_j_per_token"] = statistics.of_percentile(energy, 50, "J/token")
    loops = [loop for turn in speed.turns for loop in turn.calibration_s]
    noise = Measurement(value=statistics.noise_percent(loops), unit="%", samples=len(loops))
    return {**_marked(measured, turns), "noise_percent": noise}


def _distributions(
    quality: Quality, baseline: Quality | None, checkpoint_nll: tuple[float, ...] | None
) -> Measurements:
    """Perplexity, and the distance to the baseline (quantization error) and to the checkpoint (that and conversion)."""
    measured = {"perplexity": statistics.perplexity(quality.nll)}
    if baseline is not None:
        measured["perplexity_ratio"] = statistics.perplexity_ratio(quality.nll, baseline.nll)
        if quality == baseline:  # which is not compared with itself
            zero = {f"kl_{name}": Measurement.exact(0, "nats", len(quality.nll)) for name in _KL}
            measured |= {**zero, "top1_agreement": Measurement.exact(1, "1", len(quality.nll))}
        elif distance := quality.distances.get(BASELINE):
            measured |= {
                "kl_mean": statistics.blocked_mean(distance.kl, "nats"),
                "kl_median": statistics.of_percentile(distance.kl, 50, "nats"),
                "kl_p99": statistics.of_percentile(distance.kl, 99, "nats"),
                "kl_max": Measurement.exact(max(distance.kl), "nats", len(distance.kl)),
                "top1_agreement": statistics.blocked_mean(distance.same_top, "1"),
            }
    if checkpoint_nll is not None and (distance := quality.distances.get(HUGGING_FACE)):
        measured |= {
            "hf_perplexity_ratio": statistics.perplexity_ratio(quality.nll, checkpoint_nll),
            "hf_kl_mean": statistics.blocked_mean(distance.kl, "nats"),
            "hf_top1_agreement": statistics.blocked_mean(distance.same_top, "1"),
        }
    return measured


_KL = ("mean", "median", "p99", "max")


def _answers(answers: Sequence[Answer], baseline: Sequence[Answer] | None) -> Measurements:
    judged = [answer for answer in answers if answer.correct is not None]
    ended = [answer.finish_reason for answer in answers]
    measured = {
        "unscored": Measurement.exact(len(answers) - len(judged), "items", len(answers)),
        "truncated_rate": statistics.of_proportion(ended.count("length"), len(ended)),
        "stop_rate": statistics.of_proportion(ended.count("stop"), len(ended)),
    }
    if judged:
        measured["accuracy"] = _accuracy(judged)
        for category in dict.fromkeys(answer.category for answer in judged):
            of_category = [answer for answer in judged if answer.category == category]
            measured[f"accuracy.{category}"] = _accuracy(of_category)
    scores = [answer.score for answer in answers if answer.score is not None]
    if scores:
        measured["score"] = statistics.of_mean(scores, "1")
    formats = [answer.format_valid for answer in answers if answer.format_valid is not None]
    if formats:
        measured["format_valid"] = statistics.of_proportion(sum(formats), len(formats))
    return measured | (_against(answers, baseline) if baseline is not None else {})


def _accuracy(judged: Sequence[Answer]) -> Measurement:
    right = sum(bool(answer.correct) for answer in judged)
    error = statistics.standard_error(right, len(judged))
    note = None if error is None else f"standard error {error:.3f}"
    return statistics.of_proportion(right, len(judged)).model_copy(update={"note": note})


def _against(answers: Sequence[Answer], baseline: Sequence[Answer]) -> Measurements:
    """Item by item: what changed from the baseline's answers."""
    pairs = list(zip(answers, baseline, strict=True))
    tokens = sum(answer.completion_tokens for answer in baseline)
    measured = {
        "length_ratio": Measurement.exact(
            sum(answer.completion_tokens for answer in answers) / max(tokens, 1), "1", len(answers)
        )
    }
    judged = [(bool(a.correct), bool(b.correct)) for a, b in pairs if a.correct is not None and b.correct is not None]
    if judged:
        ours, theirs = zip(*judged, strict=True)
        measured |= {
            "accuracy_drop": statistics.paired_difference(theirs, ours),
            "flips": Measurement.exact(sum(a != b for a, b in judged), "items", len(judged)),
            "mcnemar_p": Measurement.exact(statistics.mcnemar(ours, theirs), "1", len(judged)),
        }
    scored = [(a.score, b.score) for a, b in pairs if a.score is not None and b.score is not None]
    if scored:
        own, others = zip(*scored, strict=True)
        measured["score_drop"] = statistics.paired_mean_difference(others, own)
    return measured
