"""The pinned set on other systems: each package has a wheel there, of a version that is pinned."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
UV = shutil.which("uv", path=Path(sys.executable).parent)
ONLY_SOURCE = "rouge-score"  # of Python alone
BUILDS = {"setuptools", "pip"}  # come with the interpreter


def pinned(text: str) -> set[tuple[str, str]]:
    """Name and version of each package in lines such as ``numpy==2.1; sys_platform == "win32"``."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    asked = (Requirement(line) for line in lines if line)
    return {(canonicalize_name(one.name), str(one.specifier)) for one in asked}


@pytest.mark.skipif(UV is None, reason="uv is not installed")
@pytest.mark.parametrize("platform", ["x86_64-pc-windows-msvc", "aarch64-apple-darwin"])
def test_the_pinned_set_has_a_wheel_of_everything_on(platform: str) -> None:
    command = [UV or "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-platform", platform]
    command += ["--python-version", "3.11.9", "--only-binary", ":all:", "--no-binary", ONLY_SOURCE]
    command += ["--constraint", "constraints.txt", "--extra", "dev", "pyproject.toml"]
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
    env = {"UV_DEFAULT_INDEX": index, "UV_HTTP_RETRIES": "1", **os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}
    resolved = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8", check=False)
    if "Failed to fetch" in resolved.stderr:
        pytest.skip("the package index cannot be reached")  # its address may have a password
    assert resolved.returncode == 0, resolved.stderr
    free = pinned(resolved.stdout) - pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {name for name, _ in free} <= BUILDS
