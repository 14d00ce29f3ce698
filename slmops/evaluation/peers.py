"""llama.cpp's quantized files of a job's checkpoint: made and measured beside its variants, and never chosen."""

import logging

from slmops.core import locks
from slmops.core.errors import EvaluationError
from slmops.core.job import PEER_PREFIX, JobContext
from slmops.evaluation import gguf_worker
from slmops.evaluation.gguf_worker import GgufRequest
from slmops.evaluation.speed import Peer
from slmops.processes import children

log = logging.getLogger(__name__)

TYPES = ("Q8_0", "Q4_K_M")  # the sizes of int8 and int4
NAMES = tuple(f"{PEER_PREFIX}{kind}" for kind in TYPES)


def make_gguf_files(context: JobContext) -> list[Peer]:
    """Write the files into the job's work; an EvaluationError if llama.cpp computes something else or fails."""
    job, checkpoint, folder = context.job, context.checkpoint, context.work / "gguf"
    request = GgufRequest(
        checkpoint=checkpoint.path,
        folder=folder,
        types=TYPES,
        tolerance=job.export_tolerance,
        trust_remote_code=job.trust_remote_code,
    )
    with locks.machine(context.settings):
        log.info("making GGUF files for llama.cpp: %s", ", ".join(TYPES))
        made, _ = children.call(
            gguf_worker.handle,
            request,
            log=context.logs / "llama.cpp.log",
            timeout_s=context.settings.conversion_timeout_s,
            error=EvaluationError,
        )
    log.info(
        "llama.cpp is built for %s; its logits in fp32 differ by %.1g of the largest", made.system_info, made.error
    )
    (folder / f"{gguf_worker.FP32}.gguf").unlink()
    where = {"folder": checkpoint.path, "context_length": checkpoint.context_length}
    files = {name: folder / f"{kind}.gguf" for name, kind in zip(NAMES, TYPES, strict=True)}
    return [Peer(name=name, file=file, **where) for name, file in files.items()]
