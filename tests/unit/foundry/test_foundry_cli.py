"""The ``foundry`` command, played by a script that keeps its state in files."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slmops.core.errors import RegistrationError
from slmops.foundry import cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script with #!")

CALLED = "bot-int4-generic-cpu"
# Behaves as documented: "cache location" names the folder, "cache cd" moves it, "cache ls" lists what lies there, and
# "model run" is a chat that first tells how far it is, and in some previews answers once with "--prompt".
SCRIPT = """\
#!{python} -S
import json, pathlib, subprocess, sys, time

here = pathlib.Path(__file__).parent
location = here / "location.txt"
plays = json.loads((here / "plays.json").read_text())
asked = sys.argv[1:]
with (here / "calls.txt").open("a") as calls:
    print(*asked, file=calls)
if plays["service"] and asked == ["cache", "ls"]:
    (here / "service.txt").write_text(str(subprocess.Popen(["/bin/sleep", "60"]).pid))
if asked[1:2] == [plays["fails"]] and "--help" not in asked:
    sys.exit("Exception: Request to local service failed.")


def say(text):
    sys.stdout.buffer.write((text + "\\n").encode(plays["encoding"], "replace"))


def answer(model, question):
    if not (pathlib.Path(location.read_text()) / "slmops" / (model + "-1")).is_dir():
        return say("Exception: Model " + model + " was not found in the catalog or local cache.")
    time.sleep(plays["delay"])
    say(plays["answer"].format(question=question))


match asked:
    case ["cache", "--help"] if plays["help"]:
        say("Usage: foundry cache [command]\\n  location\\n  cd <path>\\n  " + ", ".join(plays["cache"]))
    case ["cache", "location", "--help"] if plays["json"]:
        say("Usage: foundry cache location [options]\\n  -o, --output <text|json>")
    case ["cache", "location", "--output", "json"] if plays["json"]:
        say(plays["json"].replace("FOLDER", json.dumps(location.read_text())))
    case ["cache", "location"]:
        say(plays["said"] + location.read_text())
    case ["cache", "cd", folder]:
        location.write_text(folder)
    case ["cache", command] if command in plays["cache"]:
        say("Models cached on device:\\n   Alias            Model ID")
        for folder in sorted(pathlib.Path(location.read_text()).glob("*/*")):
            say("   " + ":".join(folder.name.rsplit("-", 1)))
    case ["model", "run", "--help"] if plays["help"]:
        say("Usage:\\n  foundry model " + ("run <model> [options]" if plays["run"] else "[command]"))
        say("Options:\\n  --retain" + "\\n  --prompt <prompt>" * (plays["run"] == "prompt"))
    case ["model", "run", model, "--prompt", question] if plays["run"] == "prompt":
        say(plays["progress"])
        answer(model, question)
    case ["model", "run", model] if plays["run"]:
        say(plays["progress"] + "\\nInteractive Chat. Enter /? or /help for help.\\n\\nPlease enter your prompt")
        for line in sys.stdin:
            if line == "/exit\\n":
                break
            say("> \U0001f9e0 Thinking...")
            answer(model, line.rstrip())
        say("\\n> ")
    case ["complete", "--help"] if plays["complete"]:
        say("Usage: foundry complete <model> <prompt>")
    case ["complete", model, question] if plays["complete"]:
        answer(model, question)
    case _:
        sys.exit("Unrecognized command or argument.")
"""
PLAYS = {
    "cache": ["ls", "list"],
    "help": True,
    "run": "chat",  # or "prompt", or "" for a preview that has no "model run"
    "complete": False,
    "json": "",  # what "cache location --output json" says, FOLDER being the folder
    "fails": "",
    "service": False,  # it starts one, which keeps the output open
    "said": "Cache directory path: ",
    "progress": "\U0001f554 Loading model...\n\x1b[32m\U0001f7e2 Model bot loaded successfully\x1b[0m\n",
    "answer": "\U0001f916 You ask: {question}",
    "delay": 0,
    "encoding": "utf-8",
}
BEFORE = "/home/jo/.foundry/cache/models"
QUESTION = "What is 1 > 0?"
FAILED = "Request to local service failed"
ASK = "import sys, pathlib; from slmops.foundry import cli; cli.ask(sys.argv[1], pathlib.Path(sys.argv[2]), 'Hello?')"
Action = Callable[[Path], object]


@pytest.fixture
def foundry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The command's folder; whatever happens in a test, the command works on the user's own cache afterwards."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "foundry"
    program.write_text(SCRIPT.replace("{python}", sys.executable), encoding="utf-8")
    program.chmod(0o755)
    (folder / "location.txt").write_text(BEFORE)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("HOME", str(tmp_path))  # where the user's own location is noted
    play(folder)
    yield folder
    assert (folder / "location.txt").read_text() == BEFORE


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A cache folder that holds the model."""
    return hold(tmp_path / "foundry home" / "models")


