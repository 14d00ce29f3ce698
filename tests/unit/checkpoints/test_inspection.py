"""What a folder must hold, and every way in which it can be unusable: folders of a few hundred bytes, no torch."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import architectures, source
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint

HIDDEN, VOCAB, LAYERS, INNER = 8, 10, 2, 24
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TENSORS = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    "model.norm.weight": [HIDDEN],
    **{f"model.layers.{n}.self_attn.q_proj.weight": [HIDDEN, HIDDEN] for n in range(LAYERS)},
    **{f"model.layers.{n}.mlp.down_proj.weight": [HIDDEN, INNER] for n in range(LAYERS)},
}
PARAMETERS = VOCAB * HIDDEN + HIDDEN + LAYERS * (HIDDEN * HIDDEN + HIDDEN * INNER)


def write_safetensors(path: Path, tensors: Mapping[str, list[int]], dtype: str = "F32", width: int = 4) -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = width
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value != "-"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint."""
    path = tmp_path / "My.Model-v2"
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    write_json(path / "tokenizer.json", {"version": "1.0"})
    write_json(path / "tokenizer_config.json", {"eos_token": "</s>"})
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    write_safetensors(path / "model.safetensors", TENSORS)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


Resolve = Callable[..., Checkpoint]


@pytest.fixture
def resolve(settings: Settings) -> Resolve:
    def call(model: object, **job: Any) -> Checkpoint:
        return source.resolve(Job(model=str(model), **job), settings, download=lambda _uri, target: target)

    return call


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_folder_is_described_and_left_alone(folder: Path, resolve: Resolve, settings: Settings) -> None:
    before = tree(folder)
    found = resolve(folder)
    assert found.name == "my-model-v2"
    assert (found.source, found.path) == (str(folder), folder)
    assert (found.architecture, found.context_length) == ("LlamaForCausalLM", 64)
    assert found.parameters == PARAMETERS
    assert found.tied_embeddings
    assert found.linear_sizes == (HIDDEN, INNER)
    assert found.size_mb == (folder / "model.safetensors").stat().st_size / 1e6
    assert tree(folder) == before
    assert not settings.checkpoints.exists()


def test_a_tied_head_that_is_stored_counts_once(folder: Path, resolve: Resolve) -> None:
    write_safetensors(folder / "model.safetensors", TENSORS | {"lm_head.weight": [VOCAB, HIDDEN]})
    assert resolve(folder).parameters == PARAMETERS
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert resolve(folder).parameters == PARAMETERS + VOCAB * HIDDEN
    assert not resolve(folder).tied_embeddings


@pytest.mark.parametrize("head", [True, False])
def test_without_a_word_in_the_config_a_stored_head_means_untied(folder: Path, resolve: Resolve, head: bool) -> None:
    edit_json(folder / "config.json", tie_word_embeddings="-")
    write_safetensors(folder / "model.safetensors", TENSORS | ({"lm_head.weight": [VOCAB, HIDDEN]} if head else {}))
    assert resolve(folder).tied_embeddings is not head


def test_the_digest_follows_what_matters_only(folder: Path, resolve: Resolve) -> None:
    first = resolve(folder).digest
    (folder / "README.md").write_text("hello")
    (folder / "optimizer.pt").write_bytes(b"x")
    assert resolve(folder).digest == first
    shutil.move(folder, folder.with_name("elsewhere"))
    folder = folder.with_name("elsewhere")
    assert resolve(folder).digest == first
    edit_json(folder / "tokenizer_config.json", eos_token="<end>")
    second = resolve(folder).digest
    assert second != first
    (folder / "code.py").write_text("")
    assert resolve(folder).digest == second
    assert resolve(folder, trust_remote_code=True).digest != second


def shard(folder: Path) -> None:
    names = list(TENSORS)
    (folder / "model.safetensors").unlink()
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, held in parts.items():
        write_safetensors(folder / file, {name: TENSORS[name] for name in held})
    mapped = {name: file for file, held in parts.items() for name in held}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": mapped})


def test_shards(folder: Path, resolve: Resolve) -> None:
    shard(folder)
    assert resolve(folder).parameters == PARAMETERS


def test_pickles_if_allowed(folder: Path, resolve: Resolve) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"P" * 2_000)
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    found = resolve(folder, allow_pickle=True)
    assert (found.parameters, found.linear_sizes) == (1000, (HIDDEN, INNER))


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / name).write_bytes(raw)

    return change


def cut(by: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[:-by] if by > 0 else raw + b"x" * -by)

    return change


def weights(tensors: Mapping[str, list[int]], *args: Any) -> Callable[[Path], None]:
    return lambda folder: write_safetensors(folder / "model.safetensors", tensors, *args)


