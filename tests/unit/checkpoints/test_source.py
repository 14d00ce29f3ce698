"""Where a checkpoint comes from: what is told apart, staged, downloaded and refused; no torch, no network."""

import errno
import getpass
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.checkpoints import hub, source
from slmops.checkpoints.source import MOST_CACHE, cache_bytes, context_length
from slmops.core.errors import CheckpointError, PrerequisiteError
from slmops.core.files import unreadable
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Agreement
from tests import making
from tests.checkpoint_folders import Resolve, edit_json, tree


def test_a_relative_path_and_a_home_path(folder: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve(folder.name).path == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}").path == folder
    monkeypatch.chdir(folder.parent.parent)  # and what looks like a hub id
    assert resolve(f"{folder.parent.name}/{folder.name}").path == folder


def test_a_folder_of_the_hubs_cache_where_each_file_is_a_link(folder: Path, resolve: Resolve) -> None:
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(folder.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    template = folder.parent / "mine.jinja"
    template.write_text("{{ messages }}!")
    assert resolve(snapshot).digest == resolve(folder).digest
    assert not any(file.is_symlink() for file in resolve(snapshot, chat_template=template).path.iterdir())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such permissions")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_this_user_may_not_read(
    folder: Path, resolve: Resolve, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = Path.open

    def refuse(path: Path, *how: Any, **options: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *how, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError) as refused:
        resolve(folder)
    assert refused.value.message == f"{folder / name} may not be read by the user {getpass.getuser()} ({os.getuid()})."
    assert refused.value.fix == f"On the machine that has it: chmod -R a+rX {folder}"


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has no such permissions")
def test_who_may_not_read_need_not_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: {}["uid"])  # as it is of a number that no file knows
    said, _ = unreadable(PermissionError(errno.EACCES, "Permission denied", "/data/a"))
    assert said == f"/data/a may not be read by the user somebody ({os.getuid()})."


NOWHERE = "nowhere ./nowhere ../no/where ~/nowhere-at-all /a/b a/b/c org/name@ org/model.gguf https://example.org/a/b"


@pytest.mark.parametrize("model", [*NOWHERE.split(), "org/na me"])
def test_a_path_that_does_not_exist(resolve: Resolve, model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(model)


def test_what_a_hub_id_looks_like() -> None:
    assert hub.parse("Qwen/Qwen2.5-0.5B") == ("Qwen/Qwen2.5-0.5B", None)
    assert hub.parse("org/name@refs/pr/1") == ("org/name", "refs/pr/1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"x", "not a .gguf file"),
        ("model.gguf", b"", "does not begin with GGUF"),
        ("model.gguf", b"<html>", "does not begin with GGUF"),
        ("model-00001-of-00003.gguf", b"GGUF", "one part of a split"),
    ],
)
def test_a_file_that_is_no_model(tmp_path: Path, resolve: Resolve, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        resolve(tmp_path / name)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m-instruct"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "qwen2-5-0-5b-instruct"),
        ("Mine-IQ2_XXS.gguf", "mine"),
        ("mine.BF16.gguf", "mine"),
        ("model-q.gguf", "model-q"),
        ("models:/shop@champion", "shop"),
        ("models:/shop/3", "shop"),
        ("runs:/0a1b/out/best", "best"),
        ("mlflow-artifacts:/1/0a1b/artifacts/tuned", "tuned"),
    ],
)
def test_the_name_of_a_gguf_file_and_of_an_mlflow_uri(model: str, name: str) -> None:
    assert (source._mlflow_name(model) if ":/" in model else source._gguf_name(Path(model))) == name


