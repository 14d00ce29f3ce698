"""The weight files of a checkpoint, read without torch: which count, whether they are whole, and what they hold."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.checkpoints import tensors
from slmops.checkpoints.reading import COPY_AGAIN, read_json
from slmops.checkpoints.tensors import Tensor
from slmops.core.errors import CheckpointError

ROOTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in its order."""
ADAPTER = "adapter_config.json"
ADAPTER_ROOTS = ("adapter_model.safetensors", "adapter_model.bin")  # what PEFT looks for beside it
PICKLES = (".bin", ".bin.index.json")

_UNQUANTIZED = frozenset({"F64", "F32", "F16", "BF16"})
_LFS_POINTER = b"version https://git-lfs"
_SAVE_AGAIN = "Save it again with model.save_pretrained(folder), which writes safetensors"


@dataclass(frozen=True)
class WeightFacts:
    """What the weight files say."""

    files: tuple[str, ...]  # names of the weight files and of their index
    parameters: int  # number of weights; tied embeddings count once
    size_mb: float  # of the weight files, in 10^6 bytes
    tied: bool  # input embeddings and output head are one tensor
    linear_sizes: tuple[int, ...]  # input sizes of all matrices, sorted


def choose(names: Collection[str], where: str, *, allow_pickle: bool) -> str:
    """The file from which transformers would load the weights: a weight file, or the index of several.

    Of the checkpoint's files only the ``names`` need to be known. If there are no weights, or none that may be used, a
    CheckpointError calls it ``where``.
    """
    roots = ADAPTER_ROOTS if ADAPTER in names else ROOTS
    full = next((root for root in ROOTS if root in names), None)
    if ADAPTER in names and full:
        # transformers would load the base model that the adapter names, whatever else lies there.
        raise CheckpointError(
            f"{where} holds an adapter ({ADAPTER}) beside full weights ({full}).",
            "If the adapter is merged into them already, remove the adapter_* files, else the full weights.",
        )
    root = next((root for root in roots if root in names), None)
    if root is None:
        if gguf := min((name for name in names if name.lower().endswith(".gguf")), default=None):
            raise CheckpointError(
                f"{where} holds GGUF files only ({gguf}).", "Pass the .gguf file itself as the model."
            )
        # A Trainer's folder holds its arguments and state in pickles too.
        state = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
        weights = (".safetensors", ".bin", ".pt", ".pth")
        other = min((name for name in names if name.endswith(weights) and not name.startswith(state)), default=None)
        raise CheckpointError(
            f"{where} has no weights" + (f" that transformers would load, only {other}." if other else "."),
            f"It needs {' or '.join(roots[: len(roots) // 2])}. {_SAVE_AGAIN}.",
        )
    if root.endswith(PICKLES) and not allow_pickle:
        raise CheckpointError(
            f"{where} has pickled weights only ({root}), which can run code when they are read.",
            f"{_SAVE_AGAIN}, or pass --allow-pickle if you trust its origin.",
        )
    return root


def measure(folder: Path, root: str, config: Mapping[str, Any], where: str) -> WeightFacts:
    """Check the weight files, of which ``root`` is what :func:`choose` chose, and count their weights.

    A CheckpointError if a file is missing, cut off, not what its name says, or does not fit config.json.
    """
    files, found = read(folder, root, where)
    size = sum((folder / file).stat().st_size for file in files if not file.endswith(".json"))
    if root.endswith(PICKLES):
        return _estimate(files, size, config)
    _refuse_misfit(found, config, where)
    tensors.check({name: one.shape for name, one in found.items()}, config["architectures"][0], config, where)
    weights = {name: one.shape for name, one in found.items() if one.dtype in _UNQUANTIZED}
    head = next((name for name in weights if name.endswith("lm_head.weight")), None)
    tied = tensors.is_tied(config, config["architectures"][0], head=head is not None)
    tensors.check_values(found, tied=tied, where=where)
    parameters = sum(math.prod(shape) for shape in weights.values())
    if tied and head is not None and any(name.endswith("embed_tokens.weight") for name in weights):
        parameters -= math.prod(weights[head])
    sizes = {shape[1] for name, shape in weights.items() if len(shape) == 2 and name.endswith(".weight")}
    return WeightFacts(files, parameters, size / 1e6, tied, tuple(sorted(sizes)))


