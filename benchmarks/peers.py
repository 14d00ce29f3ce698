"""Print how our variants compare with llama.cpp's quantized files of the same checkpoint: size, quality, speed, memory.

    python benchmarks/peers.py CHECKPOINT [[LABEL=]FOLDER...] [--part quality|speed] [--rounds 5] [--gguf FOLDER]

CHECKPOINT is what `slmops run --model` takes, each FOLDER an ONNX variant of it with genai_config.json, such as
SLMOPS_HOME/foundry/models/slmops/NAME-int4-generic-cpu-1; without one, those of all shipped recipes are made. llama.cpp
makes its files itself, from the checkpoint in fp32; --gguf keeps them for the next time. Without the extra "peers"
(docs/measuring.md) only ours are printed.

Quality is that of a job: the same text, tokens and windows, relative to the checkpoint in transformers. Speed is
measured in interleaved rounds, each turn in a process of its own: ours through Foundry Local, theirs in process with a
thread for each physical core. Both get the same text, and render and tokenize it within the time to first token.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import tabulate
from conversion import not_at_all

from slmops.checkpoints import source
from slmops.conversion import convert, recipes
from slmops.core import machine
from slmops.core.errors import EvaluationError
from slmops.core.files import write_atomic
from slmops.core.job import BASELINE, SHIPPED, Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Measurement, Registration, is_weights
from slmops.evaluation import dataset, gguf_worker, logits_worker, prompts, speed, statistics
from slmops.evaluation.gguf_worker import GgufRequest
from slmops.evaluation.logits_worker import LogitsRequest, LogitsResult
from slmops.evaluation.speed import Cell, SpeedRequest
from slmops.foundry.layout import CHUNK, GENAI_CONFIG, INFERENCE_MODEL, for_this_machine, stage
from slmops.foundry.register import register
from slmops.processes import children
from slmops.processes.children import Finished, Request, Result

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "IQ4_NL", "Q4_0")
PAIRS = {"int8": "Q8_0", "int4": "Q4_K_M"}
"""What is in a label of ours, and the type that it is compared with."""
TOKENS = 2048
CALIBRATION = 100_000  # the character from which the text is for int4-calibrated
LENGTHS = (128, 512, 1024)  # prompt tokens; the decode rate is that after the first
OUTPUT, REPETITIONS = 48, 5  # at the first length, in each turn
LONG_REPETITIONS = 2  # of the others
TOLERANCE = 1e-3
FIGURES = ("tokens/s", *(f"first ms {length}" for length in LENGTHS), "memory MB")
Row = dict[str, str]


class Contest:
    """The checkpoint, our folders by label, and llama.cpp's files by type."""

    def __init__(self, checkpoint: Checkpoint, ours: dict[str, Path], types: list[str], gguf: Path, work: Path) -> None:
        self.checkpoint, self.ours, self.scratch = checkpoint.path.resolve(), ours, work
        self.fastest = speed.calibrate()
        self.fp32_mb = checkpoint.parameters * 4 / 1e6
        self.theirs = {kind: gguf / f"{kind}.gguf" for kind in types}
        if types:
            request = GgufRequest(checkpoint=self.checkpoint, folder=gguf, types=tuple(types), tolerance=TOLERANCE)
            made, _ = self.call(gguf_worker.handle, request)
            print(f"llama.cpp: {made.system_info}\nits logits in fp32 differ by {made.error:.1g} of the largest one\n")

    def call(self, handle: Callable[[Request], Result], request: Request) -> tuple[Result, Finished]:
        log = self.scratch / "peers.log"
        env = children.STEADY_MALLOC
        return children.call(handle, request, log=log, timeout_s=3600, error=EvaluationError, env=env)

    # --- quality

    def quality(self, of: str) -> dict[str, Row]:
        """Size, and the distance to the checkpoint on a text."""
        text = self.scratch / "text.txt"
        write_atomic(text, of)
        reference = self.scratch / "checkpoint.f32"

        def score(folder: Path, **how: object) -> LogitsResult:
            asked = {"folder": folder, "text": text, "tokens": TOKENS, "context_length": TOKENS, **how}
            return self.call(logits_worker.handle, LogitsRequest.model_validate(asked))[0]

        exact = score(self.checkpoint, hugging_face=True, write=reference)
        compare = {"references": {"checkpoint": reference}}
        rows = {}
        for label, folder in self.ours.items():
            size = sum(file.stat().st_size for file in folder.iterdir() if is_weights(file.name))
            rows[label] = self._row(size, score(folder, **compare), exact)
        for kind, file in self.theirs.items():
            rows[kind] = self._row(file.stat().st_size, score(self.checkpoint, gguf=file, **compare), exact)
        return rows

    def _row(self, size: int, scored: LogitsResult, exact: LogitsResult) -> Row:
        distance = scored.distances["checkpoint"]
        return {
            "MB": f"{size / 1e6:.1f}",
            "of fp32": f"{size / 1e6 / self.fp32_mb:.3f}",
            "perplexity ratio": _text(statistics.perplexity_ratio(scored.nll, exact.nll), ".3f"),
            "KL mean": _text(statistics.blocked_mean(distance.kl, "nats"), ".4f"),
            "top-1": _text(statistics.blocked_mean(distance.same_top, "1"), ".3f"),
        }

    # --- speed

    def speed(self, rounds: int) -> tuple[dict[str, Row], list[list[str]]]:
        """The medians, and ours by theirs for each pair, round by round."""
        staged = {label: self._stage(label, folder) for label, folder in self.ours.items()}
        context = min(one.context_length for one in staged.values()) if staged else 2 * LENGTHS[-1]
        texts = prompts.of_lengths(list(LENGTHS), context - OUTPUT, self.checkpoint)
        cells = tuple(
            Cell(prompt_tokens=length, output_tokens=2 if number else OUTPUT, text=text, repetitions=repetitions)
            for number, (length, text) in enumerate(texts.items())
            for repetitions in (LONG_REPETITIONS if number else REPETITIONS,)
        )
        asked = {label: one.model_copy(update={"cells": cells}) for label, one in staged.items()}
        for kind, file in self.theirs.items():
            where = {"home": self.scratch, "folder": self.checkpoint, "foundry_id": kind, "context_length": context}
            asked[kind] = SpeedRequest(**where, cells=cells, gguf=file)
        turns: dict[str, list[dict[str, list[float]]]] = {label: [] for label in asked}
        for number in range(rounds):
            for label in list(asked) if number % 2 else list(asked)[::-1]:
                turns[label].append(self._turn(label, asked[label]))
        medians = {
            label: {
                figure: _text(statistics.percentile_of_rounds([one[figure] for one in own], 50, ""), ".1f")
                for figure in FIGURES
            }
            for label, own in turns.items()
        }
        ratios = []
        for label in self.ours:
            for kind in (kind for name, kind in PAIRS.items() if name in label and kind in self.theirs):
                each = [
                    statistics.of_ratios(
                        [median(o[figure]) / median(t[figure]) for o, t in zip(turns[label], turns[kind], strict=True)]
                    )
                    for figure in FIGURES
                ]
                ratios.append([f"{label} / {kind}", *(_text(one, ".3f") for one in each)])
        return medians, ratios

    def _turn(self, label: str, asked: SpeedRequest) -> dict[str, list[float]]:
        """The samples of each figure, in a process of its own; once more, at most twice, if the machine was busy."""
        for attempt in range(3):
            before = speed.calibrate()
            measured, finished = self.call(speed.handle, asked)
            loops = (before, speed.calibrate())
            self.fastest = min(self.fastest, *loops)
            if max(loops) <= speed.DISTURBED * self.fastest:
                break
            print(f"{label}: the machine was busy{', and the figures count' * (attempt == 2)}", flush=True)
        cells = range(len(asked.cells))
        first = [[one.first_s * 1e3 for one in measured.timed if one.cell == at] for at in cells]
        rates = [1 / one.gap_s for one in measured.timed if one.cell == 0 and one.gap_s]
        return dict(zip(FIGURES, (rates, *first, [finished.memory_peak_mb]), strict=True))

    def _stage(self, label: str, folder: Path) -> SpeedRequest:
        registration = Registration(foundry_id=f"{label}-generic-cpu:1", path=folder, answer="")
        staged = stage(registration, self.scratch / label, fixed_length=True)
        if not (folder / INFERENCE_MODEL).exists():  # it is not registered yet, which would do this
            file = staged.folder / GENAI_CONFIG
            config = json.loads(file.read_text(encoding="utf-8"))
            config["search"].setdefault("chunk_size", CHUNK)
            config = for_this_machine(config)
            write_atomic(file, json.dumps(config))
        return SpeedRequest(**staged.model_dump(), cells=())


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("ours", nargs="*", metavar="[LABEL=]FOLDER")
    parser.add_argument("--part", choices=("quality", "speed"), help="both by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--gguf", type=Path)
    asked = parser.parse_args()
    named = [
        (label or Path(folder).name, Path(folder)) for label, _, folder in (one.rpartition("=") for one in asked.ours)
    ]
    here = machine.hardware()
    print(f"{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}, {' '.join(here.isa)}")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = source.resolve(Job(model=asked.checkpoint), Settings(), download=not_at_all)
        ours = dict(named) or _shipped(checkpoint, Settings(home=scratch / "home"))
        types = asked.types if find_spec("llama_cpp") else []
        contest = Contest(checkpoint, ours, types, asked.gguf or scratch / "gguf", scratch)
        if asked.part != "speed":
            print_rows(contest.quality(dataset.perplexity_text(None)[0]))
        if asked.part != "quality":
            medians, ratios = contest.speed(asked.rounds)
            print_rows(medians)
            if ratios:
                print(tabulate.tabulate(ratios, ["ours / theirs", *FIGURES], disable_numparse=True), end="\n\n")


