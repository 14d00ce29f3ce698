"""Checkpoints as GGUF files: what is written, and what llama.cpp makes of it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from slmops.checkpoints import model as stored
from slmops.core.errors import CheckpointError
from slmops.core.settings import Settings
from slmops.evaluation import gguf_worker
from slmops.evaluation.gguf_worker import GgufRequest
from tests import making, tiny

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
with_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, of the extra 'peers', is not installed"
)

FULL: dict[str, Any] = {"use_sliding_window": False, "sliding_window": None}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {},
    "llama3-rope": {},
    "mistral": {"sliding_window": None},
    "qwen2": FULL,
    "qwen3": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_what_the_calculation_depends_on_is_written(kind: str, tmp_path: Path) -> None:
    model = stored.load(tiny.make(kind, tmp_path / "checkpoint", **KINDS[kind]))
    gguf_worker.check(tmp_path / "checkpoint")
    gguf_worker.write(model, tmp_path / "F32.gguf")
    reader = gguf.GGUFReader(tmp_path / "F32.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    assert (factors is not None) == (kind == "llama3-rope")
    written = {key: value.numpy() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del written["lm_head.weight"]
    assert sum(one.size for one in tensors.values()) == sum(one.size for one in written.values())
    assert np.array_equal(tensors["blk.1.ffn_down.weight"], written["model.layers.1.mlp.down_proj.weight"])
    halves = written["model.layers.1.self_attn.k_proj.weight"]
    if not kind.startswith("qwen"):  # of each head the first of the one half, the first of the other, and so on
        halves = halves.reshape(2, 2, -1, 64).transpose(0, 2, 1, 3).reshape(halves.shape)
    assert np.array_equal(tensors["blk.1.attn_k.weight"], halves)
    architecture = reader.fields["general.architecture"].contents()
    said = {
        key: reader.fields[f"{architecture}.{key}"].contents() for key in ("block_count", "attention.head_count_kv")
    }
    assert said == {"block_count": 2, "attention.head_count_kv": 2}


@pytest.mark.parametrize(
    ("kind", "why"), [("phi3", "Phi3ForCausalLM is none of"), ("qwen2", "64 tokens"), ("qwen2-tied", "type yarn")]
)
def test_what_cannot_be_written_is_refused(kind: str, why: str, tmp_path: Path) -> None:
    tiny.config(
        kind, architectures=[type(tiny.config(kind)).__name__.replace("Config", "ForCausalLM")]
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        gguf_worker.check(tmp_path)


@with_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same_and_quantizes(kind: str, tmp_path: Path) -> None:
    folder = tiny.make(kind, tmp_path / "checkpoint", **KINDS[kind])
    asked = GgufRequest(checkpoint=folder, folder=tmp_path / "gguf", types=("Q8_0", "Q4_0"), tolerance=1e-4)
    made = gguf_worker.handle(asked)
    assert made.error < 1e-4
    assert "CPU" in made.system_info
    sizes = [(asked.folder / f"{kind}.gguf").stat().st_size for kind in ("F32", "Q8_0", "Q4_0")]
    assert sizes == sorted(sizes, reverse=True)


@with_llama_cpp
def test_threads_of_llama_cpp_do_not_sleep_while_they_wait() -> None:
    """As threads of other children do: with that it decodes at a third of its speed."""
    program = "import os; import slmops.evaluation.gguf_model; print('OMP_WAIT_POLICY' in os.environ)"
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@with_llama_cpp
def test_a_job_shows_them_beside_its_variants(settings: Settings, talkative: Path, stock: Settings) -> None:
    from mlflow import MlflowClient

    from flows.optimize import optimize

    job = making.job(talkative, name="beside", precision=["int8"], peer="llama.cpp")
    making.place(("fp32", "int8"), job, stock, settings.home)
    made = optimize(job)
    q8, q4 = made.peers
    assert [one.name for one in made.peers] == ["llama.cpp-Q8_0", "llama.cpp-Q4_K_M"]
    assert made.choice.variant in ("fp32", "int8")
    of_variants = {metric for metric in made.variants[1].metrics if metric.startswith(("size", "ttft", "decode", "kl"))}
    for one in made.peers:
        assert (one.status, one.gates) == ("ok", ())
        assert one.metrics.keys() > of_variants
        run = MlflowClient(settings.tracking_uri).get_run(one.run_id)
        assert run.data.tags["slmops.kind"] == "peer"
        assert run.data.metrics.keys() == one.metrics.keys()
    assert 0 < q8.metrics["kl_mean"] < q4.metrics["kl_mean"]
    assert q8.metrics["perplexity_ratio"] == pytest.approx(1, abs=0.1)
    assert q4.metrics["size_mb"] < q8.metrics["size_mb"] < made.variants[0].metrics["size_mb"]
    assert not list(settings.home.rglob("*.gguf"))
