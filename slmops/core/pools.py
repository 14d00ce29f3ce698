"""Prefect work pools to which a job's conversions and measurements fan out, and which of them is large enough."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from slmops.core.errors import PrerequisiteError
from slmops.core.validation import POOL_PATTERN
from slmops.core.values import Checkpoint, Frozen

GB = 1e9
CONVERSION_COPIES = 2.2  # the checkpoint in fp32, the graph that is built from it, and the interpreter with torch


class Pool(Frozen):
    """Machines of one size behind one Prefect work pool."""

    name: str = Field(pattern=POOL_PATTERN, description="The work pool's name in Prefect.")
    memory_gb: float = Field(gt=0, description="What one job may use on any of its machines, in 10^9 bytes.")
    device: Literal["cpu"] = Field("cpu", description="What its machines can convert and measure for.")


def conversion_memory(checkpoint: Checkpoint) -> float:
    """Bytes of memory that one conversion needs, estimated high: ``parameters x 4 x 2.2``."""
    return checkpoint.parameters * 4 * CONVERSION_COPIES


def choose(pools: Sequence[Pool], checkpoint: Checkpoint, device: str) -> Pool:
    """The smallest pool for the device whose machines can hold a conversion; of several of one size the first.

    It is a PrerequisiteError if none is large enough, or none is for the device.
    """
    need = conversion_memory(checkpoint) / GB
    fitting = [pool for pool in pools if pool.device == device and pool.memory_gb >= need]
    if not fitting:
        known = ", ".join(f"{pool.name} ({pool.memory_gb:g} GB, {pool.device})" for pool in pools)
        raise PrerequisiteError(
            f"No work pool can convert {checkpoint.name}: about {need:.1f} GB of memory on a {device} machine are "
            f"needed, and there are {known}.",
            "Name a pool of larger machines in SLMOPS_POOLS, or use a smaller model.",
        )
    return min(fitting, key=lambda pool: pool.memory_gb)
