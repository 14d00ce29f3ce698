"""Do the tensors of a checkpoint make the model that its config.json describes?

transformers fills what is missing with ones, zeros or random numbers, and only warns. The names and shapes are those of
transformers 5, for the architectures that are proven; of the others, what the fp32 export computes decides.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.checkpoints.architectures import PROVEN
from slmops.core.errors import CheckpointError

log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int]]

_TIED_BY_DEFAULT = {"Gemma2ForCausalLM", "SmolLM3ForCausalLM"}
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


def check(found: Shapes, architecture: str, config: Mapping[str, Any], where: str) -> None:
    """Compare names and shapes with what the architecture needs; warn of tensors that nothing uses.

    Args:
        found: Shape of each tensor, by name.
        architecture: As config.json names it.
        config: Content of config.json.
        where: What to call the checkpoint in messages.

    Raises:
        CheckpointError: Tensors are missing, or have other shapes.
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


def _wanted(architecture: str, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shape by name, without the prefix ``model.``."""
    hidden, inner, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    rows, layers = config["vocab_size"], config["num_hidden_layers"]
    head = config.get("head_dim") or hidden // heads
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
    if architecture == "Gemma2ForCausalLM":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if architecture == "Qwen3ForCausalLM":
        layer |= {f"self_attn.{name}.weight": [head] for name in ("q_norm", "k_norm")}
    layer |= {f"{name}.weight": [hidden] for name in norms}
    tied = config.get("tie_word_embeddings", architecture in _TIED_BY_DEFAULT)
    return {
        "embed_tokens.weight": [rows, hidden],
        **{f"layers.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()},
        "norm.weight": [hidden],
        **({} if tied else {"lm_head.weight": [rows, hidden]}),
    }


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_values(paths: Sequence[Path], *, tied: bool, where: str) -> None:
    """Look for weights that are not numbers, and for a head that a tied checkpoint should not have.

    Raises:
        CheckpointError: There is a NaN or an infinity, or the head differs from the embeddings that it is tied to.
    """
    import numpy as np

    kept = {}
    for name, dtype, data in _tensors(paths):
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


def _tensors(paths: Sequence[Path]) -> Iterator[tuple[str, str, Any]]:
    """Name, type and bytes of each tensor in safetensors files, whose headers have been checked. numpy has no bf16."""
    import numpy as np

    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        content = np.memmap(path, np.uint8, "r", offset=8 + length) if path.stat().st_size > 8 + length else None
        for name, one in header.items():
            if name != "__metadata__" and content is not None:
                start, end = one["data_offsets"]
                yield name, one["dtype"], content[start:end]
