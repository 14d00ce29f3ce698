"""Values as the modules pass them, made up: no Olive, no Foundry Local, no more on disk than a test asks for."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops.conversion import store
from slmops.core.files import write_atomic
from slmops.core.values import (
    MANIFEST,
    Answer,
    CaseOutcome,
    Checkpoint,
    Choice,
    Comparison,
    CurvePoint,
    Evaluation,
    Extent,
    Hardware,
    Measurement,
    Recipe,
    Variant,
    VariantFile,
    VariantResult,
    Weights,
)
from slmops.foundry.versions import ModelVersion

# SmolLM2-135M's: 576 = 9 x 64 and 1536 = 3 x 512.
SIZES = (576, 1536)
VERSIONS = dict.fromkeys(store.DECISIVE, "1.0")
# What a converted folder holds: what Foundry Local reads, and what is kept as proof.
CONTENTS = {
    "model.onnx": "graph",
    "model.onnx.data": "weights" * 100,
    "genai_config.json": '{"model": {"type": "llama", "eos_token_id": 2, "pad_token_id": 2}, '
    '"search": {"max_length": 2048, "do_sample": false}}',
    "tokenizer.json": "{}",
    "olive.log": "said",
    "olive_config.json": "{}",
}


def checkpoint(**changes: Any) -> Checkpoint:
    return Checkpoint(
        name="tiny",
        source="org/tiny",
        base="org/base@v1",
        path=Path("/checkpoints/tiny"),
        digest="c" * 64,
        architecture="LlamaForCausalLM",
        parameters=1000,
        size_mb=0.004,
        context_length=2048,
        tied_embeddings=True,
        linear_sizes=SIZES,
    ).model_copy(update=changes)


def variant(path: Path, name: str = "int4", files: dict[str, int] | None = None, **changes: Any) -> Variant:
    """A variant whose ``files`` (name to bytes) need not exist."""
    made_of = {"model.onnx": 1_000_000} if files is None else files
    return Variant(
        key=path.name,
        recipe=Recipe(name=name, config={"passes": {}}, bits=4),
        checkpoint=checkpoint(),
        files=tuple(VariantFile(name=file, size=size, sha256="0" * 64) for file, size in made_of.items()),
        weights=Weights(bits_per_weight=4.5, by_bits={"4": 1000}, quantized_ops={"MatMulNBits 4 bit": 7}),
        convert_s=20.0,
        convert_memory_peak_mb=900.0,
        versions=VERSIONS,
        hardware=Hardware(system="Linux", machine="x86_64", processor="x", cores=2, memory_gb=8, isa=("avx2",)),
        created=datetime(2026, 1, 2, tzinfo=UTC),
        path=path,
    ).model_copy(update=changes)


def write_variant(folder: Path, name: str = "int4", contents: dict[str, str] | None = None) -> Variant:
    """A complete variant on disk: files of a few bytes and the manifest that fits them."""
    folder.mkdir(parents=True)
    for file, text in {**CONTENTS, **(contents or {})}.items():
        (folder / file).write_text(text, encoding="utf-8")
    made = variant(folder, name, files={}).model_copy(update={"files": store.files_of(folder)})
    write_atomic(folder / MANIFEST, made.model_dump_json(indent=2))
    return made


def result(
    name: str,
    size_mb: float,
    perplexity_ratio: float = 1.0,
    accuracy: float = 0.5,
    *,
    spread: float = 0.0,
    changes: dict[str, Measurement | None] | None = None,
) -> VariantResult:
    """A measured variant beside a baseline of 600 MB with perplexity 10 and accuracy 0.5.

    ``spread`` is the half-width of the intervals of the sampled figures; ``changes`` are measurements to add, to
    replace, or to leave out (None).
    """

    def sampled(value: float, unit: str, samples: int, width: float = spread) -> Measurement:
        return Measurement(value=value, unit=unit, samples=samples, low=value - width, high=value + width)

    measurements: dict[str, Measurement | None] = {
        "size_mb": Measurement.exact(size_mb, "MB"),
        "size_ratio": Measurement.exact(size_mb / 600, "1"),
        "bits_per_weight": Measurement.exact(size_mb / 20, "bits"),
        "ttft_ms_p50": sampled(123.4, "ms", 20),
        "decode_tok_s": sampled(45.67, "tokens/s", 20, 20 * spread),
        "decode_consistency": Measurement.exact(0.9, "1"),
        "memory_peak_mb": Measurement.exact(2 * size_mb, "MB"),
        "perplexity": sampled(10 * perplexity_ratio, "1", 3072, 10 * spread),
        "perplexity_ratio": sampled(perplexity_ratio, "1", 3072),
        "kl_mean": sampled(abs(perplexity_ratio - 1) / 2, "nats", 3072, spread / 10),
        "accuracy": sampled(accuracy, "1", 40),
        "accuracy_drop": sampled(0.5 - accuracy, "1", 40),
        "edge_cases_passed": Measurement.exact(1.0, "1"),
        **(changes or {}),
    }
    made = {metric: measurement for metric, measurement in measurements.items() if measurement is not None}
    values = {metric: measurement.value for metric, measurement in made.items()}
    return VariantResult(name=name, status="ok", metrics=values, measurements=made)


def model_version(number: int, **changes: Any) -> ModelVersion:
    """A version in the registry; nothing of it exists."""
    return ModelVersion(
        name="bot",
        version=number,
        variant="int8",
        location=f"mlflow-artifacts:/1/models/m-{number}/artifacts",
        manifest_sha256="0" * 64,
        size_mb=100,
        memory_mb=900,
        device="cpu",
        provider="CPUExecutionProvider",
        run_id=f"run-{number}",
        job_id=f"job-{number}",
        created=datetime(2026, 1, 2, tzinfo=UTC),
    ).model_copy(update=changes)


def failed(name: str, reason: str) -> VariantResult:
    return VariantResult(name=name, status="failed", reason=reason)


def comparison(*results: VariantResult, chosen: str | None = None, reason: str = "Because.") -> Comparison:
    return Comparison(model="tiny", run_id="run1", choice=Choice(variant=chosen, reason=reason), variants=results)


EXTENT = Extent(tokens=512, all_tokens=9000, questions=3, all_questions=3)


def evaluation(changes: dict[str, Measurement | None] | None = None, **others: Any) -> Evaluation:
    """What was measured of a variant, with each kind of figure, answer and edge case once.

    ``changes`` are measurements to add or replace, or to leave out (None); ``others`` any other field.
    """
    measured: dict[str, Measurement | None] = {
        "size_mb": Measurement.exact(110.5, "MB"),
        "ttft_ms_p50": Measurement(value=81.0, unit="ms", samples=12, low=78.5, high=84.0),
        "load_s": Measurement(value=1.5, unit="s", note="indicative: 1 sample"),
        "perplexity": Measurement(value=12.83, unit="1", samples=3072, low=12.1, high=13.6),
        "accuracy": Measurement(value=0.5, unit="1", samples=2, low=0.1, high=0.9),
        "accuracy.low": Measurement(value=0.5, unit="1", samples=2, low=0.1, high=0.9),  # a category may be called so
        **(changes or {}),
    }
    same: dict[str, Any] = {"finish_reason": "stop", "seconds": 0.5, "completion_tokens": 3}
    low: dict[str, Any] = {"category": "low", "prompt": "France?", "expected": "Paris", **same}
    style: dict[str, Any] = {"category": "style", "prompt": "Greet.", "expected": "", **same}
    answers = (
        Answer(id="1", answer="Paris, né 東京", correct=True, score=1.0, **low),
        Answer(id="2", answer="", correct=False, format_valid=False, **low),
        Answer(id="free", answer="Hi", correct=None, reason="?", **style),
    )
    return Evaluation(
        measurements={name: one for name, one in measured.items() if one is not None},
        answers=answers,
        cases=(CaseOutcome(id="empty", expected="refused", outcome="answered", passed=False, detail="It said Hi."),),
        curves=tuple(
            CurvePoint(name=name, prompt_tokens=tokens, measurement=Measurement(value=tokens * factor, unit="ms"))
            for name, factor in (("ttft_ms", 0.7), ("itl_ms", 0.1))
            for tokens in (32, 128, 512)
        ),
        samples=({"prompt_tokens": 32, "first_s": 0.08},),
        evaluation_set_digest="e" * 64,
        text_digest="f" * 64,
        extent=EXTENT,
    ).model_copy(update=others)