def test_a_chat_template_of_the_users_is_staged(folder: Path, resolve: Resolve, settings: Settings) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="old")
    (folder / "chat_template.json").write_text('{"chat_template": "older"}')
    (folder / "README.md").write_text("not needed")
    template = folder.parent / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }} é", encoding="utf-8")
    before = tree(folder)
    leftover = settings.checkpoints / ".abc.999999999.part"
    leftover.mkdir(parents=True)

    found = resolve(folder, chat_template=template)

    assert tree(folder) == before
    assert found.path == settings.checkpoints / found.digest
    assert found.digest != resolve(folder).digest
    assert (found.path / "chat_template.jinja").read_text(encoding="utf-8") == template.read_text(encoding="utf-8")
    assert "chat_template" not in json.loads((found.path / "tokenizer_config.json").read_text())
    assert set(tree(found.path)) == set(before) - {"README.md", "chat_template.json"}
    assert (found.path / "model.safetensors").samefile(folder / "model.safetensors")
    assert not leftover.exists()
    assert resolve(folder, chat_template=template) == found
    # The staged folder is a checkpoint like any other.
    assert resolve(found.path).digest == found.digest


def test_a_tokenizer_rewritten_for_the_runtime_is_staged(folder: Path, settings: Settings) -> None:
    files = {"tokenizer.json": '{"model": {}}', "chat_template.jinja": "{{ messages }}"}
    agreed = Agreement(template=None, why=None, files=files, tokenizer_mismatches=(), template_mismatches=("odd",))
    found = source.resolve(
        Job(model=str(folder)), settings, download=making.no_download, agree=lambda _folder, _template: agreed
    )
    assert found.path.is_relative_to(settings.checkpoints)
    assert {name: (found.path / name).read_text() for name in files} == files
    assert (found.tokenizer_mismatches, found.template_mismatches) == (0, 1)


def test_a_staged_folder_that_was_changed_is_made_again(folder: Path, resolve: Resolve) -> None:
    template = folder.parent / "mine.jinja"
    template.write_text("{{ messages }}!")
    found = resolve(folder, chat_template=template)
    good = tree(found.path)
    # Overwritten in place, as training into the same folder would: the hard link changes with it ...
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert tree(found.path) != good
    assert resolve(folder, chat_template=template).digest != found.digest
    # ... and then the old weights come back in a file of their own.
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(good["model.safetensors"])
    assert resolve(folder, chat_template=template) == found
    assert tree(found.path) == good


def test_only_the_template_of_a_processor_is_put_where_the_tokenizer_reads_it(folder: Path, resolve: Resolve) -> None:
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages }}?"}')
    assert (resolve(folder).path / "chat_template.jinja").read_text() == "{{ messages }}?"
    edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}")  # which will do
    assert resolve(folder).path == folder


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b" \n", "is empty")]
)
def test_a_chat_template_that_is_none(folder: Path, resolve: Resolve, content: bytes | None, message: str) -> None:
    template = folder.parent / "mine.jinja"
    if content is not None:
        template.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        # Said before anything is fetched: the model is not even looked for.
        resolve("nowhere", chat_template=template)
    assert str(template) in caught.value.message


@pytest.mark.parametrize(
    ("at_model", "at_tokenizer"),
    [
        ("", ""),
        ("model", "components/tokenizer"),  # the transformers flavour
        ("artifacts/my-model", "artifacts/my-model"),
        ("components/model", "components/tokenizer"),
    ],
)
def test_mlflow_layouts(folder: Path, resolve: Resolve, settings: Settings, at_model: str, at_tokenizer: str) -> None:
    def download(uri: str, target: Path) -> Path:
        assert uri == "models:/My_SLM/3"
        for file in folder.iterdir():
            at = at_tokenizer if file.name.startswith(("tokenizer", "chat")) else at_model
            (target / at).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / at / file.name)
        (target / "MLmodel").write_text("flavors: {}")
        return target

    found = resolve("models:/My_SLM/3", download=download)
    assert (found.name, found.digest) == ("my_slm", resolve(folder).digest)
    assert found.path == settings.checkpoints / found.digest
    assert set(tree(found.path)) == set(tree(folder))
    assert [path.name for path in settings.checkpoints.iterdir()] == [found.digest]
    assert resolve("models:/My_SLM/3", download=download) == found


