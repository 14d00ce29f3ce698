"""Versions of a model as the registry, a device and the service pass them to each other."""

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, StringConstraints

from slmops.conversion.store import files_of
from slmops.core.names import Name
from slmops.core.targets import TARGETS, target_of
from slmops.core.values import Frozen, GateResult, Registration, Variant, VariantFile
from slmops.foundry.layout import GENAI_CONFIG, INFERENCE_MODEL, RELEASED_CONFIG, model_name

VERSION_MANIFEST = "deployment.json"
FILES = "slmops.files"  # the tag of a version whose weights are not in the registry, which says where they are instead
CHAMPION = "champion"  # alias of the version that is deployed
PREVIOUS = "previous"  # alias of the version that was the champion before
RELEASE = "slmops.release"  # the tag of a version with the numbers of those for other targets that come with it
REIGN = "slmops.champion."
"""How the tags begin with which a version says when it became the champion, one for each time: the time, then what
:class:`Reign` tells of it as JSON. They are never changed."""
RESERVED = re.compile(r"champion|previous|latest|v?\d+", re.IGNORECASE)
"""What cannot be the alias of a variant: two have a meaning, MLflow keeps two for itself, and numbers are versions."""


class VersionManifest(Frozen):
    """The manifest of a version, whose own SHA-256 is a tag of the version in the registry.

    ``inference_model.json`` is not among its files: it holds the version's number, which is known only afterwards.
    """

    model: str = Field(description="Name in the registry.")
    variant: str
    key: str = Field(description="Digest of what the variant was made of.")
    device: str = Field(description="cpu or gpu.")
    provider: str = Field(description="ONNX Runtime's execution provider.")
    files: tuple[VariantFile, ...]
    inference_model: dict[str, Any] = Field(description="inference_model.json without Name and Version.")

    @classmethod
    def of(cls, name: str, variant: Variant, registration: Registration) -> Self:
        """The manifest of a variant as it is in Foundry Local; reads every file for its SHA-256."""
        inference = json.loads((registration.path / INFERENCE_MODEL).read_text(encoding="utf-8"))
        files = {file.name: file for file in files_of(registration.path) if file.name != INFERENCE_MODEL}
        if released := files.pop(RELEASED_CONFIG, None):
            files[GENAI_CONFIG] = released.model_copy(update={"name": GENAI_CONFIG})
        target = TARGETS[target_of(variant.name)]
        return cls(
            model=name,
            variant=variant.name,
            key=variant.key,
            device=target.device,
            provider=target.provider,
            files=tuple(files.values()),
            inference_model={key: value for key, value in inference.items() if key not in ("Name", "Version")},
        )

    @property
    def size_mb(self) -> float:
        """Size of all files in MB (10^6 bytes)."""
        return sum(file.size for file in self.files) / 1e6

    @property
    def text(self) -> str:
        """The content of deployment.json."""
        return self.model_dump_json(indent=2) + "\n"

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of that text, which identifies the content of the version."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class ModelVersion(Frozen):
    """A version that slmops put into MLflow's Model Registry."""

    name: str
    version: int
    variant: str = Field(description="Its precision, or the name of the user's Olive file.")
    aliases: tuple[str, ...] = ()
    location: str = Field(description="Artifact URI of its files, such as mlflow-artifacts:/1/models/m-.../artifacts.")
    manifest_sha256: str = Field(description="SHA-256 of deployment.json.")
    size_mb: float
    memory_mb: float = Field(description="Highest memory of its process when it was measured, in MB.")
    device: str
    provider: str
    run_id: str = Field(description="The MLflow run of its latest evaluation.")
    job_id: str = Field(description="The parent of that run.")
    created: datetime
    tags: dict[str, str] = Field({}, description="All tags of the version.")

    @property
    def foundry_id(self) -> str:
        """Its id in Foundry Local on every device: ``<name>-<precision>-generic-cpu:<version>``."""
        return f"{model_name(self.name, self.variant)}:{self.version}"

    @property
    def uploaded(self) -> bool:
        """The registry has all of its files; of others it has all but the weights."""
        return FILES not in self.tags

    @property
    def abilities(self) -> frozenset[str]:
        """Of tools and reasoning, what it can do."""
        return frozenset(self.tags.get("slmops.abilities", "").split())

    @property
    def others(self) -> list[str]:
        """The numbers of the versions for other targets that are one release with it."""
        return self.tags.get(RELEASE, "").split()

    @property
    def label(self) -> str:
        """Its name in messages, such as ``support-bot version 3 (int8)``."""
        return f"{self.name} version {self.version} ({self.variant})"


