"""The targets: kinds of device and execution provider that variants are made for, and how variants are called by them.

A variant of another target than the CPU ends with it: ``int4-webgpu`` is the recipe ``int4``, made for WebGPU.
"""

from typing import Final, Literal, NamedTuple

CPU: Final = "cpu"
TargetName = Literal["cpu", "dml", "webgpu", "cuda", "trt-rtx"]


class TargetDevice(NamedTuple):
    device: Literal["cpu", "gpu"]
    provider: str  # ONNX Runtime's execution provider, as Olive and Foundry Local call it
    suffix: str  # of Foundry's names of such models


TARGETS: dict[str, TargetDevice] = {
    CPU: TargetDevice("cpu", "CPUExecutionProvider", "generic-cpu"),
    "dml": TargetDevice("gpu", "DmlExecutionProvider", "dml-gpu"),
    "webgpu": TargetDevice("gpu", "WebGpuExecutionProvider", "generic-gpu"),
    "cuda": TargetDevice("gpu", "CUDAExecutionProvider", "cuda-gpu"),
    "trt-rtx": TargetDevice("gpu", "NvTensorRTRTXExecutionProvider", "trtrtx-gpu"),
}
"""By name, and each better than those before it for a device that has several."""


def of_model(foundry_id: str) -> TargetDevice:
    """What a model is for, by its name in Foundry, with or without the version."""
    name = foundry_id.partition(":")[0]
    return next((one for one in TARGETS.values() if name.endswith(f"-{one.suffix}")), TARGETS[CPU])


def variant_name(precision: str, target: str) -> str:
    """How the variant of a recipe for a target is called."""
    return precision if target == CPU else f"{precision}-{target}"


def split(variant: str) -> tuple[str, str]:
    """The recipe and the target of a variant."""
    for target in TARGETS:
        if target != CPU and variant.endswith(f"-{target}"):
            return variant.removesuffix(f"-{target}"), target
    return variant, CPU


def target_of(variant: str) -> str:
    """The target of a variant."""
    return split(variant)[1]