def rename(old: str, new: str) -> Callable[[Path], None]:

    def change(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return change


def every(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is done to a whole checkpoint: (how, words of the message, words of the fix)
    "no config": (drop("config.json"), "config.json is missing", "save_pretrained"),
    "config cut": (put("config.json", '{"a": '), "config.json is not JSON", "again"),
    "config list": (put("config.json", "[]"), "config.json is not a JSON object", "again"),
    "config latin": (put("config.json", b'{"a": "\xe9"}'), "config.json is not JSON", "again"),
    "no architectures": (config(architectures="-"), "names no architectures", "LlamaForCausalLM"),
    "empty architectures": (config(architectures=[]), "names no architectures", "LlamaForCausalLM"),
    "phi": (config(architectures=["PhiForCausalLM"]), "computes something else", "Qwen3ForCausalLM"),
    "gemma3": (config(architectures=["Gemma3ForCausalLM"]), "renamed an attribute", "Gemma2ForCausalLM"),
    "whisper": (config(architectures=["WhisperForConditionalGeneration"]), "text-only", "LlamaForCausalLM"),
    "bert": (config(architectures=["BertModel"]), "BertModel cannot be converted", "LlamaForCausalLM"),
    "no context": (config(max_position_embeddings="-"), "how long a sequence", "max_position_embeddings"),
    "quantized": (config(quantization_config={"bits": 4}), "quantized already", "before it was quantized"),
    "own code": (config(auto_map={"AutoModel": "m.M"}), "auto_map in config.json", "--trust-remote-code"),
    "own tokenizer code": (
        put("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["t.T", null]}}'),
        "auto_map in tokenizer_config.json",
        "--trust-remote-code",
    ),
    "own generate": (lambda folder: (folder / "custom_generate").mkdir(), "custom_generate", "--trust-remote-code"),
    "no tokenizer": (drop("tokenizer.json"), "no tokenizer", "tokenizer.save_pretrained"),
    "tokenizer cut": (put("tokenizer.json", '{"model": '), "tokenizer.json is not JSON", "again"),
    "no template": (drop("chat_template.jinja"), "no chat template", "--chat-template"),
    "empty template": (put("chat_template.jinja", " \n"), "chat_template.jinja is empty", "--chat-template"),
    "no weights": (drop("model.safetensors"), "has no weights", "model.safetensors"),
    "other weights": (rename("model.safetensors", "consolidated.safetensors"), "only consolidated", "save_pretrained"),
    "pickles": (rename("model.safetensors", "pytorch_model.bin"), "pickled weights only", "--allow-pickle"),
    "pt file": (rename("model.safetensors", "consolidated.00.pth"), "consolidated.00.pth", "save_pretrained"),
    "gguf inside": (
        every(drop("config.json"), rename("model.safetensors", "m.gguf")),
        "GGUF files only",
        "Pass the .gguf file itself",
    ),
    "adapter": (
        every(drop("config.json"), drop("model.safetensors"), put("adapter_config.json", "{}")),
        "LoRA adapter only",
        "merge_and_unload",
    ),
    "adapter beside weights": (put("adapter_config.json", "{}"), "LoRA adapter beside full weights", "Merge it"),
    "lfs pointer": (
        put("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
        "Git LFS pointer",
        "git lfs pull",
    ),
    "empty weights": (put("model.safetensors", b""), "model.safetensors is empty", "again"),
    "no header": (put("model.safetensors", b"\xff" * 64), "not a whole safetensors file", "again"),
    "short header": (put("model.safetensors", b"\x10\0\0"), "not a whole safetensors file", "again"),
    "cut header": (cut(4 * PARAMETERS + 9), "not a whole safetensors file", "again"),
    "cut off": (cut(1), "not a whole safetensors file", "again"),
    "too long": (cut(-5), "not a whole safetensors file", "again"),
    "stored quantized": (
        weights(TENSORS, "U8", 1),
        "quantized already: model.embed_tokens.weight is stored as U8",
        "before it was quantized",
    ),
    "compiled": (weights({f"_orig_mod.{name}": shape for name, shape in TENSORS.items()}), "'_orig_mod.'", "unwrap"),
    "layers lost": (config(num_hidden_layers=3), "hold 2 layers, and config.json says 3", "again"),
    "vocabulary grown": (config(vocab_size=12), "10 token embeddings", "resize_token_embeddings"),
    "head lost": (config(tie_word_embeddings=False), "no lm_head.weight", "tie_word_embeddings"),
    "shard lost": (every(shard, drop("model-2.safetensors")), "model-2.safetensors is missing", "again"),
    "index broken": (every(shard, put("model.safetensors.index.json", "{}")), "not an index", "again"),
    "index leads out": (
        every(shard, put("model.safetensors.index.json", '{"weight_map": {"a": "../model-1.safetensors"}}')),
        "not an index",
        "again",
    ),
    "index promises more": (
        every(shard, put("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}')),
        "names a, which no file holds",
        "again",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_with_its_remedy(folder: Path, resolve: Resolve, case: str) -> None:
    change, message, fix = BROKEN[case]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        resolve(folder)
    assert message in caught.value.message
    assert fix in (caught.value.fix or "")
    assert case in ("phi", "gemma3", "whisper", "bert") or str(folder) in caught.value.message
    assert caught.value.exit_code == 2


def test_untested_architectures_are_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        architectures.check("LlamaForCausalLM")
        assert not caplog.records
        architectures.check("GemmaForCausalLM")
    assert "GemmaForCausalLM" in caplog.text
    assert not architectures.PROVEN & architectures.UNPROVEN
    assert not architectures.REFUSED.keys() & (architectures.PROVEN | architectures.UNPROVEN)
