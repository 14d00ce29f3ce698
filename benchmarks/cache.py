"""Print what the runtime's settings for the key-value cache and the prompt save and cost.

    python benchmarks/cache.py FOLDER [CONTEXT ...] [--prompts 128 1024 4096] [--rounds 3]

FOLDER is a variant as Foundry Local has it. In each round, every setting gets one turn in a fresh process by
``direct.py``. Printed are the highest resident memory, CPU time to the first token and for each later one, and their
ratios to the first setting of the same round (medians). CPU time changes little when the machine does other work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from slmops.evaluation import prompts
from slmops.foundry.layout import CHUNK, GENAI_CONFIG

DIRECT = str(Path(__file__).with_name("direct.py"))
TOKENS = 33
WHOLE, GROWING = ({"past_present_share_buffer": share} for share in (True, False))
SETTINGS: dict[str, dict[str, Any]] = {
    "whole cache": WHOLE,
    "growing cache": GROWING,
    "whole, chunks": {**WHOLE, "chunk_size": CHUNK},
    "growing, chunks": {**GROWING, "chunk_size": CHUNK},
}
CPU = ("first_cpu_ms", "token_cpu_ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("contexts", type=int, nargs="*", default=[8192])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    print(
        f"{'context':>8}{'prompt':>8}  {'setting':17}{'peak MB':>8}{'first token ms':>18}{'later ones ms':>18}  answer"
    )
    for context in asked.contexts:
        for length, text in prompts.of_lengths(asked.prompts, context - TOKENS, asked.folder).items():
            measured = _measure(asked.folder, context, text, asked.rounds)
            for name, rounds in measured.items():
                print(f"{context:8}{length:8}  {name:17}{_row(rounds, measured['whole cache'])}", flush=True)


def _row(rounds: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    row = f"{median(one['peak_mb'] for one in rounds):8.0f}"
    for what in CPU:
        own, others = ([median(one[what]) for one in each] for each in (rounds, first))
        row += f"{median(own):11.1f} ({median(a / b for a, b in zip(own, others, strict=True)):.2f})"
    same = all(one["answer"] == first[0]["answer"] for one in rounds)
    return f"{row}  {'the same' if same else 'ANOTHER'}"


def _measure(folder: Path, context: int, text: str, rounds: int) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as home:
        for number in range(rounds):
            for place, name in list(enumerate(SETTINGS))[:: -1 if number % 2 else 1]:
                staged = Path(home, "models", f"setting-{place}-generic-cpu-1")
                _stage(folder.resolve(), staged, context, SETTINGS[name])
                arguments = [home, str(staged), f"setting-{place}-generic-cpu:1", text, str(TOKENS), "1"]
                env = {**os.environ, "MALLOC_ARENA_MAX": "1"}
                done = subprocess.run([sys.executable, DIRECT, *arguments], stdout=subprocess.PIPE, check=True, env=env)
                measured[name].append(json.loads(done.stdout.splitlines()[-1]))
    return measured


def _stage(folder: Path, staged: Path, context: int, setting: dict[str, Any]) -> None:
    """Links to the variant, and a config with the setting in which no answer ends early."""
    staged.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    config["model"].update(context_length=context, eos_token_id=[config["model"]["vocab_size"] - 1])
    config["search"].pop("chunk_size", None)
    config["search"].update(setting, max_length=context, temperature=0.0, do_sample=False)
    (staged / GENAI_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    for file in folder.iterdir():
        if file.name != GENAI_CONFIG and not (staged / file.name).exists():
            (staged / file.name).symlink_to(file)


if __name__ == "__main__":
    main()
