"""All models at a glance: what is deployed, how the last run ended, when the next ones are due, and the disk."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from slmops.core.settings import Settings
from slmops.core.values import MANIFEST, Frozen, Variant
from slmops.delivery import installed
from slmops.foundry import layout
from slmops.foundry.versions import CHAMPION, VERSION_MANIFEST, ModelVersion, VersionManifest
from slmops.tracking.last_run import LastRun, LastRuns
from slmops.tracking.registry import Registry
from slmops.tracking.tracker import Tracker


class ModelState(Frozen):
    name: str
    champion: int | None = Field(description="The version that is deployed.")
    variant: str | None = Field(description="Its precision.")
    last_run: LastRun | None
    schedules: tuple[str, ...] = Field(description="What its deployments do by themselves.")
    home_mb: float = Field(description="Its variants and fine-tuned checkpoints in this home, in MB (10^6 bytes).")
    registry_mb: float = Field(description="Its versions with weights in MLflow, in MB.")


class Overview(Frozen):
    """What ``slmops list`` prints. Scripts rely on the JSON form."""

    home: Path
    models: tuple[ModelState, ...]

    @property
    def text(self) -> str:
        from tabulate import tabulate

        if not self.models:
            return "There are no models yet. `slmops run --model SOURCE` makes variants of one."
        rows = [
            (
                one.name,
                f"version {one.champion} ({one.variant})" if one.champion else "",
                f"{one.last_run.started.astimezone():%Y-%m-%d %H:%M}" if one.last_run else "",
                f"{one.last_run.kind}: {one.last_run.state}" if one.last_run else "",
                (one.last_run and one.last_run.chosen) or "",
                "\n".join(one.schedules),
                f"{one.home_mb:,.0f}",
                f"{one.registry_mb:,.0f}",
            )
            for one in self.models
        ]
        headers = ("model", "champion", "last run", "", "chosen", "runs by itself", "MB here", "MB in MLflow")
        align = ("left",) * 6 + ("right",) * 2
        return tabulate(rows, headers, disable_numparse=True, colalign=align)


def overview(settings: Settings, uri: str, schedules: Mapping[str, Iterable[str]]) -> Overview:
    """All models that MLflow knows, or that have deployments, whose ``schedules`` are given by model.

    A TrackingError if MLflow does not answer.
    """
    registry, last_runs = Registry(uri), LastRuns(uri)
    placed = _placed(settings)
    models = []
    for name in sorted({*registry.models(), *Tracker(uri).models(), *schedules}):
        versions = registry.versions(name)
        champion = next((one for one in versions if CHAMPION in one.aliases), None)
        models.append(
            ModelState(
                name=name,
                champion=champion and champion.version,
                variant=champion and champion.variant,
                last_run=last_runs.of(name),
                schedules=tuple(schedules.get(name, ())),
                home_mb=_size_mb([*placed.get(name, ()), *_trainings(versions, settings)]),
                registry_mb=sum(one.size_mb for one in versions if one.uploaded),
            )
        )
    return Overview(home=settings.home, models=tuple(models))


def _placed(settings: Settings) -> dict[str, list[Path]]:
    """The folders in which Foundry Local reads variants of each model: made here, or fetched from the registry."""
    found: dict[str, list[Path]] = defaultdict(list)
    for folder in (settings.foundry / "models" / layout.PUBLISHER).glob("*"):
        if made := Variant.from_file(folder / MANIFEST, path=folder):
            called = folder.name.rpartition("-")[0]
            found[called.removesuffix(layout.model_name("", made.name))].append(folder)
    for folder in installed.folder_of(settings).glob("*"):
        if manifest := VersionManifest.from_file(folder / VERSION_MANIFEST):
            found[manifest.model].append(folder)
    return found


def _trainings(versions: Iterable[ModelVersion], settings: Settings) -> set[Path]:
    """The folders of the fine-tunings in this home that versions came from."""
    merged = (Path(one.tags.get("slmops.source", "")) for one in versions)
    return {path.parent for path in merged if settings.trainings in path.parents}


def _size_mb(folders: Iterable[Path]) -> float:
    """What the folders take, a file that several of them link to once."""
    stats = (file.stat() for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum({stat.st_ino: stat.st_size for stat in stats}.values()) / 1e6