def _shipped(checkpoint: Checkpoint, settings: Settings) -> dict[str, Path]:
    """Each recipe's variant of a checkpoint, as it is deployed."""
    text = settings.home / "calibration.txt"  # of the same kind as what is measured, and far behind it
    write_atomic(text, dataset.perplexity_text(None)[0][CALIBRATION:])
    job = Job(model=str(checkpoint.path), precision=list(SHIPPED), baseline=BASELINE, calibration_text=text)
    return {name: one.path for name, one in registered(checkpoint, job, settings).items()}


def registered(checkpoint: Checkpoint, job: Job, settings: Settings) -> dict[str, Registration]:
    """Each variant of a job, as it is deployed."""
    planned = convert.in_order(recipes.for_job(job, checkpoint, settings))
    context = JobContext(job, "peers", checkpoint, settings)
    with convert.together("peers", settings) as child:
        made = [convert.convert(recipe, context, child) for recipe in planned]
    return {one.name: register(one, "peers", job, settings) for one in made}


def print_rows(rows: dict[str, Row]) -> None:
    """A table of them."""
    table = [[label, *row.values()] for label, row in rows.items()]
    headers = ["", *next(iter(rows.values()))]
    print(tabulate.tabulate(table, headers, disable_numparse=True), end="\n\n", flush=True)


def _text(one: Measurement, form: str) -> str:
    ends = f" [{one.low:{form}}, {one.high:{form}}]" if one.low is not None and one.low != one.high else ""
    return f"{one.value:{form}}{ends}"


if __name__ == "__main__":
    main()
