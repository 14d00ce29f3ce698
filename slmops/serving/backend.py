"""One version in a runtime process of its own, behind Foundry Local's web service on loopback.

Each version has its own because memory is not freed inside a process, and a crash takes down all that is loaded there.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil
from pydantic import ValidationError

from slmops.core import errors, web
from slmops.core.errors import PrerequisiteError, ServingError
from slmops.core.files import keep_log, remove_scratch
from slmops.core.settings import Settings
from slmops.foundry.register_worker import MAX_TOKENS, PROMPTS
from slmops.foundry.service_worker import ServiceRequest, ServiceStart
from slmops.foundry.versions import Installed
from slmops.processes import children, tree

if TYPE_CHECKING:
    import httpx

LISTEN_S = 120.0  # for a process until its service listens, beside the time for reading its files
SLOWEST_MB_S = 20.0  # what the slowest disk reads in a second
SMOKE_S = 120.0  # for all requests of a smoke test together; the version before still answers meanwhile
SERVICE_WORKER = "slmops.foundry.service_worker"
CHAT = "/v1/chat/completions"


@dataclass(eq=False)
class Backend:
    installed: Installed
    url: str  # root of its web service, such as http://127.0.0.1:41205
    _child: asyncio.subprocess.Process
    _scratch: Path
    _log: Path
    started: float = field(default_factory=time.time)  # seconds since 1970
    in_flight: int = 0  # requests that it is answering; the fleet counts them
    used: float = field(default_factory=time.monotonic)  # when its last request ended

    @classmethod
    async def start(cls, installed: Installed, settings: Settings) -> Self:
        """Start the process and wait until its service listens; if anything goes wrong, no process is left behind.

        A ServingError says that it ended, took too long or refuses the version; a PrerequisiteError is not its fault.
        """
        log = settings.logs / installed.name / f"serve-{installed.version}.log"
        scratches = settings.deployed / "serving" / installed.name
        remove_scratch(scratches)
        scratch = scratches / f".{installed.version}-{uuid.uuid4().hex[:8]}.{os.getpid()}.part"
        logs = log.with_name(f"{log.stem}-foundry")
        request = ServiceRequest(foundry_id=installed.foundry_id, folder=installed.folder, scratch=scratch, logs=logs)
        child = None
        try:
            child = await _spawn(request, log)
            return cls(installed, await _listening(child, installed, log), child, scratch, log)
        except BaseException as error:
            if child is not None:
                await _end(child)
            shutil.rmtree(scratch, ignore_errors=True)
            if isinstance(error, OSError):
                raise PrerequisiteError(f"{installed.foundry_id} cannot be started: {error}.", f"See {log}") from error
            raise

    @property
    def alive(self) -> bool:
        return self._child.returncode is None

    async def ended(self) -> str:
        """Wait for the end of the process, and say how it ended."""
        return f"{children.died(await self._child.wait())}: {children.last_words(self._log)}"

    def memory_mb(self) -> float:
        """Resident memory in MB. For the proportional size the kernel walks through all pages, and requests wait."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._child.pid).memory_info().rss / 1e6 if self.alive else 0.0
        return 0.0

    async def stop(self) -> None:
        """End the process; requests that it is answering break off. Twice is harmless."""
        try:
            await _end(self._child)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def smoke_test(self) -> None:
        """Have one request answered as a whole and one as a stream; else a ServingError says what came."""
        import httpx

        called = self.installed.foundry_id
        try:
            client = httpx.AsyncClient(base_url=self.url, timeout=SMOKE_S, trust_env=False)
            async with asyncio.timeout(SMOKE_S), client:
                for prompt in PROMPTS:
                    if await self._answers(client, prompt):
                        break
                else:
                    raise ServingError(f"{called} answers nothing to {' nor '.join(map(repr, PROMPTS))}.")
                await self._streams(client, prompt)
        except TimeoutError as error:
            raise ServingError(f"{called} took longer than {SMOKE_S:.0f} s for its smoke test.") from error
        except httpx.HTTPError as error:
            # The connection breaks a moment before the end of the process is known.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    ended = await self.ended()
                raise ServingError(f"{called} crashed in its smoke test. {ended}", f"Its log: {self._log}") from error
            raise ServingError(f"{called} failed its smoke test: {type(error).__name__} {error}") from error

    async def _answers(self, client: "httpx.AsyncClient", prompt: str) -> bool:
        response = await client.post(CHAT, json=self._question(prompt))
        try:
            answer = response.json()
            tokens, finish = int(answer["usage"]["completion_tokens"]), answer["choices"][0]["finish_reason"]
        except (ValueError, LookupError, TypeError) as error:
            raise self._wrong(prompt, f"status {response.status_code}: {response.text[:500]}") from error
        if response.status_code != 200 or not finish:
            raise self._wrong(prompt, f"status {response.status_code}, finish reason {finish!r}")
        return tokens > 0

    async def _streams(self, client: "httpx.AsyncClient", prompt: str) -> None:
        question = {**self._question(prompt), "stream": True}
        async with client.stream("POST", CHAT, json=question) as response:
            # Other lines are comments: under load the runtime sends ": keep-alive".
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        if response.status_code != 200 or lines[-1:] != ["data: [DONE]"]:
            raise self._wrong(prompt, f"as a stream status {response.status_code}, at its end {lines[-1:]}")
        try:
            choices = [json.loads(line.removeprefix("data: "))["choices"] for line in lines[:-1]]
            deltas = [one["delta"] for found in choices for one in found]
            text = any(one.get("content") or one.get("reasoning_content") for one in deltas)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._wrong(prompt, f"as a stream {lines}"[:500]) from error
        if not text:
            raise self._wrong(prompt, "a stream without text")

    def _question(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.installed.foundry_id, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0}

    def _wrong(self, prompt: str, got: str) -> ServingError:
        return ServingError(f"{self.installed.foundry_id} failed its smoke test: asked {prompt!r}, it gave {got}.")


