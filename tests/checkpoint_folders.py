"""Checkpoints of a few hundred bytes, for tests that break them."""

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from slmops.core.values import Checkpoint

Resolve = Callable[..., Checkpoint]
HIDDEN, VOCAB, LAYERS, INNER = 32, 10, 2, 48
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
_ATTENTION = {f"self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
_MLP = {f"mlp.{name}_proj.weight": [INNER, HIDDEN] for name in ("gate", "up")} | {
    "mlp.down_proj.weight": [HIDDEN, INNER]
}
_NORMS = {f"{name}_layernorm.weight": [HIDDEN] for name in ("input", "post_attention")}
TENSORS = {
    "model.embed_tokens.weight": [VOCAB, HIDDEN],
    "model.norm.weight": [HIDDEN],
    **{
        f"model.layers.{n}.{name}": shape
        for n in range(LAYERS)
        for name, shape in {**_ATTENTION, **_MLP, **_NORMS}.items()
    },
}
PARAMETERS = sum(prod(shape) for shape in TENSORS.values())


def write_safetensors(path: Path, tensors: Mapping[str, list[int]], dtype: str = "F32", width: int = 4) -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors.items():
        size = width * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    """Change keys; ``"-"`` removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {key: value for key, value in content.items() if value != "-"})


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def write_checkpoint(path: Path) -> Path:
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    write_json(path / "tokenizer.json", {"version": "1.0"})
    write_json(path / "tokenizer_config.json", {"eos_token": "</s>"})
    (path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    write_safetensors(path / "model.safetensors", TENSORS)
    return path
