"""The command line as a table of arguments, exit code and what the user is told. No server is started."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.cli import command as cli
from slmops.core import errors
from slmops.core.job import Job

Commands = Callable[..., int]


class Flow:
    """Stands in for the flow: notes what it was asked, and fails as it is told to."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.json: bool | None = None
        self.error: BaseException | None = None

    def __call__(self, job: Job, *, json: bool) -> int:
        self.job, self.json = job, json
        if self.error is not None:
            raise self.error
        return 0

    @property
    def asked(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        assert self.job is not None
        return self.job.model_dump(mode="json", exclude_defaults=True)


@pytest.fixture(autouse=True)
def flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flow]:
    """The flow; and what the command keeps in this process is put back."""
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no .env of a developer's
    stand_in = Flow()
    monkeypatch.setattr(cli, "_run", stand_in)
    monkeypatch.setattr(cli.app, "config", ())
    logger = logging.getLogger("slmops")
    before = logger.handlers[:], logger.level
    yield stand_in
    logger.handlers[:], level = before
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ("--model demo", {}),
        ("--model=org/m@main --name bot", {"model": "org/m@main", "name": "bot"}),
        ("--model demo --precision int4", {"precision": ["int4"]}),
        ("--model demo --precision int4 --precision int8", {"precision": ["int4", "int8"]}),
        ("--model demo --int4-block-size 64 --int4-symmetric", {"int4_block_size": 64, "int4_symmetric": True}),
        ("--model demo --olive-config mine.json --quick", {"olive_config": "mine.json", "quick": True}),
        ("--model demo --temperature 0.7 --top-p 0.9", {"temperature": 0.7, "top_p": 0.9}),
        ("--model demo --max-length 512 --repetition-penalty 1.1", {"max_length": 512, "repetition_penalty": 1.1}),
    ],
)
def test_flags_are_the_job(flow: Flow, arguments: str, asked: dict[str, Any]) -> None:
    assert cli._main(["run", *arguments.split()]) == 0
    assert flow.asked == {"model": "demo", **asked}
    assert flow.json is False


def test_json_is_no_part_of_the_job(flow: Flow) -> None:
    assert cli._main(["run", "--model", "demo", "--json"]) == 0
    assert (flow.asked, flow.json) == ({"model": "demo"}, True)


