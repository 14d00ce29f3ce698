"""What a folder in Hugging Face format holds, and whether it can be converted. It only reads, without torch."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from slmops.checkpoints import architectures, chat_template, weight_files
from slmops.checkpoints.reading import read_if_there, read_json, read_text
from slmops.core.errors import CheckpointError
from slmops.core.files import sha256, unreadable
from slmops.core.job import Job

TEXT_PATTERNS = (
    "config*.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
"""Files beside the weights that decide what the model computes and how a conversation is rendered."""

TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.tiktoken",),
)
"""Each of these groups is a tokenizer."""

SHORTEST_CONTEXT = 256  # tokens into which prompts and answers fit
_HEAD_STEP = 16  # of GroupQueryAttention in ONNX Runtime
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length")


@dataclass(frozen=True)
class TextFacts:
    config: Mapping[str, Any]  # content of config.json
    context_length: int  # tokens
    template: str | None  # the chat template that must be written into the folder; None: the folder's own will do
    rewritten: Mapping[str, str]  # the files that must be others than the folder's, by name


def read_texts(folder: Path, job: Job, where: str) -> TextFacts:
    """Check everything but the weights; a CheckpointError calls the checkpoint ``where``."""
    config = read_config(folder, job, where)
    present = names(folder)
    if not has_tokenizer(present):
        raise CheckpointError(
            f"{where} has no tokenizer: none of {', '.join('+'.join(group) for group in TOKENIZERS)}.",
            "Save it there: tokenizer.save_pretrained(folder).",
        )
    _refuse_tokens_beyond(config, read_if_there(folder, "tokenizer.json", where), where)
    template = read_template(job)
    if template is None:
        found = chat_template.load(folder, where)
        if found is None:
            raise CheckpointError(
                f"{where} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json).",
                "Pass the one that it was fine-tuned with: --chat-template FILE.jinja.",
            )
        if not found.text.strip():
            raise CheckpointError(
                f"{where}/{found.path.name} is empty, and it hides any other chat template.",
                "Remove it, or pass --chat-template FILE.jinja.",
            )
        # chat_template.json is a processor's file, which a tokenizer does not read.
        template = found.text if found.path.name == "chat_template.json" else None
    context = next((config[key] for key in _CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    if context is None:
        raise CheckpointError(
            f"{where}/config.json does not say how long a sequence may be (max_position_embeddings).",
            "Add max_position_embeddings with the model's context length in tokens.",
        )
    return TextFacts(config, context, template, _with_old_rope_type(config))


def read_config(folder: Path, job: Job, where: str) -> dict[str, Any]:
    """The content of config.json, of an architecture that can be converted."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{where}/config.json is missing.",
            "Give the folder that model.save_pretrained(...) and tokenizer.save_pretrained(...) wrote.",
        )
    config = read_json(folder / "config.json", f"{where}/config.json")
    listed = config.get("architectures")
    if not (isinstance(listed, list) and listed and isinstance(listed[0], str)):
        raise CheckpointError(
            f"{where}/config.json names no architectures.",
            'Add the class that it was trained as: "architectures": ["LlamaForCausalLM"].',
        )
    _refuse_custom_code(folder, config, job, where)
    architectures.check(listed[0])
    _refuse_heads(config, where)
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized and not is_fp8(config):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise CheckpointError(
            f"{where} is quantized already ({method or 'quantization_config'} in config.json), and transformers cannot "
            "dequantize that without a GPU or another package: there would be no baseline to judge a variant by.",
            "Use the checkpoint from before it was quantized, or save what model.dequantize() gives.",
        )
    return config


def _refuse_heads(config: Mapping[str, Any], where: str) -> None:
    """Refuse what the runtime's attention cannot take, which it says when an exported model first runs."""
    rope = rotary_positions(config)
    head = weight_files.head_size(config)
    rotary = int(head * (rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1))
    if head % _HEAD_STEP or rotary % _HEAD_STEP:
        raise CheckpointError(
            f"{where}: its heads have {head} dimensions, {rotary} of them with rotary positions. The runtime's "
            f"attention takes multiples of {_HEAD_STEP} only, at every precision.",
            "Use a model whose head_dim (hidden_size / num_attention_heads), also times partial_rotary_factor, is one.",
        )


