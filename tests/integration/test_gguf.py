"""GGUF files of every type, and what they say that transformers does not read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slmops.checkpoints.unpack_worker import UnpackRequest, handle
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings
from tests import making, tiny

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

UNKNOWN = {Type.Q8_1, Type.Q8_K, Type.Q1_0, Type.F64, Type.I8, Type.I16, Type.I32, Type.I64}


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


def unpack(path: Path) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    handle(UnpackRequest(source=path, folder=folder))
    return folder


def test_every_type_is_dequantized_as_gguf_does(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    kinds = [kind for kind in Type if kind not in UNKNOWN]
    tiny.make("qwen2", tmp_path / "base", hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    layers = {"q_proj": "attn_q", "o_proj": "attn_output", "k_proj": "attn_k", "v_proj": "attn_v"}
    layers |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    at = [(f"blk.{n}.{theirs}.weight", ours) for n in range(4) for ours, theirs in layers.items()]
    types = dict(zip((name for name, _ in at), kinds, strict=False))
    assert len(types) == len(kinds)
    written = write(tmp_path / "base", tmp_path / "all.gguf", types=types)
    found = load_file(unpack(tmp_path / "all.gguf") / "model.safetensors")
    for name, ours in at[: len(kinds)]:
        part = "mlp" if "ffn" in name else "self_attn"
        tensor = found[f"model.layers.{name.split('.')[1]}.{part}.{ours}.weight"]
        assert np.array_equal(tensor, gguf.dequantize(written[name], types[name])), types[name].name


@pytest.mark.usefixtures("in_process")
def test_a_link_of_the_hubs_cache(tmp_path: Path, fresh: Settings) -> None:
    write(tiny.make("llama", tmp_path / "base"), tmp_path / "0a1b2c")
    (tmp_path / "Mine.F32.gguf").symlink_to("0a1b2c")
    found = making.resolve(Job(model=str(tmp_path / "Mine.F32.gguf")), fresh)
    assert (found.name, found.architecture) == ("mine", "LlamaForCausalLM")


@pytest.mark.parametrize("kind", [Type.Q8_K, Type.Q1_0])
def test_an_unknown_type_is_named(tmp_path: Path, kind: Type) -> None:
    tiny.make("qwen2", tmp_path / "base", hidden_size=256, intermediate_size=256)
    write(tmp_path / "base", tmp_path / "odd.gguf", types={"blk.0.attn_q.weight": kind})
    with pytest.raises(CheckpointError, match=kind.name):
        unpack(tmp_path / "odd.gguf")


def factors(original: int) -> Any:
    """What llama.cpp's converter writes for a head of 16 and Llama 3's scaling by 8."""
    wavelengths = 2 * np.pi * 10_000 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((original / wavelengths - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def test_the_rope_of_llama_3_is_read_though_transformers_does_not(tmp_path: Path) -> None:
    tiny.make("llama", tmp_path / "base")
    write(tmp_path / "base", tmp_path / "new.gguf", extra={"rope_freqs.weight": factors(8192)})
    config = json.loads((unpack(tmp_path / "new.gguf") / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3"
    assert config["rope_parameters"]["factor"] == 8.0
    write(tmp_path / "base", tmp_path / "other.gguf", extra={"rope_freqs.weight": factors(1024)})
    with pytest.raises(CheckpointError, match="is not the scaling of Llama 3"):
        unpack(tmp_path / "other.gguf")


UNREAD: dict[str, Callable[[gguf.GGUFWriter], object]] = {
    "llama.rope.scaling.type is yarn": lambda to: to.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "llama.attention.key_length is 32, and the model would have 16": lambda to: to.add_key_length(32),
    "llama.attention.sliding_window is 512": lambda to: to.add_sliding_window(512),
    "nothing uses blk.0.attn_q.bias": lambda to: to.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
}


@pytest.mark.parametrize("named", UNREAD)
def test_what_transformers_does_not_read_is_refused(tmp_path: Path, named: str) -> None:
    tiny.make("llama", tmp_path / "base")
    write(tmp_path / "base", tmp_path / "more.gguf", say=UNREAD[named])
    with pytest.raises(CheckpointError, match=named):
        unpack(tmp_path / "more.gguf")