WRONG = [
    ("run --model m --precision int3", r"--precision must be 'fp32', 'fp16', 'int8', 'int4' or 'bf16' \(got 'int3'\)"),
    ("run --model m --precision", "--precision requires an argument"),
    ("run --model m --frobnicate 1", r"Unknown option: --frobnicate"),
    ("run --model m --precisoin int4", "Did you mean --precision"),
    ("run", "--model requires an argument"),
    ("run --quick", "error: --model is missing\n"),
    ("run --model", "--model requires an argument"),
    ("run --model m --name ../x", r"--name may only have .* \(got '\.\./x'\)"),
    ("run --model m --name a/b", r"--name .*\(got 'a/b'\)"),
    (f"run --model m --name {'a' * 64}", "--name may only have"),
    ("run --model m --int4-block-size many", r"--int4-block-size must be a whole number \(got 'many'\)"),
    ("run --model m --int4-block-size 8", r"--int4-block-size must be at least 16 \(got '8'\)"),
    ("run --model m --device npu", "--device must be 'cpu' or 'gpu'"),
    ("run --model m --max-length 1", "--max-length must be at least 16"),
    ("run --model m --max-length 10 --top-p 3", r"--max-length .*\n--top-p "),
    ("run --model m --job nothing.yaml", r"The job file nothing\.yaml cannot be read: .*No such file"),
    ("run --model m --job", "--job requires an argument"),
    ("frobnicate", 'Unknown command "frobnicate". Available commands: run, demo, retrain, compare,'),
    ("compare a b", r"Unused Tokens: \['b'\]"),
    ("--frobnicate", "--frobnicate"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_wrong_usage(flow: Flow, capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert cli._main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert re.search(said, err)
    assert "Traceback" not in err
    assert flow.job is None


JOB_YAML = """\
model: demo
name: bot
precision: [int8, int4]
int4_block_size: 64
quick: true
perplexity-text: text.txt
top_p: null
"""
JOB_TOML = """\
model = "demo"
name = "bot"
precision = ["int8", "int4"]
int4-block-size = 64
quick = true
perplexity_text = "text.txt"
"""
IN_FILE = {
    "model": "demo",
    "name": "bot",
    "precision": ["int8", "int4"],
    "int4_block_size": 64,
    "quick": True,
    "perplexity_text": "text.txt",
}
FILES = [("job.yaml", JOB_YAML), ("job.yml", JOB_YAML), ("job.toml", JOB_TOML), ("job.json", json.dumps(IN_FILE))]


@pytest.mark.parametrize("option", ["--job {}", "--job={}"])
@pytest.mark.parametrize(("name", "text"), FILES)
def test_job_file(flow: Flow, tmp_path: Path, option: str, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert cli._main(["run", *option.format(name).split()]) == 0
    assert flow.asked == IN_FILE


@pytest.mark.parametrize(("name", "text"), [FILES[0], FILES[2]])
@pytest.mark.parametrize("file_first", [True, False])
def test_flags_win_over_the_job_file(flow: Flow, tmp_path: Path, name: str, text: str, file_first: bool) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    file = ["--job", name]
    flags = ["--precision", "fp16", "--int4-block-size", "16", "--top-p", "0.5", "--quick=false", "--model", "other"]
    assert cli._main(["run", *(file + flags if file_first else flags + file)]) == 0
    assert flow.asked == {
        "model": "other",
        "name": "bot",
        "precision": ["fp16"],
        "int4_block_size": 16,
        "top_p": 0.5,
        "perplexity_text": "text.txt",
    }


def test_job_file_may_ask_for_json(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("model: demo\njson: true\n", encoding="utf-8")
    assert cli._main(["run", "--job", "job.yaml"]) == 0
    assert flow.json is True


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("job.yaml", "model: demo\nprecisoin: [int4]\n", r"precisoin.* from .*job\.yaml\. Did you mean --precision"),
        ("job.toml", "model = 'demo'\nfrobnicate = 1\n", r"frobnicate.* from .*job\.toml"),
        ("job.yaml", "1: demo\n", r"Unknown option: .*1.* from .*job\.yaml"),
        ("job.yaml", "model: demo\nprecision: [int3]\n", "--precision must be 'fp32'"),
        ("job.yaml", "model: demo\nname: a/b\n", "--name may only have"),
        ("job.toml", "model = 'demo'\nint4_block_size = 'many'\n", "--int4-block-size must be a whole number"),
        ("job.yaml", "quick: true\n", "error: --model is missing\n"),
        ("job.yaml", "a: [\n", r"The job file job\.yaml cannot be read: while parsing"),
        ("job.toml", "model =\n", r"The job file job\.toml cannot be read: Invalid value \(at line 1"),
        ("job.toml", JOB_YAML, r"The job file job\.toml cannot be read"),
        ("job.yaml", "- model\n", r"The job file job\.yaml holds no options"),
        ("job.yaml", "", r"The job file job\.yaml holds no options"),
        ("job.yaml", b"model: \xff\xfe\n", r"The job file job\.yaml cannot be read: .*utf-8"),
        ("job.yaml", None, r"The job file job\.yaml cannot be read: .*Is a directory"),
    ],
)
def test_bad_job_file(
    flow: Flow,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | bytes | None,
    said: str,
) -> None:
    path = tmp_path / name
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli._main(["run", "--job", name]) == 2
    out, err = capsys.readouterr()
    assert (out, flow.job) == ("", None)
    assert err.startswith("error: ")
    assert re.search(said, err)
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli._main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: slmops COMMAND")
    for command in ("run", "demo", "compare", "doctor", "up", "down", "status"):
        assert re.search(rf"^\W*{command}\s+\w", out, re.MULTILINE), command
    assert err == ""


def test_help_of_run_names_each_option_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    for field in Job.model_fields:
        assert f"--{field.replace('_', '-')} " in out


def test_demo(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["demo", "--quick", "--json"]) == 0
    assert (flow.asked, flow.json) == ({"model": "demo", "quick": True}, True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.SlmopsError, 1),
        (errors.UsageError, 2),
        (errors.CheckpointError, 2),
        (errors.RecipeError, 2),
        (errors.PrerequisiteError, 2),
        (errors.BusyError, 2),
        (errors.WorkError, 1),
        (errors.ConversionError, 1),
        (errors.RegistrationError, 1),
        (errors.EvaluationError, 1),
        (errors.TrackingError, 1),
    ],
)
def test_exit_codes(flow: Flow, capsys: pytest.CaptureFixture[str], kind: type[errors.SlmopsError], code: int) -> None:
    flow.error = kind("It went wrong there.", "Do this.")
    assert cli._main(["run", "--model", "demo"]) == code
    assert capsys.readouterr() == ("", "error: It went wrong there.\n  Do this.\n")


def test_error_without_a_fix_is_one_line(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    flow.error = errors.WorkError("It went wrong.")
    assert cli._main(["demo"]) == 1
    assert capsys.readouterr() == ("", "error: It went wrong.\n")


def test_interrupted(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    flow.error = KeyboardInterrupt()
    assert cli._main(["run", "--model", "demo"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


CRASH = r"error: RuntimeError: boom\n  The whole story is in (\S+)\. If a server stopped: `slmops status`\.\n"


def test_what_no_check_foresaw(flow: Flow, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow.error = RuntimeError("boom\nwith details")
    assert cli._main(["run", "--model", "demo"]) == 1
    out, err = capsys.readouterr()
    told = re.fullmatch(CRASH, err)
    assert out == ""
    assert told, err
    log = Path(told[1])
    assert log.parent == tmp_path / "home" / "logs"
    story = log.read_text(encoding="utf-8")
    assert story.startswith("Traceback (most recent call last):")
    assert "RuntimeError: boom\nwith details" in story


def test_crash_without_a_home_to_write_to(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flow.error = RuntimeError("boom")
    assert cli._main(["run", "--model", "demo"]) == 1
    told = re.fullmatch(CRASH, capsys.readouterr().err)
    assert told
    assert Path(told[1]).parent == tmp_path
    assert "RuntimeError: boom" in Path(told[1]).read_text(encoding="utf-8")


def test_bad_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLMOPS_MLFLOW_PORT", "many")
    assert cli._main(["status"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: SLMOPS_MLFLOW_PORT must be a whole number (got 'many')\n")


def test_status_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["home"] == str(tmp_path / "home")
    assert (found["prefect"]["ok"], found["mlflow"]["ok"], found["serving"]) == (False, False, None)
    assert cli._main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["prefect  -  not running", "mlflow   -  not running"]


HEAVY = ["prefect", "mlflow", "torch", "olive", "onnxruntime", "onnxruntime_genai", "transformers", "onnx", "numpy"]


def test_importing_the_command_imports_nothing_heavy() -> None:
    program = "import slmops.cli.command, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "cyclopts" in loaded
    assert not loaded & {*HEAVY, "foundry_local_sdk", "matplotlib", "datasets", "fastapi"}