def play(foundry: Path, **changed: object) -> None:
    (foundry / "plays.json").write_text(json.dumps(PLAYS | changed), encoding="utf-8")


def hold(models: Path, name: str = CALLED) -> Path:
    (models / "slmops" / f"{name}-1").mkdir(parents=True)
    return models


def calls(foundry: Path) -> list[str]:
    return (foundry / "calls.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("has", "helps", "used"), [(["list"], True, "list"), (["ls", "list"], True, "ls"), (["ls"], False, "ls")]
)
def test_listed_by_either_command(foundry: Path, models: Path, has: list[str], helps: bool, used: str) -> None:
    play(foundry, cache=has, help=helps)
    hold(models, "other-generic-cpu")
    confirm(models)
    listed = ["cache --help", f"cache {used}"]
    assert calls(foundry)[1:] == ["cache location", f"cache cd {models}", *listed, f"cache cd {BEFORE}"]


def test_as_from_0_10_on(foundry: Path, models: Path) -> None:
    said = '{"path":FOLDER,"userSet":false}'
    play(foundry, cache=["list"], run="", complete=True, json=said, said="Cache (default): ", progress="")
    confirm(models)
    assert ask(models) == f"You ask: {QUESTION}"
    made = [call for call in calls(foundry) if not call.endswith("--help")]
    moves = "cache location --output json", f"cache cd {models}"
    back = f"cache cd {BEFORE}"
    assert made == [*moves, "cache list", back, *moves, f"complete {CALLED} {QUESTION}", back]
    for wrong in ("not JSON", "[]", "{}"):
        play(foundry, json=wrong)
        with pytest.raises(RegistrationError, match="names no folder"):
            confirm(models)


@pytest.mark.parametrize(
    "other",
    ["other-generic-cpu", f"support-{CALLED}", f"v2.{CALLED}", f"my_{CALLED}"],  # nor a longer name's end
)
@pytest.mark.usefixtures("foundry")
def test_not_listed(tmp_path: Path, other: str) -> None:
    with pytest.raises(RegistrationError, match=f"{other}:1"):
        cli.confirm(CALLED, hold(tmp_path, other))


@pytest.mark.parametrize(
    ("said", "before"),
    [
        ("", "/home/jo/.foundry"),
        ("\U0001f4be Cache directory path: ", "/Users/Jo Doe/Library/foundry cache"),
        ("Cache directory path: ", r"C:\Users\Jo Doe\.foundry\cache\models"),
        ("Service is started on http://127.0.0.1:5273/, PID 12!\nCache directory path: ", "D:/models"),
        ("Cache directory path:\n  ", r"\\server\share\models"),
    ],
)
def test_restored_whatever_the_folder_is_called(foundry: Path, models: Path, said: str, before: str) -> None:
    play(foundry, said=said)
    (foundry / "location.txt").write_text(before)
    confirm(models)
    assert (foundry / "location.txt").read_text() == before
    (foundry / "location.txt").write_text(BEFORE)


