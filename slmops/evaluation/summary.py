"""From raw results to the figures of a variant. Pure functions.

The definitions are those of the usual serving benchmarks. Times of a request run from its start. All pieces of text
come from the runtime's stream, and all token counts from its usage, because a piece need not be one token.

- time to first token: to the first non-empty piece; rendering the chat template and tokenizing included. ``ttft_model``
  is less the time that rendering and tokenizing the same prompt take here.
- inter-token latency: (last piece - first piece) / (generated tokens - 1). Decode rate: its inverse.
- prefill rate: prompt tokens / time to first token.
- response time: to the end of the stream.
"""

from collections.abc import Callable, Sequence
from itertools import product
from statistics import median

from slmops.core.values import Answer, Checkpoint, CurvePoint, Evaluation, Measurement, Variant
from slmops.evaluation import edge_cases, statistics
from slmops.evaluation.quality import BASELINE_REFERENCE, CHECKPOINT_REFERENCE, Quality
from slmops.evaluation.speed import Speed, Timed, Turn

PERCENTILES = (50, 90, 99)
REQUEST_FIGURES: dict[str, tuple[str, Callable[[Timed], float | None]]] = {
    "ttft_ms": ("ms", lambda one: one.first_s * 1e3),
    "ttft_model_ms": ("ms", lambda one: (one.first_s - one.tokenize_s) * 1e3),
    "prefill_tok_s": ("tokens/s", lambda one: one.prompt_tokens / one.first_s),
    "itl_ms": ("ms", lambda one: one.gap_s and one.gap_s * 1e3),
    "decode_tok_s": ("tokens/s", lambda one: one.gap_s and 1 / one.gap_s),
    "response_s": ("s", lambda one: one.total_s),
}
"""Name to unit, and to the figure of one request; None: it has none."""
OF_MACHINE = (
    *("convert_", "load_", "ttft_", "itl_", "response_", "decode_", "prefill_", "throughput_"),
    *("memory_", "cpu_", "energy_", "noise_"),
)
"""Prefixes of the metrics that depend on the machine: they can only be compared on machines of one kind."""
MACHINE_BUSY = "the machine was busy with something else"
Measurements = dict[str, Measurement]


def evaluation(
    variant: Variant,
    speed: Speed | None,
    quality: Quality,
    baseline: tuple[float, Quality] | None,
    checkpoint_nll: tuple[float, ...] | None,
) -> Evaluation:
    """All figures of a variant, those relative to the baseline (its MB and quality) only if there is one, and every
    timed request; none of speed where its device is not."""
    measured = {
        **of_peer(variant.model_mb, variant.checkpoint, speed, quality, baseline, checkpoint_nll),
        "bits_per_weight": Measurement.exact(variant.weights.bits_per_weight, "bits"),
        "tokenizer_mismatches": Measurement.exact(variant.checkpoint.tokenizer_mismatches, "texts"),
        "template_mismatches": Measurement.exact(variant.checkpoint.template_mismatches, "conversations"),
        "convert_s": Measurement(value=variant.convert_s, unit="s"),
        "convert_memory_peak_mb": Measurement(value=variant.convert_memory_peak_mb, unit="MB"),
        **_answers(quality.answers, baseline[1].answers if baseline else None),
    }
    if quality.cases:
        measured["edge_cases_passed"] = edge_cases.measurement(quality.cases)
    return Evaluation(
        measurements=measured,
        answers=quality.answers,
        cases=quality.cases,
        curves=tuple(_curves(speed)) if speed else (),
        samples=_samples(speed) if speed else (),
        evaluation_set_digest=quality.evaluation_set_digest,
        text_digest=quality.text_digest,
        extent=quality.extent,
    )


def _samples(speed: Speed) -> tuple[dict[str, float], ...]:
    return tuple(
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
    )


