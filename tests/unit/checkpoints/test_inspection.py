"""What a folder must hold, and every way in which it can be unusable: folders of a few hundred bytes."""

import json
import logging
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.checkpoints import architectures, weight_files
from slmops.core.errors import CheckpointError
from slmops.core.settings import Settings
from tests import tiny
from tests.checkpoint_folders import (
    HIDDEN,
    INNER,
    PARAMETERS,
    TENSORS,
    VOCAB,
    Resolve,
    edit_json,
    tree,
    write_json,
    write_safetensors,
)

Change = Callable[[Path], object]


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


def test_a_tied_head_that_is_stored_counts_once_and_is_the_same(folder: Path, resolve: Resolve) -> None:
    path = folder / WEIGHTS
    write_safetensors(path, TENSORS | {"lm_head.weight": [VOCAB, HIDDEN]})
    assert resolve(folder).parameters == PARAMETERS
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", 1))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        resolve(folder)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    assert resolve(folder).parameters == PARAMETERS + VOCAB * HIDDEN
    assert not resolve(folder).tied_embeddings
    edit_json(folder / "config.json", tie_word_embeddings="-")  # without a word, a stored head means untied
    assert not resolve(folder).tied_embeddings


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


def test_shards_and_pickles_if_allowed(folder: Path, resolve: Resolve) -> None:
    shard(folder)
    assert resolve(folder).parameters == PARAMETERS
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"P" * 2_000)
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    found = resolve(folder, allow_pickle=True)
    assert (found.parameters, found.linear_sizes) == (1000, (HIDDEN, INNER))


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def config(**changes: object) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def put(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weigh(change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def weights(tensors: Mapping[str, list[int]], *args: Any) -> Change:
    return lambda folder: write_safetensors(folder / "model.safetensors", tensors, *args)


def without(lost: str) -> Change:
    return weights({name: shape for name, shape in TENSORS.items() if name != lost})


def rename(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def every(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
OWN_TOKENIZER = '{"auto_map": {"AutoTokenizer": ["t.T", null]}}'
ATTENTION = "model.layers.1.self_attn"
LOST = (
    *("model.norm.weight", "model.layers.1.input_layernorm.weight"),
    *(f"{ATTENTION}.k_proj.weight", "model.embed_tokens.weight"),
)
COMPILED = {f"_orig_mod.{name}": shape for name, shape in TENSORS.items()}

BROKEN: dict[str, tuple[Change, str]] = {
    # what is done to a whole checkpoint, and what the message has to name
    "no config": (drop("config.json"), "config.json is missing"),
    "config cut": (put("config.json", '{"a": '), "config.json is not JSON"),
    "config list": (put("config.json", "[]"), "config.json is not a JSON object"),
    "config latin": (put("config.json", b'{"a": "\xe9"}'), "config.json is not JSON"),
    "no architectures": (config(architectures="-"), "architectures"),
    "empty architectures": (config(architectures=[]), "architectures"),
    "gemma3": (config(architectures=["Gemma3ForConditionalGeneration"]), "save its language model by itself"),
    "bert": (config(architectures=["BertModel"]), "BertModel cannot be converted: no exporter is known for it"),
    "olmo2": (config(architectures=["Olmo2ForCausalLM"]), "Olmo2ForCausalLM cannot be converted: the model builder"),
    "heads": (config(hidden_size=48), "its heads have 24 dimensions, 24 of them with rotary positions"),
    "head_dim": (config(head_dim=40), "its heads have 40 dimensions, 40 of them"),
    "rotary part": (config(rope_parameters={"partial_rotary_factor": 0.75}), "16 dimensions, 12 of them"),
    "older rotary part": (config(partial_rotary_factor=0.75), "16 dimensions, 12 of them"),
    "no context": (config(max_position_embeddings="-"), "max_position_embeddings"),
    "quantized": (config(quantization_config={"bits": 4}), "quantization_config"),
    **{
        method: (config(quantization_config={"quant_method": method}), f"quantized already ({method} in")
        for method in ("bitsandbytes", "compressed-tensors")
    },
    "own code": (config(auto_map={"AutoModel": "m.M"}), "auto_map in config.json"),
    "own tokenizer code": (put("tokenizer_config.json", OWN_TOKENIZER), "auto_map in tokenizer_config.json"),
    "own generate": (lambda folder: (folder / "custom_generate").mkdir(), "custom_generate"),
    "no tokenizer": (drop("tokenizer.json"), "no tokenizer"),
    "tokenizer cut": (put("tokenizer.json", '{"model": '), "tokenizer.json is not JSON"),
    "no template": (drop("chat_template.jinja"), "no chat template"),
    "empty template": (put("chat_template.jinja", " \n"), "chat_template.jinja is empty"),
    "no weights": (drop(WEIGHTS), "has no weights"),
    "other weights": (rename(WEIGHTS, "consolidated.safetensors"), "only consolidated.safetensors"),
    "pickles": (rename(WEIGHTS, "pytorch_model.bin"), "pytorch_model.bin"),
    "pt file": (rename(WEIGHTS, "consolidated.00.pth"), "consolidated.00.pth"),
    "gguf inside": (every(drop("config.json"), rename(WEIGHTS, "m.gguf")), "m.gguf"),
    "adapter without weights": (every(drop(WEIGHTS), put("adapter_config.json", "{}")), "has no weights"),
    "adapter beside weights": (put("adapter_config.json", "{}"), "beside full weights"),
    "lfs pointer": (put(WEIGHTS, LFS), "Git LFS pointer"),
    "empty weights": (put(WEIGHTS, b""), "model.safetensors is empty"),
    "no header": (put(WEIGHTS, b"\xff" * 64), "not a whole safetensors file"),
    "short header": (put(WEIGHTS, b"\x10\0\0"), "not a whole safetensors file"),
    "cut header": (weigh(lambda raw: raw[: -4 * PARAMETERS - 9]), "not a whole safetensors file"),
    "cut off": (weigh(lambda raw: raw[:-1]), "not a whole safetensors file"),
    "too long": (weigh(lambda raw: raw + b"x" * 5), "not a whole safetensors file"),
    "stored quantized": (weights(TENSORS, "U8", 1), "model.embed_tokens.weight is stored as U8"),
    "compiled": (weights(COMPILED), "'_orig_mod.'"),
    **{f"without {name}": (without(name), f"lack {name.removeprefix('model.')}, which") for name in LOST},
    "renamed": (
        weights({name.replace("1.mlp.up_proj", "1.mlp.w3"): shape for name, shape in TENSORS.items()}),
        "lack layers.1.mlp.up_proj.weight, which transformers would fill with made-up numbers. It has layers.1.mlp.w3.",
    ),
    "other shape": (weights(TENSORS | {f"{ATTENTION}.q_proj.weight": [8, 9]}), "q_proj.weight is [8, 9] and should be"),
    "layers lost": (config(num_hidden_layers=3), "2 layers"),
    "vocabulary grown": (config(vocab_size=12), "10 token embeddings"),
    "head lost": (config(tie_word_embeddings=False), "lm_head.weight"),
    "shard lost": (every(shard, drop("model-2.safetensors")), "model-2.safetensors is missing"),
    "index broken": (every(shard, put(INDEX, "{}")), "not an index"),
    "index leads out": (every(shard, put(INDEX, '{"weight_map": {"a": "../model-1.safetensors"}}')), "not an index"),
    "index promises more": (every(shard, put(INDEX, '{"weight_map": {"a": "model-1.safetensors"}}')), "names a, "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(folder: Path, resolve: Resolve, case: str) -> None:
    change, named = BROKEN[case]
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        resolve(folder)
    assert named in caught.value.message
    architecture = case in ("gemma3", "bert", "olmo2")
    assert ("Tested: Gemma2" in (caught.value.fix or "")) if architecture else (str(folder) in caught.value.message)
    assert (caught.value.exit_code, bool(caught.value.fix)) == (2, True)


def test_untested_architectures_are_allowed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        architectures.check("LlamaForCausalLM")
        assert not caplog.records
        architectures.check("GemmaForCausalLM")
    assert "GemmaForCausalLM" in caplog.text
    assert not architectures.PROVEN & architectures.UNPROVEN
    assert not architectures.REFUSED.keys() & (architectures.PROVEN | architectures.UNPROVEN)


# --- weights that do not make the model that config.json describes

LAYER = "model.layers.1."


@pytest.mark.parametrize(
    ("surplus", "told"),
    [(f"{LAYER}self_attn.rotary_emb.inv_freq", False), ("v_head.summary.weight", True), (f"{LAYER}mlp.lora_A", True)],
)
def test_what_nothing_uses(
    folder: Path, resolve: Resolve, caplog: pytest.LogCaptureFixture, surplus: str, told: bool
) -> None:
    write_safetensors(folder / "model.safetensors", TENSORS | {surplus: [4]})
    with caplog.at_level(logging.WARNING):
        resolve(folder)
    assert (surplus.removeprefix("model.") in caplog.text) == told


def test_a_base_model_without_the_prefix_is_whole(folder: Path, resolve: Resolve) -> None:
    write_safetensors(folder / "model.safetensors", {name.removeprefix("model."): s for name, s in TENSORS.items()})
    assert resolve(folder).tied_embeddings


def test_a_head_that_the_architecture_has_by_default(folder: Path, resolve: Resolve) -> None:
    edit_json(folder / "config.json", tie_word_embeddings="-")
    with pytest.raises(CheckpointError, match=r"lack lm_head\.weight"):
        resolve(folder)
    edit_json(folder / "config.json", architectures=["SmolLM3ForCausalLM"])
    resolve(folder)
    write_safetensors(folder / "model.safetensors", {**TENSORS, "lm_head.weight": [VOCAB, HIDDEN]})
    assert resolve(folder).tied_embeddings  # transformers ignores the head, whether it is the same or not


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "phi"])
def test_whole_checkpoints_of_each_architecture(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    import transformers

    config = tiny.config(kind)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    said = json.loads(config.to_json_string(use_diff=False))
    weight_files.check_names(found, type(model).__name__, said, "it")
    assert "nothing uses" not in caplog.text
    name = "lm_head.weight" if not config.tie_word_embeddings else "model.norm.weight"
    with pytest.raises(CheckpointError, match="lack"):
        weight_files.check_names({key: found[key] for key in found if key != name}, type(model).__name__, said, "it")


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("F32", np.array([np.nan], "<f4")),
        ("F32", np.array([-np.inf], "<f4")),
        ("F16", np.array([np.nan], "<f2")),
        ("BF16", np.array([0x7F80], "<u2")),
        ("BF16", np.array([0xFFC0], "<u2")),
        ("F64", np.array([np.inf], "<f8")),
    ],
)
def test_weights_that_are_not_finite(folder: Path, resolve: Resolve, dtype: str, pattern: np.ndarray[Any, Any]) -> None:
    path = folder / "model.safetensors"
    write_safetensors(path, TENSORS, dtype, pattern.itemsize)
    resolve(folder)
    content = bytearray(path.read_bytes())
    content[-2 * pattern.itemsize : -pattern.itemsize] = pattern.tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"post_attention_layernorm\.weight holds weights that are not finite"):
        resolve(folder)


@pytest.mark.parametrize(
    ("tokenizer", "refused"),
    [
        ({"model": {"type": "BPE", "vocab": {f"t{number}": number for number in range(VOCAB)}}}, True),
        ({"added_tokens": [{"id": VOCAB - 1, "content": "<|tool|>"}]}, True),
        # Gemma 3's text models share the tokenizer with those that read images.
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": VOCAB - 1, "content": "<image_soft_token>"}]}, False),
    ],
)
def test_tokens_beyond_the_embeddings(folder: Path, resolve: Resolve, tokenizer: dict[str, Any], refused: bool) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    resolve(folder)
    path.write_text(json.dumps(tokenizer).replace(f": {VOCAB - 1}", f": {VOCAB}"))
    with pytest.raises(CheckpointError, match=rf"{VOCAB} token embeddings.*id {VOCAB}") if refused else nullcontext():
        resolve(folder)
