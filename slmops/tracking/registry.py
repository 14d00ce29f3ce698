"""What is deployed: MLflow's Model Registry, the only record of it.

A version is one variant's files as Foundry Local reads them; its weights are uploaded when it is promoted. Its alias
``champion`` is what is served, ``previous`` what was served before that, and each variant's name the newest version of
that variant. A number is always the number of a version: a variant that is called by one, such as ``4`` of a file
``4.json``, has no alias.

MLflow has no transactions over aliases. So ``previous`` is set before ``champion``, and no moment and no crash leaves
an alias that points at nothing; and who promotes says which champion the decision was made against, so that of two
promotions only one wins.
"""

import json
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from slmops.tracking.client import KIND, Connection, or_none

from mlflow.entities.model_registry import ModelVersion as Entry
from mlflow.entities.model_registry import RegisteredModel

from slmops.core.errors import PromotionError, UsageError
from slmops.core.values import Registration, Variant, VariantResult, is_weights
from slmops.foundry.layout import claimed, released
from slmops.foundry.versions import (
    CHAMPION,
    FILES,
    PREVIOUS,
    REIGN,
    RESERVED,
    VERSION_MANIFEST,
    ModelVersion,
    VersionManifest,
)

TAGS = {
    "variant": "slmops.variant",
    "location": "slmops.location",
    "manifest_sha256": "slmops.manifest_sha256",
    "size_mb": "slmops.size_mb",
    "memory_mb": "slmops.memory_mb",
    "device": "slmops.device",
    "provider": "slmops.provider",
    "run_id": "slmops.evaluation_run",
    "job_id": "slmops.job_run",
}
"""Field of a version to the tag that has it; a version cannot do without them."""
PROMOTION = {"promoter": "slmops.promoter", "reason": "slmops.promoted_because", "run": "slmops.promoted_by"}
"""What a promotion tells of itself, to the tag of a version that has it of the latest one."""
LOGGED_MODEL = "slmops.logged_model"
OURS = {KIND: "model"}  # the tags of a registered model that slmops made