class Reign(Frozen):
    """One time at which a version was the champion; what was not recorded is empty."""

    version: int
    variant: str
    since: datetime
    until: datetime | None = Field(description="None: it still is, or nothing else became it through slmops.")
    promoter: str = Field("", description="The flow, and the person or the deployment that started it.")
    reason: str = Field("", description="Why it became the champion.")
    run: str = Field("", description="The page of that flow run in Prefect.")
    checkpoint: str = Field("", description="What was converted, or the base model if it was fine-tuned here.")
    data: str = Field("", description="What it was fine-tuned on here.")
    data_digest: str = Field("", description="SHA-256 over those items.")


def reigns(versions: Iterable[ModelVersion]) -> list[Reign]:
    """When which version was the champion, the newest time first."""
    begun: list[Reign] = []
    for one in versions:
        told = {key.removeprefix(REIGN): text for key, text in one.tags.items() if key.startswith(REIGN)}
        if not told and (since := one.tags.get("slmops.promoted")):  # as an older slmops left it
            told = {since: json.dumps({"run": one.tags.get("slmops.promoted_by", "")})}
        known = {
            "version": one.version,
            "variant": one.variant,
            "until": None,
            "checkpoint": one.tags.get("slmops.base_model") or one.tags.get("slmops.source", ""),
            "data": one.tags.get("slmops.data", ""),
            "data_digest": one.tags.get("slmops.data_digest", ""),
        }
        begun += [
            Reign(since=datetime.fromisoformat(since), **known, **json.loads(text)) for since, text in told.items()
        ]
    begun.sort(key=lambda reign: reign.since, reverse=True)
    ends = [None, *(reign.since for reign in begun)]
    return [reign.model_copy(update={"until": end}) for reign, end in zip(begun, ends, strict=False)]


class Installed(Frozen):
    """A version on this device, registered in the Foundry home ``Settings.deployed``."""

    name: str
    version: int
    variant: str
    foundry_id: str = Field(description="<name>-<variant>-generic-cpu:<version>, with the registry's version number.")
    folder: Path


class Promoted(Frozen):
    """The result of a promotion or a rollback; the JSON form is a promise to scripts."""

    model: str
    version: int
    variant: str
    replaced: int | None = Field(description="The version that was the champion before.")
    changed: bool = Field(description="False: it was the champion already.")
    forced: str | None = Field(None, description="The reason, if gates were overridden.")
    gates: tuple[GateResult, ...] = ()
    url: str = Field(description="Its page in MLflow.")
    others: dict[str, int] = Field(
        {}, description="Versions for other targets in the same release.", exclude_if=lambda them: not them
    )

    @property
    def text(self) -> str:
        label = f"{self.model} version {self.version} ({self.variant})"
        if not self.changed:
            return f"{label} is the champion already."
        replaced = "" if self.replaced is None else f", in place of version {self.replaced}"
        others = "".join(f", with version {number} ({variant})" for variant, number in self.others.items())
        return f"{label} is the champion now{replaced}{others}."


class Promotion(Frozen):
    """Deploy a version of a model."""

    name: Name = Field(description="The model's name in the registry.")
    precision: Name | None = Field(None, description="Its newest version of this precision; the chosen one by default.")
    version: int | None = Field(None, ge=1, description="This version of the registry.")
    force: Annotated[str, StringConstraints(strip_whitespace=True, min_length=3)] | None = Field(
        None, description="Promote even what a gate refuses; the reason, which is recorded."
    )
    approval: bool = Field(False, description="Wait until a person has looked and decided on the Prefect page.")
    approval_timeout_s: int = Field(
        86400, ge=1, title="Approval timeout", description="Seconds to wait for that decision."
    )