def test_mlflow_errors_name_the_uri_and_leave_nothing(folder: Path, resolve: Resolve, settings: Settings) -> None:
    adapter = folder.parent / "adapter"
    (adapter / "peft").mkdir(parents=True)
    (adapter / "peft" / "adapter_config.json").write_text('{"peft_type": "CPT"}')
    (adapter / "peft" / "adapter_model.safetensors").touch()
    bare = folder.parent / "bare"
    shutil.copytree(folder, bare / "model")
    (bare / "model" / "tokenizer.json").unlink()
    for downloaded, error, named in (
        (OSError("no such alias"), CheckpointError, "no such alias"),
        (PrerequisiteError("the server is down"), PrerequisiteError, "the server is down"),
        (bare, CheckpointError, "models:/shop@best has no tokenizer"),
        (adapter, CheckpointError, "models:/shop@best is an adapter of type CPT"),
        (folder / "config.json", CheckpointError, "models:/shop@best is a file"),
    ):
        with pytest.raises(error, match=named):
            resolve("models:/shop@best", download=Mock(side_effect=[downloaded]))
        assert list(settings.checkpoints.iterdir()) == []


def test_no_pip_no_demo(resolve: Resolve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(PrerequisiteError, match="pip"):
        resolve("demo")


# --- the context that variants are deployed with

QWEN3 = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
LLAMA_1B = {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048}
PHI = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 3072}


@pytest.mark.parametrize(
    ("config", "own", "asked", "deployed"),
    [
        (QWEN3, 40_960, None, 8192),
        (QWEN3, 40_960, 40_960, 40_960),
        (QWEN3, 2048, None, 2048),
        (QWEN3, 2048, 4096, 2048),
        (LLAMA_1B, 131_072, None, 32_768),
        (PHI, 131_072, None, 2048),
        ({}, 131_072, None, 131_072),
    ],
)
def test_what_the_cache_allows(config: dict[str, Any], own: int, asked: int | None, deployed: int) -> None:
    tokens = context_length(cache_bytes(config), own, asked)
    assert tokens == deployed
    assert asked or cache_bytes(config) * tokens <= MOST_CACHE


@pytest.mark.parametrize(
    ("config", "deployed"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 256}}, 256),
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 400}, 400),
        ({"rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 256}}, 512),
        ({"original_max_position_embeddings": 256}, 512),
        ({"max_position_embeddings": 2**30}, MOST_CACHE // 512),  # two layers, two heads of 16: 512 bytes a token
    ],
)
def test_the_context_ends_where_longrope_changes_or_the_cache_is_full(
    folder: Path, resolve: Resolve, config: dict[str, Any], deployed: int
) -> None:
    edit_json(folder / "config.json", **{"max_position_embeddings": 512, **config})
    assert resolve(folder).context_length == deployed
    assert resolve(folder, max_length=200).context_length == 200


@pytest.mark.parametrize(
    ("border", "asked", "fix"),
    [(256, 257, "--max-length 256"), (255, None, "too few for a conversation"), (4096, 5000, "")],
)
def test_a_context_beyond_the_border_of_longrope(
    folder: Path, resolve: Resolve, border: int, asked: int | None, fix: str
) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": border}
    edit_json(folder / "config.json", max_position_embeddings=8192, rope_parameters=rope)
    if not fix:  # the runtime computes its cache anew there
        assert resolve(folder, max_length=asked).context_length == asked
        return
    with pytest.raises(CheckpointError, match=f"(?s)changes its factors at {border} tokens.*{fix}"):
        resolve(folder, max_length=asked)


def test_longrope_has_the_key_that_the_exporter_reads(folder: Path, resolve: Resolve) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    edit_json(folder / "config.json", rope_parameters=rope)
    found = resolve(folder)
    staged = json.loads((found.path / "config.json").read_text())
    assert staged["rope_parameters"] == {**rope, "type": "longrope"}
    assert json.loads((folder / "config.json").read_text())["rope_parameters"] == rope
    edit_json(folder / "config.json", rope_parameters={**rope, "type": "longrope"})
    assert resolve(folder).path == folder