def of_peer(
    size_mb: float,
    checkpoint: Checkpoint,
    speed: Speed | None,
    quality: Quality,
    baseline: tuple[float, Quality] | None,
    checkpoint_nll: tuple[float, ...] | None,
) -> Measurements:
    """The figures that any file of weights has, ONNX or not."""
    measured = {
        "size_mb": Measurement.exact(size_mb, "MB"),
        "size_source_ratio": Measurement.exact(size_mb / checkpoint.size_mb, "1"),
        **(of_speed(speed) if speed else {}),
        **_distributions(quality, baseline[1] if baseline else None, checkpoint_nll),
    }
    if baseline:
        measured["size_ratio"] = Measurement.exact(size_mb / baseline[0], "1")
    return measured


def of_checkpoint(checkpoint: Checkpoint, quality: Quality) -> Measurements:
    """The figures of a checkpoint that is the baseline itself."""
    return {
        "size_mb": Measurement.exact(checkpoint.size_mb, "MB"),
        "perplexity": statistics.perplexity(quality.nll),
        **_answers(quality.answers, None),
    }


def of_speed(speed: Speed) -> Measurements:
    """The figures that depend on the machine, which includes how steady it was and its energy if it reports that."""
    turns = _undisturbed(speed.turns)
    cpu = [100 * one.cpu_s / (one.measured[1] - one.measured[0]) for one in (turn.measured for turn in turns)]
    measured = {
        "cpu_percent": statistics.of_percentile(cpu, 50, "% of one core"),
        "cpu_percent_total": statistics.of_percentile([one / speed.cores for one in cpu], 50, "% of all cores"),
    }
    # A counter that wrapped round gives a negative energy.
    energies = [(turn.measured.energy_j or 0, turn.measured.energy_tokens) for turn in turns]
    if energy := [joules / tokens for joules, tokens in energies if joules > 0]:
        measured["energy_j_per_token"] = statistics.of_percentile(energy, 50, "J/token")
    loops = [loop for turn in speed.turns for loop in turn.calibration_s]
    noise = Measurement(value=statistics.noise_percent(loops), unit="%", samples=len(loops))
    return {**_times(speed), **_memory(speed), **_marked(measured, turns), "noise_percent": noise}


def disturbed(speed: Speed) -> bool:
    """Whether the machine was busy with something else while one of the figures was measured."""
    return any(one.disturbed for one in of_speed(speed).values())


def _undisturbed(turns: Sequence[Turn]) -> list[Turn]:
    """The turns to take figures from: the undisturbed ones, or all if there are none."""
    return [turn for turn in turns if not turn.disturbed] or list(turns)


def _marked(measured: Measurements, turns: Sequence[Turn]) -> Measurements:
    """The same, marked if all the turns behind them were disturbed."""
    if not all(turn.disturbed for turn in turns):
        return measured
    notes = {name: "; ".join(filter(None, (one.note, MACHINE_BUSY))) for name, one in measured.items()}
    return {n: one.model_copy(update={"note": notes[n], "disturbed": True}) for n, one in measured.items()}


def _times(speed: Speed) -> Measurements:
    """Times and rates, of the grid's first cell if they are single figures; some answers may hold no text to time."""
    turns = _undisturbed(speed.turns)
    headline = [[timed for timed in turn.measured.timed if timed.cell == 0] for turn in turns]
    longest = _of_length(speed, turns, _lengths(speed)[-1])
    found = {
        "decode_tok_s": _figure("decode_tok_s", headline),
        "prefill_tok_s": _figure("prefill_tok_s", longest),
        "ttft_model_ms_p50": _figure("ttft_model_ms", headline),
    }
    for figure, percent in product(("ttft_ms", "itl_ms", "response_s"), PERCENTILES):
        found[f"{figure}_p{percent}"] = _figure(figure, headline, percent)
    measured = {name: one for name, one in found.items() if one is not None}
    # The decode rate at the longest prompt as a share of that at the shortest, in each turn that has both.
    gaps = [
        [[timed.gap_s for timed in one if timed.gap_s] for one in requests]
        for requests in (_of_length(speed, turns, _lengths(speed)[0]), longest)
    ]
    if shares := [median(short) / median(long) for short, long in zip(*gaps, strict=True) if short and long]:
        measured["decode_consistency"] = statistics.of_ratios(shares)
    measured = _marked(measured, turns)
    for metric, cold in (("load_s", False), ("load_cold_s", True)):
        if loaded := _undisturbed([turn for turn in speed.turns if turn.measured.cold == cold]):
            load = statistics.of_percentile([turn.measured.load_s for turn in loaded], 50, "s")
            measured |= _marked({metric: load}, loaded)
    for turn in speed.turns:  # one of which measures several sessions at once
        rates = {
            f"throughput_tok_s_c{sessions}": Measurement(value=rate, unit="tokens/s")
            for sessions, rate in turn.measured.throughput.items()
        }
        measured |= _marked(rates, [turn])
    return measured


