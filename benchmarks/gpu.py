"""Print the speed of variants for GPUs, and how far their logits are from the checkpoint's, on a machine with one.

    python benchmarks/gpu.py reference CHECKPOINT FILE.npz
    python benchmarks/gpu.py measure FILE.npz FOLDER...

The first writes what transformers computes, wherever the checkpoint is. The second asks onnxruntime-genai, in this
process, for the variants' folders: on Linux, Foundry Local has to download its libraries for GPUs, and machines with a
GPU that have no network cannot run ``slmops measure``. It needs numpy and onnxruntime-genai-cuda, and for WebGPU
onnxruntime-ep-webgpu and a Vulkan loader, but nothing of slmops.
"""

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = (128, 512, 1024)
OUTPUT = 128
ROUNDS = 5
POSITIONS = range(32, 512, 15)
HEADING = (
    "variant",
    "provider",
    "MB",
    "KL mean",
    "top-1",
    *(f"first token {n}, ms" for n in LENGTHS),
    "tokens/s",
    "GPU MB",
)


def main() -> None:
    """Run what the first argument says."""
    what, *files = sys.argv[1:]
    if what == "reference":
        reference(Path(files[0]), Path(files[1]))
    else:
        known = np.load(files[0])
        print("|", " | ".join(HEADING), "|\n|", " | ".join("---" for _ in HEADING), "|")
        for folder in files[1:]:
            print("|", " | ".join(measure(Path(folder), known["ids"], known["log_probabilities"])), "|", flush=True)


def reference(checkpoint: Path, file: Path) -> None:
    """Write token ids of a text, and the log-probabilities after some of its beginnings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slmops.evaluation import dataset

    text = dataset.perplexity_text(None)[0]
    ids = AutoTokenizer.from_pretrained(checkpoint)(text[:20_000])["input_ids"][: max(LENGTHS)]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids[: POSITIONS.stop]])).logits[0]
    np.savez(file, ids=ids, log_probabilities=logits[list(POSITIONS)].log_softmax(-1).numpy())


def measure(folder: Path, ids: NDArray[Any], exact: NDArray[Any]) -> list[str]:
    """A row of the table."""
    import onnxruntime_genai as og

    listed = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    provider = next((name for one in listed.get("provider_options", []) for name in one), "cpu")
    before = gpu_mb()
    if provider == "webgpu":
        _register(og)
    model = og.Model(str(folder))
    own = np.stack([_log_probabilities(og, model, ids[: position + 1]) for position in POSITIONS])
    distance = ["-", "-"]
    if exact.shape == own.shape:  # else it is another model, of which only the speed counts
        kl, same = (np.exp(exact) * (exact - own)).sum(-1).mean(), (exact.argmax(-1) == own.argmax(-1)).mean()
        distance = [f"{kl:.4f}", f"{same:.2f}"]
    firsts, rates = {}, []
    for length in LENGTHS:
        prompt = np.resize(ids, length).astype(np.int32)
        timed = [_time(og, model, prompt) for _ in range(ROUNDS + 1)][1:]  # the first is a warm-up
        firsts[length] = median(first for first, _ in timed) * 1e3
        rates += [rate for _, rate in timed] if length == LENGTHS[0] else []
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    times = [f"{first:.1f}" for first in firsts.values()]
    taken = gpu_mb() - before
    return [folder.name, provider, f"{size:.0f}", *distance, *times, f"{median(rates):.0f}", f"{taken:.0f}"]


@cache
def _register(og: Any) -> None:
    import onnxruntime_ep_webgpu

    og.register_execution_provider_library("WebGpuExecutionProvider", onnxruntime_ep_webgpu.get_library_path())


def _generator(og: Any, model: Any, length: int) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    return og.Generator(model, params)


def _log_probabilities(og: Any, model: Any, ids: NDArray[Any]) -> NDArray[Any]:
    generator = _generator(og, model, len(ids) + 1)
    generator.append_tokens(ids.astype(np.int32))
    logits = np.asarray(generator.get_output("logits"), np.float64)[0, -1]
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def _time(og: Any, model: Any, prompt: NDArray[Any]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second after it."""
    generator = _generator(og, model, len(prompt) + OUTPUT)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(OUTPUT - 1):
        generator.generate_next_token()
    return first - started, (OUTPUT - 1) / (time.perf_counter() - first)


def gpu_mb() -> float:
    """What all processes take on the first GPU; 0 without nvidia-smi."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, stdout=subprocess.PIPE, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    return float(said.split()[0]) * 2**20 / 1e6


if __name__ == "__main__":
    main()
