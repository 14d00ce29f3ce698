"""Precision name -> Olive workflow config, as plain data.

Each recipe was chosen by measuring on the CPU. The obvious ones do not work there: ModelBuilder refuses fp16 for the
CPU provider, its int8 raises KeyError, dynamic int8 loses quality. ModelBuilder writes tied embeddings twice, so a
checkpoint that ties them gets a TieWordEmbeddings surgery, which makes a 135 M model a sixth smaller.
"""

from typing import Any

from slmops.core.errors import RecipeError
from slmops.core.job import BASELINE, CHECKPOINT, Job
from slmops.core.values import Checkpoint, Recipe

_INT8_GROUP = 32
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_BITS: dict[str, Any] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
_THROUGH_FP32 = ("fp32", "fp16")


def check(job: Job) -> None:
    """Refuse, with a RecipeError, precisions and devices that cannot work, whatever the checkpoint."""
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


def for_job(job: Job, checkpoint: Checkpoint) -> list[Recipe]:
    """The recipes of a job's precisions, the baseline always first; a RecipeError if one of them cannot work.

    If the checkpoint is the baseline, nothing is made that has to be exported in fp32.
    """
    check(job)
    names = dict.fromkeys((BASELINE, *job.precision))
    if job.baseline == CHECKPOINT:
        if not ({*names} - {*_THROUGH_FP32} or job.olive_config):
            asked = " and ".join(job.precision)
            raise RecipeError(
                f"{asked} is made through an fp32 export, which is not made as the checkpoint is the baseline.",
                "Use --baseline fp32, or --precision int8.",
            )
        names = {name: None for name in names if name not in _THROUGH_FP32}
    return [recipe(name, job, checkpoint) for name in names]


def recipe(name: str, job: Job, checkpoint: Checkpoint) -> Recipe:
    """How to make the variant ``name``."""
    passes: dict[str, Any] = {}
    rtn = {"type": "Rtn", "lm_head": True, "embeds": True}
    # Weights go into a file beside the graph: a protobuf above 2 GB cannot be written.
    saved = {"save_as_external_data": True}
    if name == "int8":
        _must_divide(name, _INT8_GROUP, checkpoint)
        passes["quantize"] = {**rtn, "bits": 8, "group_size": _INT8_GROUP}
    elif name == "int4":  # but 8 bits for the layers that lose most (k_quant_mixed) and for embeddings and head
        _must_divide(name, job.int4_block_size, checkpoint)
        passes["mix"] = {"type": "SelectiveMixedPrecision", "algorithm": "k_quant_mixed"}
        eight = {name: {"bits": 8} for name in ("lm_head", "model.embed_tokens")}
        options = {"group_size": job.int4_block_size, "sym": job.int4_symmetric, "overrides": eight}
        passes["quantize"] = {**rtn, "bits": 4, **options}
    # ModelBuilder's int4 exports whatever bits the quantized checkpoint has, also 8.
    passes["export"] = {"type": "ModelBuilder", "precision": "int4" if "quantize" in passes else "fp32"}
    if checkpoint.tied_embeddings:
        passes["tie"] = {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}], **saved}
    if name == "fp16":
        passes["to_fp16"] = {"type": "OnnxFloatToFloat16", "keep_io_types": True, **saved}
    return Recipe(name=name, config=workflow(passes), bits=_BITS[name], baseline=name == BASELINE)


def workflow(passes: dict[str, Any]) -> dict[str, Any]:
    """An Olive workflow of these passes for the CPU."""
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    return {"systems": {"local": system}, "host": "local", "target": "local", "passes": passes}


def _must_divide(name: str, block: int, checkpoint: Checkpoint) -> None:
    fitting = [size for size in _BLOCK_SIZES if not any(n % size for n in checkpoint.linear_sizes)]
    if block in fitting:
        return
    if block not in _BLOCK_SIZES:
        why = f"a block of {block} weights is not one of {', '.join(map(str, _BLOCK_SIZES))}, which the kernels have"
    else:
        wrong = ", ".join(str(size) for size in checkpoint.linear_sizes if size % block)
        why = f"a block of {block} weights does not divide this model's layer sizes ({wrong})"
    fix = f"Use --int4-block-size {' or '.join(map(str, fitting))}." if fitting and name == "int4" else None
    raise RecipeError(f"{name}: {why}.", fix or "This model needs an Olive config of your own (--olive-config).")