def _figure(name: str, rounds: Sequence[Sequence[Timed]], percent: float = 50) -> Measurement | None:
    """A percentile over the requests of all rounds; None if no request has this figure."""
    unit, figure = REQUEST_FIGURES[name]
    values = [[value for timed in one if (value := figure(timed)) is not None] for one in rounds]
    filled = [one for one in values if one]
    return statistics.percentile_of_rounds(filled, percent, unit) if filled else None


def _lengths(speed: Speed) -> list[int]:
    return sorted({cell.prompt_tokens for cell in speed.cells})


def _of_length(speed: Speed, turns: Sequence[Turn], prompt_tokens: int) -> list[list[Timed]]:
    """The requests with prompts of one length, by turn."""
    cells = {number for number, cell in enumerate(speed.cells) if cell.prompt_tokens == prompt_tokens}
    return [[timed for timed in turn.measured.timed if timed.cell in cells] for turn in turns]


def _curves(speed: Speed) -> list[CurvePoint]:
    """Each figure over the prompt length; the response time for each output length."""
    turns = _undisturbed(speed.turns)
    points = []
    for tokens in _lengths(speed):
        rounds = _of_length(speed, turns, tokens)
        series = {name: _figure(name, rounds) for name in ("ttft_ms", "prefill_tok_s", "itl_ms", "decode_tok_s")}
        for output in sorted({cell.output_tokens for cell in speed.cells}):
            of_output = [[one for one in timed if speed.cells[one.cell].output_tokens == output] for timed in rounds]
            series[f"response_s_out{output}"] = _figure("response_s", of_output)
        points += [
            CurvePoint(name=name, prompt_tokens=tokens, measurement=measurement)
            for name, measurement in series.items()
            if measurement is not None
        ]
    return points


def _memory(speed: Speed) -> Measurements:
    """Medians over the rounds of the largest sample in a window; the peak spans loading and one user's requests."""
    sampled: dict[str, list[float]] = {}
    for turn in speed.turns:
        measured = turn.measured
        windows = {
            "memory_before_mb": measured.before,
            "memory_loaded_mb": measured.loaded,
            "memory_unloaded_mb": measured.unloaded,
            "memory_peak_mb": (measured.before[0], measured.measured[1]),
        }
        for metric, window in windows.items():
            if window and (samples := turn.memory_in(window)):
                sampled.setdefault(metric, []).append(max(samples))
    return {metric: statistics.of_percentile(largest, 50, "MB") for metric, largest in sampled.items()}


