"""Make a checkpoint off its grid: a short full fine-tuning on the sources of Python's library.

    python benchmarks/off_grid.py CHECKPOINT FOLDER

The demo's weights were unpacked from a Q4_1 file, so that some 4-bit grids fit them better than they fit any other
checkpoint. Forty steps move all of them. It is seeded, and takes some minutes.
"""

import random
import sys
from pathlib import Path

import torch
from conversion import not_at_all
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmops.checkpoints import source
from slmops.core.job import Job
from slmops.core.settings import Settings

STEPS, BATCH, LENGTH, RATE = 40, 4, 128, 2.5e-4


def find(model: str) -> Path:
    """The folder of a checkpoint."""
    return source.resolve(Job(model=model), Settings(), download=not_at_all).path


def make(model: str, folder: Path) -> None:
    """Write the fine-tuned checkpoint into a folder, in fp32."""
    checkpoint = find(model)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    net = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    files = sorted(Path(random.__file__).parent.glob("[a-z]*.py"))
    ids = torch.tensor(tokenizer("\n".join(file.read_text(encoding="utf-8") for file in files))["input_ids"])
    texts = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = random.Random(0).sample(range(len(texts)), STEPS * BATCH)  # noqa: S311 - it only shuffles
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        batch = texts[order[step * BATCH : (step + 1) * BATCH]]
        net(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
