"""Precision name -> Olive workflow config, as plain data.

Each recipe was chosen by measuring what works on the CPU; the obvious ones do not (ModelBuilder fp16 is refused for the
CPU provider, its int8 raises KeyError inside, dynamic int8 loses quality). ModelBuilder writes tied embeddings
twice, so a checkpoint that ties them gets a TieWordEmbeddings surgery, which takes a sixth off a 135 M model.
"""

from __future__ import annotations

from typing import Any

from slmops.core.errors import RecipeError
from slmops.core.job import BASELINE, Job
from slmops.core.values import Checkpoint, Recipe

INT8_GROUP = 32
BLOCK_SIZES = (16, 32, 64, 128, 256)


def for_job(job: Job, checkpoint: Checkpoint) -> list[Recipe]:
    """The recipes of a job's precision names, the baseline first and always among them.

    Raises:
        RecipeError: A precision or block size that cannot work, before any work is done.
    """
    if job.device != "cpu" or job.provider != "CPUExecutionProvider":
        raise RecipeError(
            f"device {job.device} with {job.provider} is not supported: the recipes are made and proven for the CPU, "
            "and a variant for a GPU could not be loaded and checked here.",
            "Use --device cpu --provider CPUExecutionProvider.",
        )
    if "bf16" in job.precision:
        raise RecipeError(
            "bf16 does not run on the CPU: ONNX Runtime has no bf16 kernels there, and Olive's export raises.",
            "Use fp16 (half the size of fp32) or int8.",
        )
    makers = {
        "fp32": lambda: _builder("fp32", checkpoint, []),
        "fp16": lambda: _builder("fp32", checkpoint, [("to_fp16", _saved("OnnxFloatToFloat16", keep_io_types=True))]),
        "int8": lambda: _int8(checkpoint),
        "int4": lambda: _int4(checkpoint, job.int4_block_size, job.int4_symmetric),
    }
    bits: dict[str, Any] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
    names = [BASELINE, *(name for name in dict.fromkeys(job.precision) if name != BASELINE)]
    return [Recipe(name=name, config=makers[name](), bits=bits[name], baseline=name == BASELINE) for name in names]


def _int8(checkpoint: Checkpoint) -> dict[str, Any]:
    _must_divide("int8", INT8_GROUP, checkpoint)
    quantize = {"type": "Rtn", "bits": 8, "group_size": INT8_GROUP, "lm_head": True, "embeds": True}
    return _quantized({"quantize": quantize}, checkpoint)


def _int4(checkpoint: Checkpoint, block_size: int, symmetric: bool) -> dict[str, Any]:
    """Mixed: 4 bits, and 8 for the layers that suffer most (k_quant_mixed) and for embeddings and head."""
    _must_divide("int4", block_size, checkpoint)
    eight = {"bits": 8}
    quantize = {
        "type": "Rtn",
        "bits": 4,
        "group_size": block_size,
        "sym": symmetric,
        "lm_head": True,
        "embeds": True,
        "overrides": {"lm_head": eight, "model.embed_tokens": eight},
    }
    mix = {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"}
    return _quantized({"mix": mix, "quantize": quantize}, checkpoint)


def _quantized(passes: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    # ModelBuilder's int4 exports whatever bits the quantized checkpoint says, 8 included.
    return _workflow({**passes, **_builder_passes("int4", checkpoint)})


def _builder(precision: str, checkpoint: Checkpoint, after: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return _workflow({**_builder_passes(precision, checkpoint), **dict(after)})


def _builder_passes(precision: str, checkpoint: Checkpoint) -> dict[str, Any]:
    passes: dict[str, Any] = {"export": {"type": "ModelBuilder", "precision": precision}}
    if checkpoint.tied_embeddings:
        passes["tie"] = _saved("GraphSurgeries", surgeries=[{"surgeon": "TieWordEmbeddings"}])
    return passes


def _saved(kind: str, **config: Any) -> dict[str, Any]:
    # Weights beside the graph: a protobuf above 2 GB cannot be written at all.
    return {"type": kind, **config, "save_as_external_data": True}


def _workflow(passes: dict[str, Any]) -> dict[str, Any]:
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    return {"systems": {"local": system}, "host": "local", "target": "local", "passes": passes}


def _must_divide(name: str, block: int, checkpoint: Checkpoint) -> None:
    fitting = [size for size in BLOCK_SIZES if not any(n % size for n in checkpoint.linear_sizes)]
    if block in fitting:
        return
    if block not in BLOCK_SIZES:
        why = f"a block of {block} weights is none of {', '.join(map(str, BLOCK_SIZES))}, which the kernels know"
    else:
        wrong = ", ".join(str(size) for size in checkpoint.linear_sizes if size % block)
        why = f"a block of {block} weights does not divide this model's layer sizes ({wrong})"
    fix = f"Use --int4-block-size {' or '.join(map(str, fitting))}." if fitting and name == "int4" else None
    raise RecipeError(f"{name}: {why}.", fix or "This model needs an Olive config of your own (--olive-config).")