class Registry(Connection):
    def models(self) -> list[str]:
        """Names of all models that slmops registered."""
        names: list[str] = []
        token = None
        while token != "":
            page = self._client.search_registered_models(page_token=token)
            names += (model.name for model in page if model.tags.items() >= OURS.items())
            token = page.token or ""
        return sorted(names)

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model that slmops registered, the newest first; none of an unknown model."""
        model = self._model(name)
        if model is None:
            return []
        entries = self._client.search_model_versions(f"name = '{name}'")
        made = [_version(entry, model) for entry in entries if entry.tags.keys() >= set(TAGS.values())]
        return sorted(made, key=lambda version: -version.version)

    def find(self, name: str, which: str) -> ModelVersion:
        """The version with this number or else this alias; UsageError if there is none, or slmops did not make it."""
        model = self._model(name)
        if model is None:
            known = ", ".join(self.models()) or "none"
            raise UsageError(f"There is no model {name!r} in the registry.", f"Known models: {known}.")
        number = which if re.fullmatch("[1-9][0-9]*", which) else model.aliases.get(which)
        return self._version_of(model, number, which)

    def newest(self, name: str, variant: str) -> ModelVersion:
        """The version of a variant that was made or evaluated last; UsageError if there is none."""
        if RESERVED.fullmatch(variant) is None:
            return self.find(name, variant)
        for version in self.versions(name):
            if version.variant == variant:
                return version
        raise UsageError(f"{name} has no version of {variant!r}.", f"`slmops status {name}` lists its versions.")

    def champion(self, name: str) -> ModelVersion | None:
        """The version that is deployed, if any; UsageError if slmops did not make it."""
        return self._aliased(name, CHAMPION)

    def previous(self, name: str) -> ModelVersion | None:
        """The version that was deployed before, if any."""
        return self._aliased(name, PREVIOUS)

    def release(self, version: ModelVersion) -> list[ModelVersion]:
        """A version and those for other targets that are deployed together with it, without those that were deleted.

        They are named by a tag of it, so one alias moves for all of them.
        """
        known = self.versions(version.name) if version.others else ()
        return [version, *(one for one in known if str(one.version) in version.others)]

    def add(
        self, name: str, variant: Variant, registration: Registration, result: VariantResult, job_id: str
    ) -> ModelVersion:
        """Make an accepted variant a version; the same files stay the same version.

        The folder in Foundry Local is what it is of. All but the weights is uploaded, into the logged model of the run
        that ``result`` names.
        """
        model = self._model(name)
        if model is None:
            self._client.create_registered_model(name, tags=OURS, description="Variants that passed their gates.")
        elif not model.tags.items() >= OURS.items():
            problem = f"The registry has a model {name!r} that slmops did not make."
            raise UsageError(problem, "Choose another name with --name.")
        manifest = VersionManifest.of(name, variant, registration)
        outcomes = [gate.outcome for gate in result.gates if gate.outcome != "skipped"]
        tags = {
            "slmops.variant": variant.name,
            "slmops.recipe": json.dumps(variant.recipe.config, sort_keys=True)[:4000],
            "slmops.key": variant.key,
            "slmops.checkpoint_digest": variant.checkpoint.digest,
            "slmops.source": variant.checkpoint.source,
            "slmops.size_mb": f"{manifest.size_mb:.1f}",
            "slmops.memory_mb": f"{result.metrics.get('memory_peak_mb', 0.0):.0f}",
            "slmops.device": manifest.device,
            "slmops.provider": manifest.provider,
            "slmops.abilities": " ".join(sorted(claimed(registration.path))),
            "slmops.gates": f"passed {outcomes.count('pass')} of {len(outcomes)}",
            "slmops.evaluation_run": result.run_id or "",
            "slmops.job_run": job_id,
        }
        known = next((one for one in self.versions(name) if self._holds(one, manifest)), None)
        if known is None or not known.uploaded:
            tags[FILES] = f"on {platform.node()} only"
        if known is None:
            number = self._create(manifest, registration.path, tags)
        else:
            number = str(known.version)
            self._client.set_version_tags(name, number, tags)
        if RESERVED.fullmatch(variant.name) is None:
            self._client.set_registered_model_alias(name, variant.name, number)
        return self._described(name, number)

    def upload(self, version: ModelVersion, folder: Path) -> ModelVersion:
        """Upload the weights of a version, as far as they are not there; that all are is noted last."""
        names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        self._send(version.tags[LOGGED_MODEL], folder, (name for name in names if is_weights(name.as_posix())))
        if not version.uploaded:
            self._client.delete_model_version_tag(version.name, str(version.version), FILES)
        return self._described(version.name, str(version.version))

    def promote(self, version: ModelVersion, against: ModelVersion | None, tags: dict[str, str]) -> None:
        """Make ``version``, which was judged ``against`` the champion, the champion, and that the previous one.

        It is a PromotionError if it is not uploaded, or another came first. On one machine a lock prevents the latter;
        between machines the look and the change lie some milliseconds apart, which MLflow gives no means to close.
        """
        if not version.uploaded:
            raise PromotionError(f"{version.label} was not promoted: its files are {version.tags[FILES]}.")
        self._expect_champion(against, version)
        number, replaced = str(version.version), str(against.version) if against else ""
        moved = {"slmops.promoted": datetime.now(UTC).isoformat(timespec="seconds")}
        if replaced != number:  # else only its release changes
            moved["slmops.replaced"] = replaced
        self._client.set_version_tags(version.name, number, {**moved, **tags})
        if replaced not in ("", number):
            self._client.set_registered_model_alias(version.name, PREVIOUS, replaced)
        self._client.set_registered_model_alias(version.name, CHAMPION, number)
        if replaced != number:
            said = {key: tags.get(tag, "") for key, tag in PROMOTION.items()}
            self._note_reign(version, said)
        self._expect_champion(version, version)

    def note(self, version: ModelVersion, tags: dict[str, str]) -> None:
        self._client.set_version_tags(version.name, str(version.version), tags)

    def withdraw(self, failed: ModelVersion, reason: str) -> ModelVersion | None:
        """Undo the promotion of a version that cannot be served: what it replaced is the champion again, and returned.

        None is returned if there is nothing to go back to, and then nothing is changed but the tag.
        """
        self._client.set_version_tags(failed.name, str(failed.version), {"slmops.withdrawn": reason[:4000]})
        champion, previous = self.champion(failed.name), self.previous(failed.name)
        if champion is None or str(failed.version) not in (str(champion.version), *champion.others):
            return champion  # somebody was faster
        if previous is None or previous.version == failed.version:
            return None
        self._client.set_registered_model_alias(failed.name, CHAMPION, str(previous.version))
        # What the one that failed replaced is no longer "previous"; what that replaced in its time is.
        before = previous.tags.get("slmops.replaced", "")
        if before and self._entry(failed.name, before) is not None:
            self._client.set_registered_model_alias(failed.name, PREVIOUS, before)
        else:
            self._client.delete_registered_model_alias(failed.name, PREVIOUS)
        why = f"version {failed.version} was withdrawn: {reason}"
        self._note_reign(previous, {"promoter": f"the watch over version {failed.version}", "reason": why[:4000]})
        return self.champion(failed.name)

    def page(self, version: ModelVersion) -> str:
        return self._address(f"models/{version.name}/versions/{version.version}")

    def _note_reign(self, version: ModelVersion, said: dict[str, str]) -> None:
        """Note that it is the champion from now on, beside what is noted of earlier times."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self._client.set_version_tags(version.name, str(version.version), {f"{REIGN}{now}": json.dumps(said)})

    def _model(self, name: str) -> RegisteredModel | None:
        return or_none(lambda: self._client.get_registered_model(name))

    def _entry(self, name: str, number: str) -> Entry | None:
        return or_none(lambda: self._client.get_model_version(name, number))

    def _version_of(self, model: RegisteredModel, number: str | None, which: str) -> ModelVersion:
        entry = self._entry(model.name, number) if number is not None else None
        if entry is None:
            numbers = ", ".join(f"{one.version} ({one.variant})" for one in self.versions(model.name)) or "none"
            aliases = ", ".join(sorted(model.aliases)) or "none"
            fix = f"Its versions: {numbers}; its aliases: {aliases}."
            raise UsageError(f"{model.name} has no version {which!r}.", fix)
        missing = sorted(TAGS.values() - entry.tags.keys())
        if missing:
            problem = f"was not registered by slmops, or was altered: it has no {' and no '.join(missing)}"
            fix = "Take the alias from it in MLflow, or name another version."
            raise UsageError(f"Version {number} of {model.name} {problem}.", fix)
        return _version(entry, model)

    def _aliased(self, name: str, alias: str) -> ModelVersion | None:
        model = self._model(name)
        if model is None or alias not in model.aliases:
            return None
        return self._version_of(model, model.aliases[alias], alias)

    def _holds(self, version: ModelVersion, manifest: VersionManifest) -> bool:
        """Whether a version is of this content, its files still there."""
        if version.manifest_sha256 != manifest.sha256:
            return False
        # None: its logged model was deleted.
        files = or_none(lambda: self._client.list_logged_model_artifacts(version.tags.get(LOGGED_MODEL, "")))
        return VERSION_MANIFEST in {file.path for file in files or ()}

    def _described(self, name: str, number: str) -> ModelVersion:
        """A version, with what it is in the one column of MLflow's list that is free."""
        version = self.find(name, number)
        said = f"{version.variant}, {version.size_mb:.1f} MB, {version.tags.get('slmops.gates')} gates"
        self._client.update_model_version(name, number, said if version.uploaded else f"{said}, {version.tags[FILES]}")
        return version

    def _send(self, logged_model: str, folder: Path, names: Iterable[PurePath]) -> None:
        """Put files into a logged model, unless it has them in that size: an upload may have been broken off."""
        for name in names:
            below, file = name.parent.as_posix() if name.parent.name else None, released(folder, name.as_posix())
            there = self._client.list_logged_model_artifacts(logged_model, below)
            if (name.as_posix(), file.stat().st_size) in {(one.path, one.file_size) for one in there}:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                if file.name != name.name:  # it is uploaded under its own name
                    file = Path(shutil.copyfile(file, Path(scratch, name.name)))
                self._client.log_model_artifact(logged_model, str(file), below)

    def _create(self, manifest: VersionManifest, folder: Path, tags: dict[str, str]) -> str:
        """Put the files but the weights into the run's logged model, the manifest last, and make that a version."""
        run = self._client.get_run(tags["slmops.evaluation_run"])
        (logged,) = self._client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        self._send(logged.model_id, folder, [PurePath(one.name) for one in manifest.files if not is_weights(one.name)])
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / VERSION_MANIFEST).write_text(manifest.text, encoding="utf-8", newline="")
            self._client.log_model_artifact(logged.model_id, str(Path(scratch) / VERSION_MANIFEST))
        # A database without a server has no models:/ addresses of its own.
        source = f"models:/{logged.model_id}" if self.uri.startswith("http") else logged.artifact_location
        kept = {"slmops.manifest_sha256": manifest.sha256, "slmops.location": logged.artifact_location}
        tags = {**tags, **kept, LOGGED_MODEL: logged.model_id}
        created = self._client.create_model_version(
            manifest.model, source, run.info.run_id, tags, await_creation_for=0, model_id=logged.model_id
        )
        return str(created.version)

    def _expect_champion(self, expected: ModelVersion | None, promoted: ModelVersion) -> None:
        now = self.champion(promoted.name)
        if (now and now.version) != (expected and expected.version):
            problem = f"another promotion came first, and {now.label if now else 'nothing'} is the champion now"
            fix = "Look at `slmops status` and promote again if it still should be."
            raise PromotionError(f"{promoted.label} was not promoted: {problem}.", fix)


def _version(entry: Entry, model: RegisteredModel) -> ModelVersion:
    fields: dict[str, Any] = {field: entry.tags[tag] for field, tag in TAGS.items()}
    return ModelVersion(
        name=entry.name,
        version=int(entry.version),
        aliases=tuple(sorted(alias for alias, number in model.aliases.items() if str(number) == str(entry.version))),
        created=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC),
        tags=entry.tags,
        **fields,
    )
