"""Print the figures that the README quotes: the demo's comparison, and where the time went.

Runs the demo job from nothing in a home of its own, so that conversion is measured too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from slmops import machine, report
from slmops.models import Comparison

SLMOPS = str(Path(sys.executable).with_name("slmops"))


def main() -> None:
    """Run, print, clean up."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "SLMOPS_HOME": home}
        try:
            first = _timed(env)
            second = _timed(env)
        finally:
            subprocess.run([SLMOPS, "down"], env=env, check=False)
    here = machine.hardware()
    print(f"\n{here.processor}, {here.cores} cores, {here.memory_gb} GB, {here.system}\n")
    print(report.table(first[0], "github"))
    print(f"\n{first[0].choice.reason}\n")
    print(f"from nothing: {first[1]:.0f} s; again: {second[1]:.0f} s")


def _timed(env: dict[str, str]) -> tuple[Comparison, float]:
    started = time.monotonic()
    done = subprocess.run([SLMOPS, "demo", "--json"], env=env, stdout=subprocess.PIPE, check=True)
    return Comparison.model_validate(json.loads(done.stdout)), time.monotonic() - started


if __name__ == "__main__":
    main()