def longrope_border(config: Mapping[str, Any], own: int) -> int:
    """Tokens of a context of ``own`` before a model with LongRoPE, by its config.json, changes its factors."""
    rope = rotary_positions(config)
    long = "longrope" in (rope.get("rope_type"), rope.get("type"))
    borders = (one.get("original_max_position_embeddings") for one in (config, rope) if long)
    return min([own, *(int(border) for border in borders if border)])


def rotary_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether it is a checkpoint in FP8, which transformers dequantizes."""
    quantized = config.get("quantization_config")
    return isinstance(quantized, dict) and quantized.get("quant_method") == "fp8"


def has_tokenizer(present: Collection[str]) -> bool:
    """Whether one of :data:`TOKENIZERS` is among the names of files."""
    return any(all(name in present for name in group) for group in TOKENIZERS)


def _refuse_tokens_beyond(config: Mapping[str, Any], tokenizer: Mapping[str, Any], where: str) -> None:
    """Refuse a tokenizer with ids that have no embedding: a text that holds such a token ends in an error."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {one[0]: at for at, one in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    ids.pop("<image_soft_token>", None)  # Gemma 3's text models share the tokenizer with those that read images
    rows = config.get("vocab_size")
    last = max(ids, key=lambda token: ids[token], default="")
    if ids and isinstance(rows, int) and ids[last] >= rows:
        raise CheckpointError(
            f"{where} has {rows} token embeddings, and its tokenizer has the token {last!r} with the id {ids[last]}.",
            "Save model and tokenizer together after model.resize_token_embeddings(len(tokenizer)).",
        )


def _with_old_rope_type(config: Mapping[str, Any]) -> dict[str, str]:
    """config.json with LongRoPE's key ``type``, which the model builder reads and transformers 5 does not write."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope" and "type" not in rope:
            return {"config.json": json.dumps({**config, key: {**rope, "type": "longrope"}}, indent=2)}
    return {}


def read_template(job: Job) -> str | None:
    """The chat template that the job brings, or None; a CheckpointError if the file holds none."""
    if job.chat_template is None:
        return None
    path = job.chat_template.expanduser()
    text = read_text(path, f"The chat template {path}")
    if not text.strip():
        raise CheckpointError(f"The chat template {path} is empty.", "Give a Jinja file that renders `messages`.")
    return text


def names(folder: Path) -> set[str]:
    """Names of the files in a folder, without links that lead nowhere."""
    try:
        return {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise CheckpointError(*unreadable(error)) from error


def copy_texts(folder: Path, target: Path, patterns: Iterable[str] = TEXT_PATTERNS) -> None:
    """Copy what is beside the weights, by default all but config.json, which belongs to them."""
    for name in names(folder) - {"config.json"}:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            shutil.copyfile(folder / name, target / name)


def digest_files(folder: Path, weights: tuple[str, ...], job: Job) -> dict[str, str]:
    """SHA-256 by name of each file that matters: weights, texts, and with ``trust_remote_code`` Python files."""
    patterns = (*TEXT_PATTERNS, *(("*.py",) if job.trust_remote_code else ()))
    texts = {name for name in names(folder) if any(fnmatchcase(name, pattern) for pattern in patterns)}
    try:
        return {name: sha256(folder / name) for name in sorted(texts | set(weights))}
    except OSError as error:
        raise CheckpointError(*unreadable(error)) from error


def digest_of(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over all names and contents, in any order."""
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _refuse_custom_code(folder: Path, config: Mapping[str, Any], job: Job, where: str) -> None:
    """The model builder trusts remote code by default, so code that nobody allowed must not get that far."""
    if job.trust_remote_code:
        return
    tokenizer = read_if_there(folder, "tokenizer_config.json", where)
    places = {
        "auto_map in config.json": config.get("auto_map"),
        "auto_map in tokenizer_config.json": tokenizer.get("auto_map"),
        "the folder custom_generate": (folder / "custom_generate").is_dir(),
    }
    if found := next((place for place, code in places.items() if code), None):
        raise CheckpointError(
            f"{where} brings Python code of its own ({found}), which would run on this machine.",
            "Read that code, then pass --trust-remote-code. Or use an architecture that transformers knows.",
        )
