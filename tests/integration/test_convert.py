"""Conversions as a job makes them: Olive in child processes, checked, with a manifest, whole or not at all."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from slmops.conversion import recipes, store
from slmops.conversion.convert import convert, export, together
from slmops.core import machine
from slmops.core.errors import ConversionError, PrerequisiteError
from slmops.core.files import sha256
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint, Recipe, Variant
from slmops.processes import children
from tests import making

pytestmark = pytest.mark.integration

PRECISIONS = ("fp32", "fp16", "int8", "int4")
FILES = {
    *("model.onnx", "model.onnx.data", "config.json", "genai_config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "olive.log", "olive_config.json"),
}


@pytest.fixture(scope="module")
def folder_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the conversions are started: it holds somebody's model, over which onnx would stumble."""
    folder = tmp_path_factory.mktemp("cwd")
    (folder / "model.onnx.data").write_text("mine")
    return folder


CONVERT = """
import sys
from pathlib import Path
from slmops.conversion.convert import convert
from slmops.core.job import JobContext
from slmops.core.settings import Settings
from tests import making
asked, settings = making.job(Path(sys.argv[1])), Settings(home=sys.argv[2])
checkpoint = making.resolve(asked, settings)
convert(making.recipe("fp16", asked, checkpoint), JobContext(asked, "tiny", checkpoint, settings))
"""


@pytest.fixture(scope="module")
def killed(job: Job, home: Settings) -> int:
    """How many processes were at work when a job was killed in the middle; they are gone."""
    argv = [sys.executable, "-c", CONVERT, job.model, str(home.home)]
    running = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
    log = home.logs / "tiny" / "fp16.olive.log"
    making.until(lambda: log.exists() and "Running workflow" in log.read_text(), "Olive runs", 240)
    worked = len(making.at_work(home.home))
    running.kill()
    running.wait()
    making.until(lambda: not making.at_work(home.home), "all processes are gone")
    assert not home.variants.exists()
    return worked


@dataclass
class Disturbed:
    """What became of the precisions, of which all but int8 were disturbed at first."""

    failures: dict[str, ConversionError]
    files: set[str]  # in the home after the failures
    variants: dict[str, Variant]


@pytest.fixture(scope="module")
def disturbed(job: Job, checkpoint: Checkpoint, home: Settings, folder_of_the_user: Path, killed: int) -> Disturbed:
    """After the job that was killed, another one: of its children one is slow, one hangs, and one is killed."""
    assert killed
    failures: dict[str, ConversionError] = {}

    def make(name: str, settings: Settings = home) -> Variant:
        return convert(making.recipe(name, job, checkpoint), JobContext(job, "tiny", checkpoint, settings), child)

    def fail(name: str, do: Callable[[psutil.Process], object], begun: str = "", **settings: Any) -> None:
        def watcher(_mb: float) -> None:
            log = home.logs / "tiny" / f"{name}.olive.log"
            if begun in (log.read_text() if log.exists() else ""):
                for process in making.workers(str(home.home)):
                    do(process)

        with mock.patch.multiple(children, watchers=[watcher], HANGS_S=1.5), pytest.raises(ConversionError) as caught:
            make(name, home.model_copy(update=settings))
        failures[name] = caught.value

    with pytest.MonkeyPatch.context() as patch, together("tiny", home) as child:
        patch.chdir(folder_of_the_user)
        fail("fp32", lambda _: None, conversion_timeout_s=0.2)
        fail("int4", psutil.Process.suspend)
        int8 = make("int8")
        fail("fp16", psutil.Process.kill, "Running pass")
        files = {path for path in left(home) if (home.home / path).is_file()}
        # The next ones, and the same again, go on in a new child.
        return Disturbed(failures, files, {"int8": int8, **{name: make(name) for name in ("int4", "fp32", "fp16")}})


@pytest.fixture(scope="module")
def made(disturbed: Disturbed) -> dict[str, Variant]:
    return disturbed.variants


