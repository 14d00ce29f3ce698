"""How a command line is read, and how a command ends."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from slmops.cli import terminal
from slmops.cli.command import COMMANDS
from slmops.core import errors
from slmops.core.job import Job

if TYPE_CHECKING:
    from tests.unit.cli.conftest import Flows, Slmops


WRONG = [
    ("run --model m --precision ../int4", r"--precision may only have letters, .* \(got '../int4'\)"),
    ("run --model m --frobnicate 1", "--frobnicate"),
    ("run --model m --precisoin int4", "Did you mean --precision"),
    ("run --model m --model n", "--model is given more than once"),
    ("run --model m --quick=perhaps", r"--quick must be true or false \(got 'perhaps'\)"),
    ("run --model m --name ../x", r"--name may only have .* \(got '\.\./x'\)"),
    ("run --model m --int4-block-size many", r"--int4-block-size must be a whole number \(got 'many'\)"),
    ("run --model m --max-length 10 --top-p 3", r"--max-length .*\n--top-p "),
    ("run --model m --job nothing.yaml", r"nothing\.yaml cannot be read: .*No such file"),
    ("run --model m --job", "--job needs a value"),
    ("deploy", "`slmops deploy` needs JOB_FILE"),
    ("deploy nothing.yaml", r"nothing\.yaml cannot be read: .*No such file"),
    ("retrain --model m --data d --training.rank x", "--training.rank must be a whole number"),
    ("soak --requests 29", r"--requests must be at least 30 \(got '29'\)"),
    ("soak --max-kb-per-request inf", "--max-kb-per-request must be a finite number"),
    ("soak a b", "too many arguments: b"),
    ("promote", "`slmops promote` needs"),
    ("promote bot --force", "--force needs a value"),
    ("rollback", "`slmops rollback` needs NAME"),
    ("rollback a/b", "'a/b'"),
    ("serve ../../etc", "'../../etc'"),
    ("serve bot --port 70000", "--port must be at most 65535"),
    ("serve bot --host 0.0.0.0", "SLMOPS_SERVE_TOKEN"),
    ("catalog --port x", r"--port must be a whole number \(got 'x'\)"),
    ("pull bot@", "'bot@'"),
    ("status a/b", "'a/b'"),
    ("frobnicate", 'Unknown command "frobnicate". Available commands: run, demo, retrain, recipes,'),
    ("--frobnicate", "--frobnicate"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_wrong_usage(flows: Flows, slmops: Slmops, arguments: str, said: str) -> None:
    code, out, err = slmops(arguments)
    assert (code, out, flows.asked) == (2, "", [])
    assert err.startswith("error: ")
    assert re.search(said, err)
    assert "Traceback" not in err


IN_FILE = {"model": "demo", "name": "bot", "precision": ["int8", "int4"], "int4_block_size": 64, "quick": True}
JOB_YAML = yaml.safe_dump({**IN_FILE, "top_p": None})
JOB_TOML = "\n".join(f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in IN_FILE.items())
FILES = [("job.yaml", JOB_YAML), ("job.yml", JOB_YAML), ("job.toml", JOB_TOML), ("job.json", json.dumps(IN_FILE))]


@pytest.mark.parametrize("option", ["--job {}", "--job={}"])
@pytest.mark.parametrize(("name", "text"), FILES)
def test_job_file(flows: Flows, slmops: Slmops, tmp_path: Path, option: str, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert slmops(f"run {option.format(name)}")[0] == 0
    assert flows.options == IN_FILE


@pytest.mark.parametrize(("name", "text"), [FILES[0], FILES[2]])
@pytest.mark.parametrize("order", ["{file} {flags}", "{flags} {file}"])
def test_flags_win_over_the_job_file(
    flows: Flows, slmops: Slmops, tmp_path: Path, name: str, text: str, order: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    flags = "--precision fp16 --int4-block-size 16 --top-p 0.5 --quick=false --model other"
    assert slmops(f"run {order.format(file=f'--job {name}', flags=flags)}")[0] == 0
    changed = {"model": "other", "precision": ["fp16"], "int4_block_size": 16, "top_p": 0.5}
    assert {"quick": True, **flows.options} == {**IN_FILE, **changed}
    assert "quick" not in flows.options


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("job.yaml", "model: demo\nprecisoin: [int4]\n", r"precisoin.* from .*job\.yaml\. Did you mean --precision"),
        ("job.toml", "model = 'demo'\nfrobnicate = 1\n", r"frobnicate.* from .*job\.toml"),
        ("job.yaml", "1: demo\n", r"Unknown option: .*1.* from .*job\.yaml"),
        ("job.toml", "model = 'demo'\nint4_block_size = 'many'\n", "--int4-block-size must be a whole number"),
        ("job.toml", JOB_YAML, r"job\.toml cannot be read"),
        ("job.yaml", "", r"job\.yaml has no keys and values"),
        ("job.yaml", "model: \xff\xfe\n", r"job\.yaml cannot be read: .*utf-8"),
        ("job.yaml", None, r"job\.yaml cannot be read: .*Is a directory"),
    ],
)
def test_bad_job_file(flows: Flows, slmops: Slmops, tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(text, encoding="latin-1")
    test_wrong_usage(flows, slmops, f"run --job {name}", said)


@pytest.mark.parametrize("arguments", ["", "--help"])
def test_help(slmops: Slmops, arguments: str) -> None:
    code, out, err = slmops(arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: slmops COMMAND")
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s+\w", out, re.MULTILINE), command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(slmops: Slmops, name: str) -> None:
    out = slmops(f"{name} --help")[1]
    assert " ".join(COMMANDS[name][1].split()) in " ".join(out.split())
    for field in Job.model_fields if name == "run" else ():
        assert f"--{field.replace('_', '-')} " in out


ENDS = [(kind("It went wrong.", "Do this."), kind.exit_code, "  Do this.\n") for kind in errors.BY_NAME.values()]


@pytest.mark.parametrize(("answer", "code", "fix"), [*ENDS, (errors.WorkError("It went wrong."), 1, "")], ids=repr)
def test_an_error_is_told_with_its_fix(
    flows: Flows, slmops: Slmops, answer: errors.SlmopsError, code: int, fix: str
) -> None:
    flows.answer = answer
    assert slmops("run --model demo") == (code, "", f"error: It went wrong.\n{fix}")


def test_an_interruption_is_told(flows: Flows, slmops: Slmops) -> None:
    flows.answer = KeyboardInterrupt()
    assert slmops("demo") == (130, "", "interrupted\n")


@pytest.mark.parametrize("home_is_usable", [True, False])
def test_what_no_check_foresaw(
    flows: Flows, slmops: Slmops, home: Path, home_is_usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not home_is_usable:
        home.write_text("not a folder", encoding="utf-8")
        monkeypatch.setattr("tempfile.tempdir", str(home.parent))
    flows.answer = RuntimeError("boom\nwith details")
    code, out, err = slmops("run --model demo")
    told = re.match(r"error: RuntimeError: boom\n  The traceback is in (\S+)\. ", err)
    assert (code, out) == (1, "")
    assert told, err
    log = Path(told[1])
    assert log.parent == (home / "logs" if home_is_usable else home.parent)
    story = log.read_text(encoding="utf-8")
    assert story.startswith("Traceback (most recent call last):")
    assert "RuntimeError: boom\nwith details" in story


UNUSABLE = "error: {0} cannot be used: Permission denied.\n  Set SLMOPS_H"


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [("{}", 2, UNUSABLE), ("{}/locks", 2, UNUSABLE), ("/elsewhere", 1, "error: PermissionError: ")],
)
def test_a_home_that_cannot_be_used_is_named(
    flows: Flows, slmops: Slmops, home: Path, path: str, code: int, said: str
) -> None:
    path = path.format(home)
    flows.answer = PermissionError(errno.EACCES, "Permission denied", path)
    ended, _, err = slmops("run --model demo")
    assert ended == code
    assert err.startswith(said.format(path))


@pytest.mark.parametrize(("console", "written"), [(False, "→ Größe 🤖"), (True, r"\u2192 Größe \U0001f916")])
def test_no_character_ends_a_command_on_windows(console: bool, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding="cp1252")
    monkeypatch.setattr(stream, "isatty", lambda: console)
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.speak_utf8()
    terminal.output("→ Größe 🤖")
    assert file.getvalue().decode("cp1252" if console else "utf-8").rstrip() == written


def test_a_reader_that_leaves_is_not_a_crash() -> None:
    """As in ``slmops status | head -1``, whose reader may be gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        command = [sys.executable, "-m", "slmops.cli", "status"]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_environment(slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_MLFLOW_PORT", "many")
    monkeypatch.setenv("SLMOPS_POOLS", '[{"name": "a"}]')
    code, out, err = slmops("status")
    assert (code, out) == (2, "")
    said = ["error: SLMOPS_MLFLOW_PORT must be a whole number (got 'many')", "SLMOPS_POOLS.0.memory_gb is missing"]
    assert err.splitlines()[:2] == said
