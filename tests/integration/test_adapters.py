"""Adapters merged for real, and what they compute then against PEFT's own forward beside the base."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints.merge_worker import MergeRequest, handle
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
    handle(MergeRequest(base=base, adapter=adapter, folder=merged, trust_remote_code=False))
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
        with pytest.raises(CheckpointError, match=named) as caught:
            merge(tmp_path)
        assert "--base" in (caught.value.fix or "")
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
