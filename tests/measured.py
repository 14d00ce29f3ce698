"""Raw results of a measurement, made up so that its figures can be worked out by other means."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from slmops.core.job import Job
from slmops.core.values import Answer, CaseOutcome, Extent, Measurement
from slmops.evaluation import dataset
from slmops.evaluation.drift import Recorded
from slmops.evaluation.logits_worker import Distance
from slmops.evaluation.quality import Quality
from slmops.evaluation.speed import Cell, Speed, SpeedResult, Timed, Turn
from tests import values

QUIET, BUSY = (1.0, 1.0), (1.0, 2.0)  # seconds of the calibration loops before and after a turn
CASES = (
    CaseOutcome(id="empty", expected="answered", outcome="answered", passed=True, detail=""),
    CaseOutcome(id="emoji", expected="answered", outcome="crashed", passed=False, detail=""),
)


def timed(first_s: float, last_s: float, completion: int = 11, **other: Any) -> Timed:
    """A request of the headline cell, with 40 prompt tokens of which the template takes 0.05 s."""
    values = {"cell": 0, "prompt_tokens": 40, "total_s": last_s + 0.5, "tokenize_s": 0.05, **other}
    return Timed(completion_tokens=completion, first_s=first_s, last_s=last_s, **values)


def turn(*requests: Timed, loops: tuple[float, float] = QUIET, memory: Any = ((0.5, 50.0),), **other: Any) -> Turn:
    """A round of one variant; what it does not say is some number that no test asks for."""
    values = {
        "load_s": 1.5,
        "cold": False,
        "before": (0, 1),
        "loaded": (2, 3),
        "measured": (3, 8),
        "unloaded": (9, 10),
        "cpu_s": 9.0,
        "energy_j": None,
        "energy_tokens": 100,
        "throughput": {},
        **other,
    }
    measured = SpeedResult(timed=requests, **values)
    return Turn(measured=measured, calibration_s=loops, disturbed=loops == BUSY, memory=memory)


def speed(*turns: Turn, cells: Sequence[tuple[int, int]] = ((128, 16),), cores: int = 4) -> Speed:
    """Turns on a grid of (prompt tokens, output tokens)."""
    grid = tuple(Cell(prompt_tokens=prompt, output_tokens=output, text="", repetitions=1) for prompt, output in cells)
    return Speed(cells=grid, turns=turns, cores=cores)


def answer(number: int, correct: bool | None = True, **changes: Any) -> Answer:
    """An answer of ten tokens that was judged right or wrong without degrees."""
    said = {"category": "general", "prompt": "Q", "expected": "A", "answer": "A", "finish_reason": "stop"}
    score = None if correct is None else float(correct)
    figures = {"correct": correct, "score": score, "seconds": 1.0, "completion_tokens": 10}
    return Answer(**{"id": str(number), **said, **figures, **changes})


def answers(*correct: bool | None) -> tuple[Answer, ...]:
    return tuple(answer(number, one) for number, one in enumerate(correct))


def quality(
    nll: Sequence[float] = (1.0, 2.0), answered: tuple[Answer, ...] | None = None, **distances: Distance
) -> Quality:
    """Negative log-likelihoods, answers and distances to the references."""
    said = answers(True, False) if answered is None else answered
    return Quality(
        nll=tuple(nll),
        distances=distances,
        answers=said,
        extent=Extent(tokens=len(nll) + 1, all_tokens=9000, questions=len(said), all_questions=12),
        cases=CASES,
        text_digest="t" * 64,
        evaluation_set_digest="e" * 64,
    )


HERE = "this machine"


def recorded(**changes: Any) -> Recorded:
    """What a job with the packaged evaluation set and text recorded of a variant, on this kind of machine."""
    digests = (dataset.load(None).digest, dataset.perplexity_text(None)[1])
    fields: dict[str, Any] = {
        "run_id": "run-3",
        "job": Job(model="demo"),
        "hardware_kind": HERE,
        "variant": values.variant(Path("/nowhere")),
        "measurements": {"decode_tok_s": Measurement.exact(50, "tokens/s")},
        "answers": answers(True, True, True),
        "tokens": 2048,
        "evaluation_set": None,
        "evaluation_set_digest": digests[0],
        "text": None,
        "text_digest": digests[1],
        **changes,
    }
    return Recorded(**fields)


def word_tokenizer(folder: Path) -> None:
    """A tokenizer with a token for each word, and a chat template of two tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("<s> {{ messages[0]['content'] }} <a>")
