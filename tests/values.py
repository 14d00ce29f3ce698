"""Values as the modules pass them, made up: no Olive, no Foundry Local, no more on disk than a test asks for."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmops.conversion import store
from slmops.files import write_atomic
from slmops.models import (
    MANIFEST,
    Checkpoint,
    Choice,
    Comparison,
    Hardware,
    Recipe,
    Variant,
    VariantFile,
    VariantResult,
    Weights,
)

# SmolLM2-135M's: 576 = 9 x 64 and 1536 = 3 x 512.
SIZES = (576, 1536)
VERSIONS = dict.fromkeys(store.DECISIVE, "1.0")
# What a converted folder holds: what Foundry Local reads, and what is kept as proof.
CONTENTS = {
    "model.onnx": "graph",
    "model.onnx.data": "weights" * 100,
    "genai_config.json": '{"model": {"type": "llama"}, "search": {"max_length": 2048, "do_sample": false}}',
    "tokenizer.json": "{}",
    "olive.log": "said",
    "olive_config.json": "{}",
}


def checkpoint(**changes: Any) -> Checkpoint:
    """A checkpoint of nothing."""
    values: dict[str, Any] = {
        "name": "tiny",
        "source": "org/tiny",
        "path": Path("/checkpoints/tiny"),
        "digest": "c" * 64,
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "size_mb": 0.004,
        "context_length": 2048,
        "tied_embeddings": True,
        "linear_sizes": SIZES,
    }
    return Checkpoint(**{**values, **changes})


def variant(path: Path, name: str = "int4", files: dict[str, int] | None = None, **changes: Any) -> Variant:
    """A variant whose ``files`` (name to bytes) need not exist."""
    made_of = {"model.onnx": 1_000_000} if files is None else files
    values: dict[str, Any] = {
        "key": path.name,
        "recipe": Recipe(name=name, config={"passes": {}}, bits=4),
        "checkpoint": checkpoint(),
        "files": tuple(VariantFile(name=file, size=size, sha256="0" * 64) for file, size in made_of.items()),
        "weights": Weights(bits_per_weight=4.5, by_bits={"4": 1000}, quantized_ops={"MatMulNBits 4 bit": 7}),
        "convert_s": 20.0,
        "convert_memory_peak_mb": 900.0,
        "versions": VERSIONS,
        "hardware": Hardware(system="Linux", machine="x86_64", processor="x", cores=2, memory_gb=8, isa=("avx2",)),
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "path": path,
    }
    return Variant(**{**values, **changes})


def write_variant(folder: Path, name: str = "int4", contents: dict[str, str] | None = None) -> Variant:
    """A complete variant on disk: files of a few bytes and the manifest that fits them."""
    folder.mkdir(parents=True)
    for file, text in {**CONTENTS, **(contents or {})}.items():
        (folder / file).write_text(text, encoding="utf-8")
    made = variant(folder, name, files={}).model_copy(update={"files": store.files_of(folder)})
    write_atomic(folder / MANIFEST, made.model_dump_json(indent=2))
    return made


def result(name: str, size_mb: float, perplexity_ratio: float = 1.0, accuracy: float = 0.5) -> VariantResult:
    """A measured variant beside a baseline of 600 MB with perplexity 10."""
    metrics = {
        "size_mb": size_mb,
        "size_ratio": size_mb / 600,
        "bits_per_weight": size_mb / 20,
        "ttft_ms_p50": 123.4,
        "decode_tok_s": 45.67,
        "memory_peak_mb": 2 * size_mb,
        "perplexity": 10 * perplexity_ratio,
        "perplexity_ratio": perplexity_ratio,
        "accuracy": accuracy,
    }
    return VariantResult(name=name, status="ok", metrics=metrics)


def failed(name: str, reason: str) -> VariantResult:
    """A variant that could not be made or measured."""
    return VariantResult(name=name, status="failed", reason=reason)


def comparison(*results: VariantResult, chosen: str | None = None, reason: str = "Because.") -> Comparison:
    """The result of a job."""
    return Comparison(model="tiny", run_id="run1", choice=Choice(variant=chosen, reason=reason), variants=results)