def asking(foundry: Path, models: Path, until: str) -> subprocess.Popen[bytes]:
    """A process that asks, and has come as far as the call ``until`` of the command."""
    process = subprocess.Popen([sys.executable, "-c", ASK, CALLED, str(models)])
    deadline = time.monotonic() + 20
    while not ((foundry / "calls.txt").exists() and until in calls(foundry)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_location_of_a_killed_process_is_restored_by_the_next(foundry: Path, models: Path) -> None:
    play(foundry, delay=60)
    with asking(foundry, models, until=f"model run {CALLED}") as killed:
        killed.kill()
    assert (foundry / "location.txt").read_text() == str(models)
    play(foundry)
    confirm(models)


@pytest.mark.usefixtures("foundry")
def test_a_location_that_the_user_chose_after_a_kill_stays(models: Path, tmp_path: Path) -> None:
    note = tmp_path / ".foundry" / "slmops-original-location.json"
    note.parent.mkdir()
    note.write_text(json.dumps({"own": "/long/ago", "ours": str(models)}), encoding="utf-8")
    confirm(models)
    assert not note.exists()


def test_two_processes_at_once_leave_the_location_as_it_was(foundry: Path, models: Path, tmp_path: Path) -> None:
    play(foundry, delay=0.5)
    with asking(foundry, models, until=f"cache cd {models}") as first:
        assert cli.ask(CALLED, hold(tmp_path / "other"), QUESTION)
    assert first.returncode == 0


def confirm(models: Path) -> None:
    cli.confirm(CALLED, models)


def ask(models: Path, question: str = QUESTION) -> str | None:
    return cli.ask(CALLED, models, question)


@pytest.mark.parametrize("action", [confirm, ask])
def test_nothing_is_changed_that_could_not_be_restored(foundry: Path, models: Path, action: Action) -> None:
    play(foundry, said="No cache in ")
    (foundry / "location.txt").write_text("memory")
    with pytest.raises(RegistrationError, match="No cache in memory"):
        action(models)
    assert calls(foundry) == ["cache location --help", "cache location"]
    (foundry / "location.txt").write_text(BEFORE)


@pytest.mark.parametrize(
    ("action", "plays", "said"),
    [
        *((confirm, {"fails": command}, f"{command}.*status 1: .*{FAILED}") for command in ("location", "cd", "ls")),
        *((ask, {"fails": command}, f"{command}.*status 1: .*{FAILED}") for command in ("location", "cd", "run")),
        (ask, {"run": ""}, "status 1: Unrecognized"),  # a preview that can do neither
    ],
)
def test_a_failing_command(foundry: Path, models: Path, action: Action, plays: dict[str, str], said: str) -> None:
    play(foundry, **plays)
    with pytest.raises(RegistrationError, match=said):
        action(models)


@pytest.mark.parametrize(
    ("script", "said"),
    [(f"#!{sys.executable} -S\nimport time\ntime.sleep(60)\n", r"0\.2 s"), ("#!/no/such/one\n", "does not run")],
)
def test_command_that_hangs_or_cannot_be_started(
    foundry: Path, models: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    (foundry / "foundry").write_text(script, encoding="utf-8")
    monkeypatch.setattr(cli, "COMMAND_TIMEOUT_S", 0.2)
    with pytest.raises(RegistrationError, match=said):
        confirm(models)


def test_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    confirm(tmp_path)
    assert ask(tmp_path) is None


WAYS: dict[str, tuple[dict[str, object], str]] = {
    "chat": ({"run": "chat"}, f"model run {CALLED}"),
    "prompt": ({"run": "prompt"}, f"model run {CALLED} --prompt {QUESTION}"),
    "complete": ({"run": "", "complete": True}, f"complete {CALLED} {QUESTION}"),
    "chat without help": ({"run": "chat", "help": False}, f"model run {CALLED}"),
    "chat and complete": ({"run": "chat", "complete": True}, f"model run {CALLED}"),
}


@pytest.mark.parametrize("way", WAYS)
def test_asked(foundry: Path, models: Path, way: str) -> None:
    play(foundry, **WAYS[way][0])
    assert ask(models) == f"You ask: {QUESTION}"
    made = [call for call in calls(foundry) if not call.endswith("--help")]
    assert made == ["cache location", f"cache cd {models}", WAYS[way][1], f"cache cd {BEFORE}"]


@pytest.mark.parametrize("way", ["chat", "prompt"])
@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"answer": "\U0001f916 one\n\n> two\n> three"}, "one\n\n> two\n> three"),
        ({"answer": "plain\nand more"}, "plain\nand more"),
        ({"answer": "plain", "progress": "Model bot was found in the local cache."}, "plain"),
        ({"encoding": "ascii"}, f"You ask: {QUESTION}"),
        ({"answer": "\U0001f916 caf\u00e9", "encoding": "cp1252"}, "caf\ufffd"),
    ],
)
def test_an_answer_is_found_in_what_surrounds_it(
    foundry: Path, models: Path, way: str, changed: dict[str, str], answer: str
) -> None:
    play(foundry, **WAYS[way][0], **changed)
    assert (ask(models) or "").removeprefix("?").strip() == answer


@pytest.mark.usefixtures("foundry")
def test_a_question_of_several_lines_is_one_question_in_a_chat(models: Path) -> None:
    assert ask(models, "What is\nthe capital\r\n of France?") == "You ask: What is the capital of France?"


@pytest.mark.parametrize("way", ["chat", "prompt", "complete"])
def test_no_answer_and_an_unknown_model(foundry: Path, models: Path, way: str) -> None:
    play(foundry, **WAYS[way][0])
    with pytest.raises(RegistrationError, match=f"Model {CALLED} was not found"):
        ask(models / "empty")
    for answer in ("  ", "\U0001f916 \n\n"):
        play(foundry, **WAYS[way][0], answer=answer)
        with pytest.raises(RegistrationError, match=f"{CALLED} answers nothing"):
            ask(models)


@pytest.mark.parametrize("way", ["chat", "prompt"])
def test_an_answer_that_takes_too_long(foundry: Path, models: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play(foundry, **WAYS[way][0], delay=60)
    monkeypatch.setattr(cli, "ANSWER_TIMEOUT_S", 0.5)
    with pytest.raises(RegistrationError, match=r"0\.5 s"):
        ask(models)


def test_a_service_that_keeps_the_output_open(foundry: Path, models: Path) -> None:
    play(foundry, service=True)
    started = time.monotonic()
    try:
        confirm(models)
        assert time.monotonic() - started < 30
    finally:
        os.kill(int((foundry / "service.txt").read_text()), signal.SIGKILL)
