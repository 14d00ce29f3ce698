"""Memory and disk that a job needs, and the baseline that fits them."""

import shutil
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from slmops.checkpoints import room
from slmops.core import machine
from slmops.core.errors import PrerequisiteError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Pool, Settings
from slmops.core.values import Recipe, Room
from slmops.processes import children
from tests.values import checkpoint

FP16, INT4 = (Recipe(name=f"of-{bits}", config={}, bits=bits) for bits in (16, 4))
CHOSEN = Recipe(name="chosen", config={"passes": {"quantize": {"choose": True}}}, bits=4)
LARGE = checkpoint(parameters=10**12, size_mb=2e6)
FP32, OWN = Job(model="m", baseline="fp32"), Job(model="m", baseline="checkpoint")


def test_the_room_that_is_needed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Unfinished work: twice fp32 with 4 bytes a weight and fp32 itself for fp16, x 1.35 x 1000 weights.
    needed = room.check([FP16, INT4], checkpoint(), FP32, settings)
    assert needed == Room(memory_estimated_mb=0.0088, disk_estimated_mb=0.0162)
    assert room.check([INT4], checkpoint(), FP32, settings, converts=False) is None
    # fp32 4 + int4 0.75 + twice fp32 8 = 12.75 bytes a weight, x 1.35 x 10^12 weights.
    with pytest.raises(PrerequisiteError, match=r"about 17212\.5 GB"):
        room.check([INT4], LARGE, FP32, settings)
    with pytest.raises(PrerequisiteError, match=r"about 25312\.5 GB"):
        # and 2 for fp16 itself and 4 for the fp32 that it is made from
        room.check([INT4, FP16], LARGE, FP32, settings)
    # int4 0.75 x 1.35, and three times the checkpoint
    with pytest.raises(PrerequisiteError, match=r"disk for of-4 of .*: about 7012\.5 GB"):
        room.check([INT4], LARGE, OWN, settings)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**18))
    monkeypatch.setattr(machine, "memory", lambda: (8e9, 4e9))  # of a container
    with pytest.raises(PrerequisiteError, match=r"about 8800\.0 GB .* 4\.0 GB"):
        room.check([INT4], LARGE, FP32, settings)
    with pytest.raises(PrerequisiteError, match=r"about 3003\.0 GB .* 4\.0 GB"):
        room.check([INT4], LARGE, OWN, settings)
    with pytest.raises(PrerequisiteError, match=r"memory for chosen of .*: about 6003\.0 GB"):
        room.check([CHOSEN], LARGE, OWN, settings)  # which layers get 8 bits is chosen in fp32, at 6 bytes a weight


def test_files_for_a_peer_take_disk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory", lambda: (10**18, 10**18))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**18))
    found = [
        room.check([INT4], LARGE, FP32.model_copy(update={"peer": peer}), settings) for peer in (None, "llama.cpp")
    ]
    without, beside = (one.disk_estimated_mb for one in found if one)
    assert beside - without == pytest.approx(5.9 * LARGE.parameters / 1e6)


@pytest.mark.parametrize(
    ("millions", "gb", "asked", "expected"),
    [
        (135, (16, 70), None, "fp32"),
        (135, (2, 70), None, "fp32"),  # small anywhere
        (600, (16, 70), None, "checkpoint"),
        (600, (25, 70), None, "checkpoint"),
        (600, (64, 70), None, "fp32"),
        (600, (64, 4), None, "checkpoint"),
        (600, (16, 70), "fp32", "fp32"),
        (135, (16, 70), "checkpoint", "checkpoint"),
    ],
)
def test_the_baseline(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, millions: int, gb: tuple[int, int], asked: Any, expected: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=gb[1] * 10**9))
    monkeypatch.setattr(machine, "memory", lambda: (gb[0] * 10**9, 0))
    job = Job(model="m", baseline=asked)
    assert room.with_baseline(job, checkpoint(parameters=millions * 10**6), settings).baseline == expected


def test_other_machines_need_an_fp32_baseline(settings: Settings) -> None:
    pooled = settings.model_copy(update={"pools": (Pool(name="big", memory_gb=64),)})
    assert room.with_baseline(Job(model="m"), LARGE, pooled).baseline == "fp32"
    with pytest.raises(UsageError, match="work pools"):
        room.with_baseline(OWN, LARGE, pooled)


HOLD = """
import pathlib, time
home, held = pathlib.Path({home!r}), b"x" * 80_000_000
for name, mb in (("work/bot/int4/big", 3), ("variants/int4/model.onnx", 5), ("mlflow/big", 7)):
    (home / name).parent.mkdir(parents=True)
    (home / name).write_bytes(b"x" * mb * 1_000_000)
(home / "blobs").mkdir()
(home / "blobs" / "model").hardlink_to(home / "variants/int4/model.onnx")
(home / "checkpoints" / "staged").hardlink_to(home / "the user's")
time.sleep(1.5)
(home / "work/bot/int4/big").unlink()
"""


def test_what_a_job_takes_at_most(settings: Settings) -> None:
    """A child with 80 MB, and 3 MB of work; variants and the files of servers do not count, nor what was there."""
    settings.checkpoints.mkdir(parents=True)
    (settings.checkpoints / "before").write_bytes(b"x" * 11_000_000)
    (settings.home / "the user's").write_bytes(b"x" * 13_000_000)  # as if it was elsewhere
    own_mb = psutil.Process().memory_info().rss / 1e6
    argv = [sys.executable, "-S", "-c", HOLD.format(home=str(settings.home))]
    with room.watched(settings) as peaks:
        child_mb = children.run(argv, log=settings.logs / "log", timeout_s=60).memory_peak_mb
    assert peaks["disk_peak_mb"] == pytest.approx(3, abs=0.1)
    assert child_mb + own_mb / 2 < peaks["memory_peak_mb"] < child_mb + own_mb + 100
    assert not children.watchers
