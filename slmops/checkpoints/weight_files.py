"""The weight files of a checkpoint, read without torch: which count, whether they are whole, and what they hold.

And do their tensors make the model that config.json describes? transformers fills what is missing with ones, zeros or
random numbers, and only warns. The names and shapes are those of transformers 5, for the architectures that are proven;
of the others, what the fp32 export computes decides.
"""

import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slmops.checkpoints.architectures import PROVEN
from slmops.checkpoints.reading import COPY_AGAIN, read_json
from slmops.core.errors import CheckpointError

log = logging.getLogger(__name__)

ROOTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What transformers looks for, in its order."""
ADAPTER = "adapter_config.json"
ADAPTER_ROOTS = ("adapter_model.safetensors", "adapter_model.bin")  # what PEFT looks for beside it
PICKLES = (".bin", ".bin.index.json")

_TIED_BY_DEFAULT = {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"}
_FUSED = {"Phi3ForCausalLM"}
_WITH_MLP_BIAS = {"LlamaForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"}
# Buffers that older versions saved, and what is computed anew.
_HARMLESS = re.compile(r"(inv_freq|masked_bias|\.bias_k)$")
_UNQUANTIZED = {  # its numbers as integers, and the bits of the exponent, which are all set in a NaN or an infinity
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_BLOCK = 1 << 22
_LFS_POINTER = b"version https://git-lfs"
_SAVE_AGAIN = "Save it again: load what you trained, and model.save_pretrained(folder)."
_AS_SAFETENSORS = "Save it again with model.save_pretrained(folder), which writes safetensors"


class Tensor(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: list[int]
    data: Any  # its bytes, which stay in the file until they are looked at; numpy has no bf16


@dataclass(frozen=True)
class WeightFacts:
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
            f"It needs {' or '.join(roots[: len(roots) // 2])}. {_AS_SAFETENSORS}.",
        )
    if root.endswith(PICKLES) and not allow_pickle:
        raise CheckpointError(
            f"{where} has pickled weights only ({root}), which can run code when they are read.",
            f"{_AS_SAFETENSORS}, or pass --allow-pickle if you trust its origin.",
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
    check_names({name: one.shape for name, one in found.items()}, config["architectures"][0], config, where)
    weights = {name: one.shape for name, one in found.items() if one.dtype in _UNQUANTIZED}
    head = next((name for name in weights if name.endswith("lm_head.weight")), None)
    tied = is_tied(config, config["architectures"][0], head=head is not None)
    check_values(found, tied=tied, where=where)
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
        found |= read_file(folder / shard, f"{where}/{shard}")
    if found and (lost := sorted(set(mapped) - set(found))):
        raise CheckpointError(f"{where}/{root} names {lost[0]}, which no file holds.", COPY_AGAIN)
    return tuple(sorted({root, *shards})), found


def read_file(path: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; a CheckpointError if it is not a whole one."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"), path.open("rb") as file:  # it checks that the file is as long as its header says
            begin = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(begin - 8))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where} is not a whole safetensors file: {error}", COPY_AGAIN) from error
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, "r")[begin:]
    return {
        name: Tensor(one["dtype"], one["shape"], content[slice(*one["data_offsets"])]) for name, one in header.items()
    }


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
        is_tied(config, config["architectures"][0]),
        tuple(sorted(size for size in sizes if isinstance(size, int))),
    )


def check_names(found: Mapping[str, Sequence[int]], architecture: str, config: Mapping[str, Any], where: str) -> None:
    """Compare names and shapes with what the architecture needs; warn of tensors that nothing uses.

    A CheckpointError, which calls the checkpoint ``where``, if tensors are missing or have other shapes.
    """
    if architecture not in PROVEN:
        return
    try:
        wanted = _wanted(architecture, config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{where}/config.json does not tell the sizes of the layers: {error!r}.", _SAVE_AGAIN
        ) from error
    there = {name.removeprefix("model."): list(shape) for name, shape in found.items()}
    missing = [name for name in wanted if name not in there]
    other = [
        f"{name} is {there[name]} and should be {shape}"
        for name, shape in wanted.items()
        if there.get(name, shape) != shape
    ]
    surplus = [name for name in there if name not in wanted and name != "lm_head.weight" and not _HARMLESS.search(name)]
    if missing:
        perhaps = f" It has {_some(surplus)}, which nothing uses." if surplus else ""
        raise CheckpointError(
            f"{where}: the weights lack {_some(missing)}, which transformers would fill with made-up numbers.{perhaps}",
            _SAVE_AGAIN,
        )
    if other:
        raise CheckpointError(f"{where}: the weights do not fit config.json: {_some(other)}.", _SAVE_AGAIN)
    if surplus:
        log.warning(
            "%s: nothing uses %s; transformers ignores such weights, and so do the variants", where, _some(surplus)
        )


def head_size(config: Mapping[str, Any]) -> int:
    """Dimensions of one head of attention; 0 if config.json does not tell."""
    size: int = config.get("head_dim") or (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1)
    return size


def _wanted(architecture: str, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shape by name, without the prefix ``model.``."""
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    rows, layers = config["vocab_size"], config["num_hidden_layers"]
    head = head_size(config)
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    attention = {"q_proj": [queries, hidden], "k_proj": [keys, hidden], "v_proj": [keys, hidden]}
    mlp = {"gate_proj": [inner, hidden], "up_proj": [inner, hidden]}
    if architecture in _FUSED:
        attention, mlp = {"qkv_proj": [queries + 2 * keys, hidden]}, {"gate_up_proj": [2 * inner, hidden]}
    always = architecture == "Qwen2ForCausalLM"
    attention_biases = [*attention] if always else [*attention, "o_proj"] if config.get("attention_bias") else []
    attention["o_proj"], mlp["down_proj"] = [hidden, queries], [hidden, inner]
    mlp_biases = [*mlp] if config.get("mlp_bias") and architecture in _WITH_MLP_BIAS else []
    norms = ["input_layernorm", "post_attention_layernorm"]
    layer = {f"self_attn.{name}.weight": shape for name, shape in attention.items()}
    layer |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
    layer |= {f"self_attn.{name}.bias": attention[name][:1] for name in attention_biases}
    layer |= {f"mlp.{name}.bias": mlp[name][:1] for name in mlp_biases}
    if architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"):
        layer |= {f"self_attn.{name}.weight": [head] for name in ("q_norm", "k_norm")}
    layer |= {f"{name}.weight": [hidden] for name in norms}
    return {
        "embed_tokens.weight": [rows, hidden],
        **{f"layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()},
        "norm.weight": [hidden],
        **({} if is_tied(config, architecture) else {"lm_head.weight": [rows, hidden]}),
    }


def is_tied(config: Mapping[str, Any], architecture: str, *, head: bool = True) -> bool:
    """Whether the embeddings are the output head, too: as config.json says, else as transformers has it by default."""
    said = config.get("tie_word_embeddings")
    return not head or architecture in _TIED_BY_DEFAULT if said is None else bool(said)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_values(tensors: Mapping[str, Tensor], *, tied: bool, where: str) -> None:
    """A CheckpointError if a weight is a NaN or an infinity, or a head differs from the embeddings it is tied to."""
    import numpy as np

    kept = {}
    for name, (dtype, _, data) in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            kept[name.rpartition(".weight")[0].rpartition(".")[2]] = data
        kind, exponent = _UNQUANTIZED.get(dtype, ("", 0))
        if not kind:
            continue
        numbers = data.view(kind)
        for start in range(0, len(numbers), _BLOCK):
            if (numbers[start : start + _BLOCK] & exponent == exponent).any():
                raise CheckpointError(
                    f"{where}: {name} holds weights that are not finite numbers (NaN or infinity).",
                    "Use a checkpoint from before the training diverged.",
                )
    if tied and len(kept) == 2 and not np.array_equal(kept["embed_tokens"], kept["lm_head"]):
        raise CheckpointError(
            f"{where}: config.json says tie_word_embeddings true, and lm_head.weight differs from the embeddings.",
            "Set tie_word_embeddings to false if the head was trained by itself; else remove lm_head.weight.",
        )