def read(folder: Path, root: str, where: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The names of the files that ``root`` stands for, and their tensors, none if they are pickles."""
    mapped: Mapping[str, str] = {}
    shards = [root]
    if root.endswith(".index.json"):
        mapped = read_json(folder / root, f"{where}/{root}").get("weight_map", {})
        if not (isinstance(mapped, dict) and mapped) or any(Path(str(file)).name != file for file in mapped.values()):
            raise CheckpointError(f"{where}/{root} is not an index of weight files.", COPY_AGAIN)
        shards = sorted(set(mapped.values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{where}/{shard} is missing; {root} names it.", COPY_AGAIN)
        with (folder / shard).open("rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{where}/{shard} is a Git LFS pointer, not the weights.", "Run `git lfs pull` in its folder."
            )
        if not start:
            raise CheckpointError(f"{where}/{shard} is empty.", COPY_AGAIN)
    found: dict[str, Tensor] = {}
    for shard in () if root.endswith(PICKLES) else shards:
        found |= tensors.read(folder / shard, f"{where}/{shard}")
    if found and (lost := sorted(set(mapped) - set(found))):
        raise CheckpointError(f"{where}/{root} names {lost[0]}, which no file holds.", COPY_AGAIN)
    return tuple(sorted({root, *shards})), found


def _refuse_misfit(found: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    """Refuse weights that do not fit config.json: transformers would fill gaps with random numbers and only warn."""
    for name, (dtype, shape, _) in found.items():
        if dtype not in _UNQUANTIZED and len(shape) == 2 and name.endswith("weight"):
            raise CheckpointError(
                f"{where} is quantized already: {name} is stored as {dtype}.",
                "Use the checkpoint from before it was quantized.",
            )
        if prefix := re.match(r"_orig_mod\.|module\.|base_model\.model\.", name):
            raise CheckpointError(
                f"{where}: the names of its weights begin with {prefix[0]!r}, which transformers does not know.",
                "Save the inner model: unwrap it from torch.compile, DataParallel or PEFT (merge_and_unload) first.",
            )
    layers = {match[1] for name in found if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", name))}
    said = config.get("num_hidden_layers")
    if layers and isinstance(said, int) and len(layers) != said:
        raise CheckpointError(
            f"{where}: the weights hold {len(layers)} layers, and config.json says {said}.", COPY_AGAIN
        )
    rows = next((one.shape[0] for name, one in found.items() if name.endswith("embed_tokens.weight")), None)
    if rows is not None and config.get("vocab_size") not in (None, rows):
        raise CheckpointError(
            f"{where}: the weights hold {rows} token embeddings, and config.json says vocab_size "
            f"{config['vocab_size']}.",
            "Save model and tokenizer together after model.resize_token_embeddings(...).",
        )
    if config.get("tie_word_embeddings") is False and not any(
        re.search(r"(lm_head|output|output_layer)\.weight$", name) for name in found
    ):
        raise CheckpointError(
            f"{where}: config.json says tie_word_embeddings false, and the weights hold no lm_head.weight.",
            "Set tie_word_embeddings to what the model was trained with, or save it again.",
        )


def _estimate(files: tuple[str, ...], size: int, config: Mapping[str, Any]) -> WeightFacts:
    """Facts from config.json and the file size, because pickled weights are not opened."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    hidden = config.get("hidden_size")
    heads, head_size = config.get("num_attention_heads"), config.get("head_dim")
    sizes = {hidden, config.get("intermediate_size"), heads * head_size if heads and head_size else hidden}
    return WeightFacts(
        files,
        size // {"float16": 2, "bfloat16": 2, "float64": 8}.get(dtype, 4),
        size / 1e6,
        tensors.is_tied(config, config["architectures"][0]),
        tuple(sorted(size for size in sizes if isinstance(size, int))),
    )
