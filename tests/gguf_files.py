"""GGUF files of tiny checkpoints, as llama.cpp's converter writes them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


def write(
    checkpoint: Path,
    path: Path,
    *,
    types: Mapping[str, Type] | None = None,
    extra: Mapping[str, Any] | None = None,
    say: Callable[[gguf.GGUFWriter], object] = lambda _: None,
) -> dict[str, Any]:
    """Write the weights in ``checkpoint`` with ``types`` by GGUF name, random ones where gguf cannot quantize.

    Returns the data of each tensor. ``say`` and ``extra`` add metadata and tensors.
    """
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    architecture, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    bpe = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(bpe["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template((checkpoint / "chat_template.jinja").read_text())
    say(writer)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    random = np.random.default_rng(0)
    written = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        at = str(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            parts = heads if "q_proj" in name else config["num_key_value_heads"]
            weight = weight.reshape(parts, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        kind = (types or {}).get(at, Type.F32)
        try:
            data = gguf.quantize(weight, kind)
        except NotImplementedError:  # bytes below 0x3C make no float16 that is infinite
            shape = gguf.quant_shape_to_byte_shape(weight.shape, kind)
            data = random.integers(0, 0x3C, shape, dtype=np.uint8)
        writer.add_tensor(at, data, raw_dtype=kind)
        written[at] = data
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written
