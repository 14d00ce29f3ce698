"""Why the runtime cannot load models for a device; Foundry Local is a stand-in here."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from slmops.foundry import runtime

CUDA = "CUDAExecutionProvider"


@pytest.mark.parametrize(
    ("known", "fetched", "expected"),
    [
        ([], None, f"Foundry Local finds no device for {CUDA} here"),
        ([True], None, None),
        ([False], True, None),
        ([False], False, f"Foundry Local could not get {CUDA}"),
        ([False], runtime.Fault("no network"), f"Foundry Local could not get {CUDA}: no network"),
    ],
)
def test_a_provider_that_is_not_here_or_cannot_be_fetched_is_named(
    known: list[bool], fetched: bool | Exception | None, expected: str | None
) -> None:
    running = Mock()
    running.discover_eps.return_value = [SimpleNamespace(name=CUDA, is_registered=one) for one in known]
    running.download_and_register_eps.side_effect = [
        fetched if isinstance(fetched, Exception) else SimpleNamespace(success=fetched)
    ]
    assert runtime.missing(running, CUDA) == expected
    assert running.download_and_register_eps.called == (fetched is not None)
    assert runtime.missing(running, "CPUExecutionProvider") is None
