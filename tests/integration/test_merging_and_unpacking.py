"""Adapters merged for real, against PEFT's own forward beside the base; GGUF files of every type, unpacked."""

import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from slmops.checkpoints import merge_worker, unpack_worker
from slmops.checkpoints.merge_worker import MergeRequest
from slmops.checkpoints.unpack_worker import UnpackRequest
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings
from tests import making, tiny
from tests.checkpoint_folders import edit_json, tree

# PEFT warns of ties, and asks transformers what it deprecates.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("qwen2", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("qwen3", {"target_modules": "all-linear", "use_dora": True}),
    "patterns": ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "some tokens": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
    "fused layers": ("phi3", {"target_modules": "all-linear"}),
    "tied, embeddings saved": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied, head saved": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, embeddings": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied, head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "kept tied": (
        "llama-tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}
TIED = {"some tokens", "kept tied"}


def train(kind: str, folder: Path, *, rows: int | None = None, dtype: str = "float32", **lora: Any) -> Any:
    """Write ``base`` and ``adapter`` into ``folder``; returns the logits of the two side by side."""
    import peft
    import torch
    import transformers

    tiny.make(kind, folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    base.save_pretrained(folder / "base")
    if rows:
        base.resize_token_embeddings(rows)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder / "adapter")
    return logits(model.eval(), rows)


def logits(model: Any, rows: int | None = None) -> Any:
    import torch

    ids = torch.randint(rows or tiny.VOCABULARY, (1, 50), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def merge(folder: Path) -> Any:
    """The merged model, read again."""
    import transformers

    base, adapter, merged = (folder / name for name in ("base", "adapter", "merged"))
    merge_worker.handle(MergeRequest(base=base, adapter=adapter, folder=merged, trust_remote_code=False))
    return transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto").eval()


def off(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_model_computes_what_the_adapter_does_beside_its_base(tmp_path: Path, name: str) -> None:
    kind, lora = KINDS[name]
    beside = train(kind, tmp_path, **lora)
    merged = merge(tmp_path)
    assert off(logits(merged), beside) < 1e-5
    assert merged.config.tie_word_embeddings is (name in TIED)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embeddings_that_were_resized_for_new_tokens(tmp_path: Path, kind: str) -> None:
    rows = tiny.VOCABULARY + 8
    beside = train(kind, tmp_path, rows=rows, target_modules=["q_proj"])
    merged = merge(tmp_path)
    assert merged.config.vocab_size == rows
    assert off(logits(merged, rows), beside) < 1e-5


def test_the_dtype_is_the_base_models(tmp_path: Path) -> None:
    beside = train("qwen2", tmp_path, dtype="bfloat16", target_modules="all-linear", use_dora=True)
    merged = merge(tmp_path)
    assert {str(weight.dtype) for weight in merged.parameters()} == {"torch.bfloat16"}
    assert off(logits(merged), beside) < 0.05


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    train("llama", tmp_path, target_modules=["q_proj"])
    good, adapter = tmp_path / "good", tmp_path / "adapter"
    shutil.copytree(adapter, good)
    whole = load_file(good / "adapter_model.safetensors")
    first = min(whole)
    stray = first.replace("q_proj", "z_proj")

    def refuse(named: str) -> None:
        with pytest.raises(CheckpointError, match=f"(?s){named}.*--base"):
            merge(tmp_path)
        shutil.copytree(good, adapter, dirs_exist_ok=True)

    for weights, named in (
        ({**whole, stray: whole[first]}, "the base has no place for .*z_proj"),
        ({name: one for name, one in whole.items() if name != first}, "the adapter lacks .*q_proj"),
        ({**whole, first: whole[first][:, :-1]}, "size mismatch"),
        ({**whole, first: whole[first] * float("nan")}, "NaNs detected"),
    ):
        save_file({name: one.clone() for name, one in weights.items()}, adapter / "adapter_model.safetensors")
        refuse(named)
    for changes, named in (
        ({"target_modules": ["query_key_value"]}, "query_key_value"),
        ({"of_tomorrow": 3}, "does not know its setting of_tomorrow"),
        ({"peft_type": "NEWLORA"}, "NEWLORA"),
    ):
        edit_json(adapter / "adapter_config.json", **changes)
        refuse(named)
    shutil.rmtree(tmp_path / "base")
    tiny.make("llama", tmp_path / "base", hidden_size=128)
    refuse("size mismatch")


def kill_while_it_merges(asked: Job, settings: Settings) -> Path:
    """Kill a job as soon as its child has begun, which takes seconds; returns the folder that is not whole."""
    job = multiprocessing.get_context("spawn").Process(target=making.resolve, args=(asked, settings))
    job.start()
    while not [*settings.logs.glob("merging-*.log")]:
        assert job.is_alive()
        time.sleep(0.01)
    job.kill()
    job.join()
    [begun] = settings.checkpoints.glob(".*.part")
    return begun


@pytest.mark.usefixtures("in_process")
def test_an_adapter_is_a_checkpoint_with_a_tokenizer_of_its_own(tmp_path: Path, fresh: Settings) -> None:
    """Its base has moved; the merged folder is made once, whole, and recorded; one that was killed does not count."""
    from transformers import AutoTokenizer

    train("llama", tmp_path, target_modules=["q_proj", "v_proj"], rows=tiny.VOCABULARY + 1)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "training_args.bin").write_bytes(b"pickle")
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    before = tree(moved), tree(tmp_path / "adapter")
    asked = Job(model=str(tmp_path / "adapter"), base=str(moved))
    unfinished = kill_while_it_merges(asked, fresh)
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert [*fresh.checkpoints.iterdir()] == [unfinished]
    found = making.resolve(asked, fresh)
    assert (found.name, found.architecture) == ("adapter", "LlamaForCausalLM")
    assert str(found.base).startswith(f"{moved}@sha256:")
    assert AutoTokenizer.from_pretrained(found.path).eos_token == "<|done|>"
    assert json.loads((found.path / "config.json").read_text())["vocab_size"] == tiny.VOCABULARY + 1
    assert "training_args.bin" not in tree(found.path)
    assert [*fresh.checkpoints.iterdir()] == [found.path]
    made = (found.path / "model.safetensors").stat().st_mtime_ns
    assert making.resolve(asked, fresh) == found
    assert (found.path / "model.safetensors").stat().st_mtime_ns == made
    assert (tree(moved), tree(tmp_path / "adapter")) == before


# --- GGUF files, and what they say that transformers does not read

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
    unpack_worker.handle(UnpackRequest(source=path, folder=folder))
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