async def _spawn(request: ServiceRequest, log: Path) -> asyncio.subprocess.Process:
    keep_log(log)
    with log.open("wb") as out:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", SERVICE_WORKER, request.model_dump_json()),
            stdin=asyncio.subprocess.PIPE,  # closes when this process dies, and the child ends with it
            stdout=asyncio.subprocess.PIPE,
            stderr=out,
            # It talks to its own catalog on loopback.
            **tree.apart({**os.environ, **web.past_proxies(), **children.STEADY_MALLOC}),
        )


async def _listening(child: asyncio.subprocess.Process, installed: Installed, log: Path) -> str:
    assert child.stdout is not None  # noqa: S101 - for the type checker: stdout is a pipe
    limit = LISTEN_S + sum(file.stat().st_size for file in installed.folder.glob("*")) / 1e6 / SLOWEST_MB_S
    try:
        async with asyncio.timeout(limit):
            line = await child.stdout.readline()
        answer = ServiceStart.model_validate_json(line)
    except TimeoutError as error:
        late = f"{installed.foundry_id} did not listen within {limit:.0f} s: {children.last_words(log)}"
        raise ServingError(late, f"Its log: {log}") from error
    except ValidationError as error:
        ended = children.died(await child.wait()) if not line else "The process announces nothing"
        said = children.last_words(log)
        if children.DISK_FULL in said:
            raise PrerequisiteError(f"The disk is full: {said}", children.FREE_SPACE) from error
        raise ServingError(f"{installed.foundry_id} did not start. {ended}: {said}", f"Its log: {log}") from error
    if answer.error:
        raise errors.BY_NAME.get(answer.error, ServingError)(answer.message, answer.fix or f"Its log: {log}")
    return answer.url


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ask the child's group to end, then kill it; a cancelled wait kills it at once."""
    known = tree.ask_to_end(child.pid)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(children.GRACE_S):
                await child.wait()
    finally:
        tree.kill(child.pid, known)
    await child.wait()