def _distributions(
    quality: Quality, baseline: Quality | None, checkpoint_nll: tuple[float, ...] | None
) -> Measurements:
    """Perplexity, and the distance to the baseline (quantization error) and to the checkpoint (that and conversion)."""
    measured = {"perplexity": statistics.perplexity(quality.nll)}
    if baseline is not None:
        measured["perplexity_ratio"] = statistics.perplexity_ratio(quality.nll, baseline.nll)
        if quality == baseline:  # which is not compared with itself
            zero = Measurement.exact(0, "nats", len(quality.nll))
            measured |= {f"kl_{name}": zero for name in ("mean", "median", "p99", "max")}
            measured |= {"top1_agreement": Measurement.exact(1, "1", len(quality.nll))}
        elif distance := quality.distances.get(BASELINE_REFERENCE, quality.distances.get(CHECKPOINT_REFERENCE)):
            measured |= {
                "kl_mean": statistics.blocked_mean(distance.kl, "nats"),
                "kl_median": statistics.blocked_percentile(distance.kl, 50, "nats"),
                "kl_p99": statistics.blocked_percentile(distance.kl, 99, "nats"),
                "kl_max": Measurement.exact(max(distance.kl), "nats", len(distance.kl)),
                "top1_agreement": statistics.blocked_mean(distance.same_top, "1"),
            }
    if checkpoint_nll is not None and (distance := quality.distances.get(CHECKPOINT_REFERENCE)):
        measured |= {
            "hf_perplexity_ratio": statistics.perplexity_ratio(quality.nll, checkpoint_nll),
            "hf_kl_mean": statistics.blocked_mean(distance.kl, "nats"),
            "hf_top1_agreement": statistics.blocked_mean(distance.same_top, "1"),
        }
    return measured


def _answers(answers: Sequence[Answer], baseline: Sequence[Answer] | None) -> Measurements:
    judged = [answer for answer in answers if answer.correct is not None]
    ended = [answer.finish_reason for answer in answers]
    measured = {
        "unscored": Measurement.exact(len(answers) - len(judged), "items", len(answers)),
        "truncated_rate": statistics.of_proportion(ended.count("length"), len(ended)),
        "stop_rate": statistics.of_proportion(ended.count("stop") + ended.count("tool_calls"), len(ended)),
    }
    if judged:
        measured["accuracy"] = _accuracy(judged)
        for category in dict.fromkeys(answer.category for answer in judged):
            measured[f"accuracy.{category}"] = _accuracy([one for one in judged if one.category == category])
    if scores := [answer.score for answer in answers if answer.score is not None]:
        measured["score"] = statistics.of_mean(scores, "1")
    if formats := [answer.format_valid for answer in answers if answer.format_valid is not None]:
        measured["format_valid"] = statistics.of_proportion(sum(formats), len(formats))
    return measured | (_against(answers, baseline) if baseline is not None else {})


def _accuracy(judged: Sequence[Answer]) -> Measurement:
    """With the standard error (Miller, 2024, Adding Error Bars to Evals, arXiv:2411.00640); one sample has none."""
    from scipy.stats import sem

    right = [bool(answer.correct) for answer in judged]
    note = f"standard error {sem(right):.3f}" if len(right) > 1 else None
    return statistics.of_proportion(sum(right), len(right)).model_copy(update={"note": note})


def _against(answers: Sequence[Answer], baseline: Sequence[Answer]) -> Measurements:
    """Item by item: what changed from the baseline's answers."""
    pairs = list(zip(answers, baseline, strict=True))
    tokens = sum(answer.completion_tokens for answer in baseline)
    ratio = sum(answer.completion_tokens for answer in answers) / max(tokens, 1)
    measured = {"length_ratio": Measurement.exact(ratio, "1", len(answers))}
    if judged := [(bool(a.correct), bool(b.correct)) for a, b in pairs if None not in (a.correct, b.correct)]:
        ours, theirs = zip(*judged, strict=True)
        measured |= {
            "accuracy_drop": statistics.paired_difference(theirs, ours),
            "flips": Measurement.exact(sum(a != b for a, b in judged), "items", len(judged)),
            "mcnemar_p": Measurement.exact(statistics.mcnemar(ours, theirs), "1", len(judged)),
        }
    if scored := [(a.score, b.score) for a, b in pairs if a.score is not None and b.score is not None]:
        own, others = zip(*scored, strict=True)
        measured["score_drop"] = statistics.paired_mean_difference(others, own)
    return measured
