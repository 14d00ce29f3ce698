"""The README's lines of Python, run as they stand on a tiny model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.local import stack
from tests import making

pytestmark = pytest.mark.integration

CLOSED = "http://127.0.0.1:9"
README = Path(__file__).parents[2] / "README.md"
AS_IN_A_NOTEBOOK = """
import asyncio
async def cell():
    exec(compile(program, "cell", "exec"), globals())
asyncio.run(cell())
print(len(comparison._repr_html_()))
"""


def test_the_lines_of_the_readme_run(
    talkative: Path, job: Job, stock: Settings, databases: Path, tmp_path: Path
) -> None:
    section = README.read_text(encoding="utf-8").partition("### From Python")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    program = found[1].replace("./my-checkpoint", str(talkative)).replace('"int8", "int4"', '"int8"')
    assert str(talkative) in program
    making.place(("fp32", "int8"), job, stock, tmp_path / "home")
    making.put_databases(tmp_path / "home", databases)
    home = {"SLMOPS_HOME": str(tmp_path / "home"), "SLMOPS_PREFECT_PORT": "6200", "SLMOPS_MLFLOW_PORT": "6300"}
    # Nothing that it asks on this machine may go there.
    closed = {"HTTP_PROXY": CLOSED, "HTTPS_PROXY": CLOSED, "ALL_PROXY": "socks://127.0.0.1:9", "NO_PROXY": "a.example"}
    closed |= {name.lower(): url for name, url in closed.items()}
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLMOPS_", "PREFECT_", "MLFLOW_"))}
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"program = {program!r}{AS_IN_A_NOTEBOOK}"],
            cwd=tmp_path,
            env={**env, **home, **closed, "PYTHONPATH": str(README.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        stack.down(Settings(home=tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["size_mb", "decode_tok_s", "perplexity_ratio"]
    assert [line.split()[0] for line in lines[1:3]] == ["fp32", "int8"]
    assert int(lines[-1]) > 500
