"""The ``foundry`` command, where there is one: does it see our models, and do they answer?

Previews differ. Up to 0.9 a chat is ``foundry model run MODEL``, in some with ``--prompt TEXT`` to answer once. From
0.10 on there are ``foundry complete MODEL TEXT`` instead, ``foundry cache list`` for ``ls``, and ``--output json``.
(cli/RELEASE-NOTES-0.10.0.md in github.com/microsoft/Foundry-Local, and the reference at learn.microsoft.com.)
"""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slmops.core.errors import RegistrationError
from slmops.core.files import write_atomic
from slmops.core.locks import exclusive

COMMAND_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 600  # to load a model and answer
# An absolute folder after some words, such as "Cache directory path: C:\Users\Jo Doe\.foundry"; it may hold blanks.
_FOLDER = re.compile(r"(?:^|\s)((?:[A-Za-z]:[\\/]|[\\/~]).*\S)", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_PROMPT = re.compile(r"^>", re.MULTILINE)
_PROGRESS = re.compile(
    r"^.*(?:Thinking\.\.\.|Loading model|loaded successfully|found in the local cache).*$", re.MULTILINE
)
_ROBOT = "\N{ROBOT FACE}"  # stands before an answer in a chat


def confirm(called: str, models: Path) -> None:
    """Look for the model ``called`` with ``foundry cache ls``, pointed at the cache folder ``models`` meanwhile.

    It is a RegistrationError if it is not listed. Where there is no ``foundry`` command, nothing is looked for.
    """
    if shutil.which("foundry") is None:
        return
    with _cache_at(models):
        usage = _help("cache")
        command = "list" if re.search(r"\blist\b", usage) and not re.search(r"\bls\b", usage) else "ls"
        listed = _foundry("cache", command)
    # Not as the end of a longer name: support-bot-int4 is not bot-int4.
    if not re.search(rf"(?<![\w.-]){re.escape(called)}", listed):
        said = f"`foundry cache {command}` does not list {called} in {models}. It says: {listed.strip()}"
        raise RegistrationError(said)


def ask(called: str, models: Path, prompt: str) -> str | None:
    """Put one question to the model ``called``, with the command pointed at the cache folder ``models`` meanwhile.

    The answer, or a RegistrationError if there is none; None where there is no ``foundry`` command.
    """
    if shutil.which("foundry") is None:
        return None
    with _cache_at(models):
        usage = _help("model", "run")
        chat = False
        if "--prompt" in usage:
            said = _foundry("model", "run", called, "--prompt", prompt, timeout_s=ANSWER_TIMEOUT_S)
        elif "model run" not in usage and "complete" in _help("complete"):
            said = _foundry("complete", called, prompt, timeout_s=ANSWER_TIMEOUT_S)
        else:
            chat = True  # a line is a question, and /exit leaves
            typed = f"{' '.join(prompt.split())}\n/exit\n"
            said = _foundry("model", "run", called, typed=typed, timeout_s=ANSWER_TIMEOUT_S)
    answer = _answer(said, chat=chat)
    if not answer:
        raise RegistrationError(f"{called} answers nothing to {prompt!r} in `foundry`. It says: {said.strip()}")
    return answer


def _answer(said: str, *, chat: bool) -> str:
    """The answer in the command's output, which may begin with progress and, in a chat, end with a prompt."""
    said = _ESCAPES.sub("", said)
    if _ROBOT in said:
        said = said.partition(_ROBOT)[2]
    else:  # a console without such characters, or an answer alone
        if chat:
            said = _PROMPT.split(said, maxsplit=1)[-1]
        said = _PROGRESS.sub("", said)
        if said.lstrip().startswith("Exception:"):
            raise RegistrationError(f"`foundry` does not run the model: {said.strip()}")
    return said.rstrip("> \r\n").strip() if chat else said.strip()


@contextmanager
def _cache_at(models: Path) -> Iterator[None]:
    """Point the command at the cache folder ``models``, and afterwards at the user's own again.

    The command has one cache location for all programs of a user. So one process of ours at a time changes it, and
    notes the user's own: if that process is killed, the next one goes back to it.
    """
    folder = Path.home() / ".foundry"
    note = folder / "slmops-original-location.json"
    with exclusive(folder / "slmops.lock", "Foundry's cache location", wait=True):
        own = _location()
        with suppress(OSError, ValueError, KeyError, TypeError):  # a process of ours was killed at this point
            noted = json.loads(note.read_text(encoding="utf-8"))
            own = str(noted["own"]) if Path(noted["ours"]) == Path(own) else own
        write_atomic(note, json.dumps({"own": own, "ours": str(models)}))
        _foundry("cache", "cd", str(models))
        try:
            yield
        finally:
            _foundry("cache", "cd", own)
            note.unlink()


def _location() -> str:
    if "--output" in _help("cache", "location"):
        said = _foundry("cache", "location", "--output", "json")
        with suppress(ValueError, KeyError, TypeError):
            return str(json.loads(said)["path"])
    else:
        said = _foundry("cache", "location")
        if found := _FOLDER.findall(said):
            return str(found[-1])
    raise RegistrationError(f"`foundry cache location` names no folder to go back to. It says: {said.strip()}")


def _help(*command: str) -> str:
    """The help of a subcommand, or nothing if there is none."""
    try:
        return _foundry(*command, "--help")
    except RegistrationError:
        return ""


def _foundry(*arguments: str, typed: str = "", timeout_s: float | None = None) -> str:
    shown = f"`foundry {' '.join(arguments)}`"
    limit = COMMAND_TIMEOUT_S if timeout_s is None else timeout_s
    # Files, not pipes: a service that the command starts inherits them and would keep a pipe open.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                [shutil.which("foundry") or "foundry", *arguments],
                input=typed.encode(),
                stdout=output,
                stderr=errors,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RegistrationError(f"{shown} took longer than {limit:g} s and was stopped.") from error
        except OSError as error:
            raise RegistrationError(f"{shown} does not run: {error}") from error
        output.seek(0)
        errors.seek(0)
        said, complaint = (file.read().decode("utf-8", errors="replace") for file in (output, errors))
    if done.returncode != 0:
        raise RegistrationError(f"{shown} ended with status {done.returncode}: {(complaint or said).strip()}")
    return said
