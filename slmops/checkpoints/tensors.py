"""Do the tensors of a checkpoint make the model that its config.json describes?

transformers fills what is missing with ones, zeros or random numbers, and only warns. The names and shapes are those of
transformers 5, for the architectures that are proven; of the others, what the fp32 export computes decides.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmops.checkpoints.architectures import PROVEN
from slmops.checkpoints.reading import COPY_AGAIN
from slmops.core.errors import CheckpointError

log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]

_TIED_BY_DEFAULT = {"Gemma2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"}
_FUSED = {"Phi3ForCausalLM"}
_WITH_MLP_BIAS = {"LlamaForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"}
# Buffers that older versions saved, and what is computed anew.
_HARMLESS = re.compile(r"(inv_freq|masked_bias|\.bias_k)$")
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_BLOCK = 1 << 22
_SAVE_AGAIN = "Save it again: load what you trained, and model.save_pretrained(folder)."


class Tensor(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: list[int]
    data: Any  # its bytes, which stay in the file until they are looked at; numpy has no bf16


def read(path: Path, where: str) -> dict[str, Tensor]:
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


def check(found: Shapes, architecture: str, config: Mapping[str, Any], where: str) -> None:
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
        kind, exponent = _EXPONENTS.get(dtype, ("", 0))
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