def left(home: Settings) -> set[str]:
    """What lies below variants/ and work/, but for an empty folder of the model's."""
    folders = (home.variants, home.work("tiny"))
    return {path.relative_to(home.home).as_posix() for folder in folders for path in folder.rglob("*")}


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_is_complete(
    made: dict[str, Variant], home: Settings, checkpoint: Checkpoint, precision: str
) -> None:
    variant = made[precision]
    assert variant.path.parent == home.variants
    assert variant.path.name == variant.key
    assert variant.key.startswith(f"{precision}-")
    manifest = json.loads((variant.path / "variant.json").read_text())
    assert manifest == variant.model_dump(mode="json")
    assert "path" not in manifest
    found = files(variant.path)
    del found["variant.json"]
    assert {file.name: file.sha256 for file in variant.files} == found
    assert set(found) == FILES
    assert all(file.size == (variant.path / file.name).stat().st_size > 0 for file in variant.files)
    assert variant.versions == machine.versions()
    assert set(store.DECISIVE) <= set(variant.versions)
    assert variant.hardware == machine.hardware()
    assert variant.checkpoint == checkpoint
    assert json.loads((variant.path / "olive_config.json").read_text()) == variant.recipe.config
    assert datetime.now(UTC) - timedelta(hours=1) < variant.created < datetime.now(UTC)
    assert 0.1 < variant.convert_s < 300
    assert 100 < variant.convert_memory_peak_mb < 5000  # an interpreter with torch
    assert variant.recipe.bits == {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[precision]
    assert (variant.export_error is not None) == (precision == "fp32")
    assert 0 < (variant.export_error or 1e-6) < 1e-5


def test_a_conversion_whose_child_is_stopped_or_killed_costs_nothing_else(disturbed: Disturbed) -> None:
    said = {name: error.message for name, error in disturbed.failures.items()}
    assert said["fp32"] == "It took longer than 0.2 s and was stopped."
    assert said["int4"] == "It neither said nor did anything for 1.5 s and was stopped."
    assert said["fp16"].startswith("The process was killed by SIGKILL (often: out of memory): ")
    assert "fp16.olive.log" in (disturbed.failures["fp16"].fix or "")
    # The hub's cache of a killed exporter goes with the others' at the end.
    expected = (f"variants/{disturbed.variants['int8'].key}/", "work/tiny/.cache/hub/")
    assert disturbed.files
    assert {path for path in disturbed.files if not path.startswith(expected)} == set()


def test_fewer_bits_are_smaller(made: dict[str, Variant], checkpoint: Checkpoint) -> None:
    assert [made[name].weights.bits_per_weight for name in PRECISIONS] == [
        pytest.approx(32, rel=0.01),
        pytest.approx(16, rel=0.01),
        pytest.approx(8.5, rel=0.02),  # 8 and the scale of each 32 weights, in fp16
        pytest.approx(6.8, rel=0.02),  # half of such a small model is its embeddings, which have 8
    ]
    sizes = [next(file.size for file in made[name].files if file.name == "model.onnx.data") for name in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    # Nothing but the weights, which are there once, and two rotary tables of (2048, 8) in fp32 or fp16.
    assert sizes[0] == pytest.approx(4 * checkpoint.parameters + 2 * 2048 * 8 * 4, rel=0.01)
    assert all(made[name].model_mb > size / 1e6 for name, size in zip(PRECISIONS, sizes, strict=True))


def test_nothing_is_strewn_about_and_a_job_after_one_that_was_killed_succeeds(
    made: dict[str, Variant], home: Settings, folder_of_the_user: Path, killed: int
) -> None:
    assert killed == 2  # both have ended
    assert store.load(made["fp16"].path) == made["fp16"]
    assert files(folder_of_the_user).keys() == {"model.onnx.data"}
    assert {path.name for path in home.variants.iterdir()} == {variant.key for variant in made.values()}
    assert {path for path in left(home) if not path.startswith("variants/")} == set()
    logs = {path.name for path in (home.logs / "tiny").iterdir()}
    assert logs == {f"{name}.{what}.log" for name in PRECISIONS for what in ("olive", "verify")}


def test_export(made: dict[str, Variant], job: Job, checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = JobContext(job.model_copy(update={"output_path": out}), "tiny", checkpoint, home)
    assert convert(making.recipe("int8", job, checkpoint), asked) == made["int8"]
    assert files(out / "int8") == files(made["int8"].path)
    assert [path.name for path in out.iterdir()] == ["int8"]
    # Our own older export is replaced ...
    (out / "int8" / "tokenizer.json").unlink()
    export(made["int8"], out)
    assert files(out / "int8") == files(made["int8"].path)
    # ... and a folder of somebody else's is not.
    foreign = out / "fp32"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(PrerequisiteError, match=r"fp32 exists and is not a variant of slmops") as caught:
        convert(making.recipe("fp32", job, checkpoint), asked)
    assert "--output-path" in (caught.value.fix or "")
    assert files(foreign).keys() == {"thesis.txt"}
    assert sorted(path.name for path in out.iterdir()) == ["fp32", "int8"]


def test_a_conversion_that_fails_leaves_nothing(job: Job, checkpoint: Checkpoint, fresh: Settings) -> None:
    # As nobody should write it: Olive exits 0 with a KeyError.
    config = recipes.workflow({"export": {"type": "ModelBuilder", "precision": "int8"}})
    said = r"eight: Olive produced no model\. ModelBuilder has no int8 for the CPU"
    with pytest.raises(ConversionError, match=said) as caught:
        convert(Recipe(name="eight", config=config), JobContext(job, "tiny", checkpoint, fresh))
    assert caught.value.exit_code == 1
    written = fresh.logs / "tiny" / "eight.olive.log"
    assert "No output model produced" in written.read_text()  # and Olive ended well
    assert caught.value.fix == f"Olive's log: {written}"
    assert left(fresh) == set()
    assert making.at_work(fresh.home) == []


@pytest.mark.usefixtures("in_process")
def test_without_an_fp32_variant_a_part_of_it_is_compared(
    job: Job, checkpoint: Checkpoint, stock: Settings, fresh: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    making.place(("int8", "int4"), job, stock, fresh.home)
    own = JobContext(job.model_copy(update={"baseline": "checkpoint"}), "tiny", checkpoint, fresh)
    variants = [convert(making.recipe(name, own.job, checkpoint), own) for name in ("int8", "int4")]
    assert 0 < variants[0].export_error < job.export_tolerance
    assert variants[0].export_error == variants[1].export_error
    assert len([message for message in caplog.messages if message.startswith("comparing")]) == 1
    assert {path.name for path in fresh.work("tiny").iterdir()} == {"export_error"}  # for the job's other variants


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if sys.platform != "linux" or os.getuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {mounted.stderr.strip()}")
    yield disk
    unmount = ["umount", str(disk)]
    subprocess.run(unmount, check=True)


def test_a_full_disk(job: Job, checkpoint: Checkpoint, small_disk: Path) -> None:
    full = Settings(home=small_disk / "home")
    asked = making.recipe("fp32", job, checkpoint), JobContext(job, "tiny", checkpoint, full)
    with together("tiny", full) as child:
        with pytest.raises(PrerequisiteError, match="The disk filled up while Olive worked") as caught:
            convert(*asked, child)
        assert caught.value.fix == "Free some space and run again."
        assert list(small_disk.rglob("*.onnx*")) == []
        enlarge = ["mount", "-o", "remount,size=60m", str(small_disk)]
        subprocess.run(enlarge, check=True)
        assert store.load(convert(*asked, child).path) is not None
    assert making.at_work(small_disk) == []
