"""The folders below ``settings.checkpoints``: unpacked files, merged adapters, copies staged with other texts.

Each is named by a digest, made behind a lock, and appears whole. It is verified before it is used again, because a
user, a full disk or a hard link may have changed it.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slmops.checkpoints import inspection, unpack_worker, weight_files
from slmops.checkpoints.reading import read_if_there
from slmops.checkpoints.unpack_worker import UnpackRequest
from slmops.core import machine
from slmops.core.errors import CheckpointError, ConversionError
from slmops.core.files import folder_appears_whole, intact, link_or_copy, remove_scratch, sha256, write_atomic
from slmops.core.job import Job
from slmops.core.locks import exclusive
from slmops.core.settings import Settings
from slmops.core.values import Frozen
from slmops.processes import children
from slmops.processes.children import Request

log = logging.getLogger(__name__)

RECORD = "unpacked.json"

Hashes = Mapping[str, str]  # SHA-256 of each file that matters, by name


def made(
    digest: str,
    what: str,
    handle: Callable[[Request], Frozen],
    request: Callable[[Path, Path], Request],
    settings: Settings,
) -> tuple[Path, Hashes]:
    """The folder that a child process, ``handle``, has made of what ``digest`` stands for, at most once.

    If it must be made, ``request`` returns what to ask of the child. It gets the folder to be filled, and an empty one
    for its own work. A CheckpointError if the input is at fault, a ConversionError if the child crashed or took too
    long. ``what`` is a noun for messages.
    """
    target = settings.checkpoints / digest
    with _locked(digest, what, settings):
        if target.is_dir():
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                recorded: dict[str, str] = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
                if all(sha256(target / name) == digest for name, digest in recorded.items()):
                    return target, recorded
            log.warning("%s is not as it was made: it is made again", target)
            shutil.rmtree(target)
        with folder_appears_whole(target) as scratch:
            work = scratch / "work"
            work.mkdir()
            asked = request(scratch, work)
            child_log = settings.logs / f"{what}-{digest[:16]}.log"
            child_log.unlink(missing_ok=True)
            children.call(
                handle,
                asked,
                log=child_log,
                timeout_s=settings.conversion_timeout_s,
                error=ConversionError,
                # Everything it needs is in the files; without this a tokenizer may ask the hub about itself.
                env={"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            )
            shutil.rmtree(work)
            hashes = {name: sha256(scratch / name) for name in sorted(inspection.names(scratch))}
            record = {"of": digest, "transformers": machine.versions()["transformers"], "files": hashes}
            write_atomic(scratch / RECORD, json.dumps(record, indent=1))
    return target, hashes


def unpacked(digest: str, fetch: Callable[[Path], Path], settings: Settings) -> tuple[Path, Hashes]:
    """The folder into which the GGUF file with the SHA-256 ``digest`` is unpacked.

    If it must be unpacked, ``fetch`` returns the file, and may use the empty folder that it is given.
    """

    def request(folder: Path, work: Path) -> UnpackRequest:
        gguf = fetch(work)
        log.info("unpacking %s, once", gguf.name)
        return UnpackRequest(source=gguf, folder=folder)

    return made(digest, "unpacking", unpack_worker.handle, request, settings)


def dequantized(
    folder: Path, config: Mapping[str, Any], job: Job, settings: Settings, where: str
) -> tuple[Path, Hashes]:
    """The folder of a checkpoint in FP8 in its own dtype: transformers needs no GPU and no other package for that."""
    root = weight_files.choose(inspection.names(folder), where, allow_pickle=False)
    files, found = weight_files.read(folder, root, where)
    block = config["quantization_config"].get("weight_block_size")
    for name, (dtype, shape, _) in found.items():
        scale = found.get(f"{name}_scale_inv")
        # transformers takes numbers without a scale as they are, and other blocks than these for equally large ones.
        even = scale and (not block or all(n == m * b for n, m, b in zip(shape, scale.shape, block, strict=False)))
        if dtype.startswith("F8") and not even:
            raise CheckpointError(
                f"{where} cannot be dequantized: {name} of shape {shape} has no scales for blocks of {block}.",
                "Use the checkpoint from before it was quantized.",
            )
    log.warning("%s is stored in FP8: variants are compared with what it is dequantized to", where)
    digest = inspection.digest_of(inspection.digest_files(folder, files, job))
    return made(
        digest, "dequantizing", unpack_worker.handle, lambda to, _: UnpackRequest(source=folder, folder=to), settings
    )


def stage(
    folder: Path, hashes: Hashes, template: str | None, settings: Settings, rewritten: Mapping[str, str] | None = None
) -> tuple[Path, Hashes]:
    """A folder of our own with the same files, hard-linked where possible, and other texts if they are given."""
    texts = dict(rewritten or {})
    staged = dict(hashes)
    if template is not None:
        texts["chat_template.jinja"] = template
        staged.pop("chat_template.json", None)
        name = "tokenizer_config.json"
        content = json.loads(texts[name]) if name in texts else read_if_there(folder, name)
        if content.pop("chat_template", None) is not None:
            texts[name] = json.dumps(content, indent=2, ensure_ascii=False)
    staged |= {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    digest = inspection.digest_of(staged)
    target = settings.checkpoints / digest
    with _locked(digest, "staging", settings):
        # A hard link changes when its origin is overwritten in place.
        whole = target.is_dir() and inspection.names(target) == staged.keys()
        if not (whole and all(intact(target / name, None, digest, folder / name) for name, digest in staged.items())):
            if target.exists():
                shutil.rmtree(target)
            with folder_appears_whole(target) as scratch:
                for name in staged.keys() - texts.keys():
                    link_or_copy(folder / name, scratch / name)
                for name, text in texts.items():
                    (scratch / name).write_bytes(text.encode())
    return target, staged


@contextmanager
def _locked(digest: str, what: str, settings: Settings) -> Iterator[None]:
    lock = settings.locks / f"checkpoint-{digest[:16]}.lock"
    with exclusive(lock, f"the {what} of checkpoint {digest[:16]}", wait=True):
        remove_scratch(settings.checkpoints)
        yield
