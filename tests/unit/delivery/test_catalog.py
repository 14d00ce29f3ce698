"""What the private catalog offers, and how long it keeps that."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.core.errors import TrackingError, UsageError
from slmops.delivery import catalog
from slmops.foundry.private_catalog import Entry
from slmops.foundry.versions import RELEASE, ModelVersion
from tests.catalogs import FakeRegistry, entry, version


def entries(**models: Any) -> list[Entry]:
    registry: Any = FakeRegistry(**models)
    return catalog.entries(registry)


@pytest.mark.parametrize(
    ("champion", "previous", "expected"),
    [
        (None, None, []),
        (None, version(1), []),
        (version(1), None, [("tiny", "fp32", 1, True)]),
        (version(1), version(1), [("tiny", "fp32", 1, True)]),
        (version(3, "int4"), version(2, "int8"), [("tiny", "int4", 3, True), ("tiny", "int8", 2, False)]),
        (version(2), version(3, "int4"), [("tiny", "fp32", 2, True), ("tiny.previous", "int4", 3, False)]),
    ],
)
def test_entries(champion: ModelVersion | None, previous: ModelVersion | None, expected: Sequence[Any]) -> None:
    found = [(one.alias, one.name, one.version, one.latest) for one in entries(tiny=(champion, previous))]
    assert found == [(alias, f"tiny-{name}-generic-cpu", *others) for alias, name, *others in expected]


def test_a_release_is_offered_for_each_of_its_targets_and_so_is_the_one_before() -> None:
    champion, previous = (version(n, tags={RELEASE: f"{n + 1}"}) for n in (4, 2))
    found = [(one.alias, one.name, one.version, one.device, one.latest) for one in entries(tiny=(champion, previous))]
    assert found == [
        *(("tiny", "tiny-fp32-generic-cpu", 4, "cpu", True), ("tiny", "tiny-fp32-generic-gpu", 5, "gpu", True)),
        *(("tiny", "tiny-fp32-generic-cpu", 2, "cpu", False), ("tiny", "tiny-fp32-generic-gpu", 3, "gpu", False)),
    ]


def test_a_model_that_is_not_ours_hides_no_other_but_a_failure_does(caplog: pytest.LogCaptureFixture) -> None:
    gpu = {"device": "gpu", "provider": "CUDA"}
    able = {"abilities": frozenset({"reasoning", "tools"})}
    expected = entry("tiny-int8", 4, display_name="tiny int8", size_bytes=190_700_000, **gpu, **able)
    tags = {"slmops.abilities": "reasoning tools"}
    foreign = UsageError("Version 1 of foreign was not registered by slmops.")
    assert entries(foreign=foreign, tiny=(version(4, "int8", size_mb=190.7, tags=tags, **gpu), None)) == [expected]
    assert "foreign is not in the catalog: Version 1 of foreign was not registered" in caplog.text
    with pytest.raises(TrackingError, match="down"):
        entries(tiny=TrackingError("down"))


def test_many_requests_read_the_registry_once_and_a_failure_is_kept_no_longer_than_an_answer() -> None:
    read = Mock(side_effect=[TrackingError("down", "slmops up"), [entry("tiny-fp32", 1)], ZeroDivisionError()])
    kept = catalog.Kept(lambda: time.sleep(0.05) or read(), keep_s=0.3)
    for _ in range(3):
        with pytest.raises(TrackingError, match=r"down\n  slmops up"):
            kept()
    time.sleep(0.35)
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda _: kept()[0].version, range(20))) == [1] * 20
    time.sleep(0.35)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden behind what was
        kept()
