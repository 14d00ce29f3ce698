"""A device and a registry made up of bytes and failures: no MLflow, no Foundry Local."""

import hashlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from slmops.core import machine
from slmops.core.errors import RegistrationError, SlmopsError, TrackingError
from slmops.core.settings import Settings
from slmops.core.values import Hardware, VariantFile
from slmops.delivery import installed, pull
from slmops.foundry import cli, register_worker
from slmops.foundry.register_worker import ForgetResult, ProviderResult, RegisterResult
from slmops.foundry.versions import VERSION_MANIFEST, Installed, ModelVersion, VersionManifest
from slmops.processes import children
from slmops.tracking import download
from tests import values

URI = "http://registry:5000"
LOCATION = "mlflow-artifacts:/1/models/m-1/artifacts"
BLOCK = 1000
BIG = "model.onnx.data"
FILES = {
    "model.onnx": b"graph",
    BIG: bytes(range(256)) * 40,  # 10,240 bytes
    "genai_config.json": b"{}",
    "adapters/one/weights.bin": b"adapter",
    "empty.txt": b"",
}
SIZE = len(FILES[BIG])
CRASHED = RegistrationError("The process was killed by SIGSEGV", "Its log: x")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def described(files: dict[str, bytes]) -> tuple[VariantFile, ...]:
    return tuple(VariantFile(name=name, size=len(data), sha256=digest(data)) for name, data in files.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return set(contents(folder))


class Remote:
    """A registry that serves one version, and what was asked of it."""

    def __init__(self, name: str = "bot", variant: str = "int8", number: int = 3, **changes: bytes) -> None:
        self.files = {**FILES, **changes}
        self.number = number
        self.asked: list[tuple[str, int]] = []
        self.cuts: dict[str, list[int | Exception]] = {}  # for each request the bytes given before it breaks off
        self.answers: dict[str, list[bytes]] = {}  # for each request a content of its own
        self.given: Counter[str] = Counter()  # bytes
        made: dict[str, Any] = {"key": "int8-0123", "device": "cpu", "provider": "CPUExecutionProvider"}
        made["inference_model"] = {"PromptTemplate": {"prompt": "{Content}"}, "Description": "né"}
        self.manifest = VersionManifest(model=name, variant=variant, files=described(self.files), **made)

    def describe(self, **changes: Any) -> None:
        self.manifest = self.manifest.model_copy(update=changes)

    @property
    def text(self) -> bytes:
        return self.manifest.model_dump_json(indent=2).encode()

    def version(self, **changes: Any) -> ModelVersion:
        fields = {"name": self.manifest.model, "variant": self.manifest.variant, "manifest_sha256": digest(self.text)}
        return values.model_version(self.number, **{"location": LOCATION, **fields, **changes})

    def read(self, uri: str, location: str, path: str, offset: int) -> Generator[bytes, None, None]:
        assert (uri, location) == (URI, LOCATION)
        self.asked.append((path, offset))
        data = self.text if path == VERSION_MANIFEST else self.files[path]
        if self.answers.get(path):
            data = self.answers[path].pop(0)
        cut = self.cuts[path].pop(0) if self.cuts.get(path) else None
        if isinstance(cut, Exception):
            raise cut
        end = len(data) if cut is None else min(len(data), offset + cut)
        for start in range(offset, end, BLOCK):
            self.given[path] += BLOCK
            yield data[start : min(start + BLOCK, end)]
        if cut is not None:
            raise TrackingError("The connection is broken.", "Repair it.")

    @property
    def paths(self) -> set[str]:
        return {path for path, _ in self.asked}

    def offsets(self, path: str = BIG) -> list[int]:
        return [offset for asked, offset in self.asked if asked == path]


class Device:
    """A device with 8 GB and little patience, its Foundry Local as far as it is known here, and its registry."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.settings = Settings(home=folder / "home")
        self.registered: list[str] = []
        self.forgotten: list[str] = []
        self.seen: list[set[str]] = []  # what Foundry Local found in the folder
        self.fails: Exception | None = None  # what registering a version raises
        self.providers: tuple[str, ...] = ()  # of execution, beside the CPU's
        self.kept: set[str] = set()  # what the catalog does not let go
        self._patch = patch
        hardware = Hardware(system="Linux", machine="x86_64", processor="x", cores=2, memory_gb=8, isa=())
        patch.setattr(machine, "hardware", lambda: hardware)
        patch.setattr(download, "RESUME_AFTER_S", (0.0,) * 4)
        patch.setattr(cli, "confirm", lambda *_: None)
        patch.setattr(cli, "ask", lambda *_: None)
        patch.setattr(children, "call", self._call)
        self.remote = self.serve()

    def serve(self, *args: Any, **changes: Any) -> Remote:
        """Put a version into the registry, in place of the last one."""
        self.remote = Remote(*args, **changes)
        self._patch.setattr(download, "read", self.remote.read)
        return self.remote

    def install(self, **changes: Any) -> Installed:
        return pull.install(self.remote.version(**changes), self.settings, URI)

    def refuses(self, error: type[SlmopsError], said: str, **changes: Any) -> SlmopsError:
        """The error that is raised instead of installing it; its message matches."""
        with pytest.raises(error, match=said) as caught:
            self.install(**changes)
        return caught.value

    def here(self) -> list[int]:
        return [one.version for one in installed.versions("bot", self.settings)]

    @property
    def models(self) -> Path:
        return self.settings.deployed / "models" / "slmops"

    @property
    def downloads(self) -> Path:
        """Where the files of the registry's version are collected."""
        folder = self.settings.deployed / "downloads" / digest(self.remote.text)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _call(self, handle: Any, request: Any, **_: Any) -> tuple[Any, None]:
        if handle is register_worker.forget_all:
            gone = [one for one in request.foundry_ids if one not in self.kept]
            self.forgotten += gone
            return ForgetResult(forgotten=tuple(gone)), None
        if handle is register_worker.look_for:
            if self.fails is not None:
                raise self.fails
            missing = None if request.provider in self.providers else f"there is no {request.provider} here"
            return ProviderResult(missing=missing), None
        assert handle is register_worker.handle
        assert request.home == self.settings.deployed
        self.registered.append(request.foundry_id)
        self.seen.append(names(request.folder))
        if self.fails is not None:
            raise self.fails
        return RegisterResult(answer="Paris."), None
