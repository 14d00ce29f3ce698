"""Kinds of machine, whose speeds compare."""

from __future__ import annotations

from typing import Any

import pytest

from slmops.core.values import Hardware


def hardware(**changes: Any) -> Hardware:
    fields = {
        "system": "Linux 6.8.0-45",
        "machine": "x86_64",
        "processor": "Some  CPU @ 2.60GHz",
        "cores": 8,
        "memory_gb": 32.0,
        "isa": ("avx", "avx2"),
        **changes,
    }
    return Hardware(**fields)


def test_a_kind_in_words() -> None:
    assert hardware().kind == "Some CPU @ 2.60GHz (Linux x86_64), 8 cores, avx avx2"
    bare = hardware(processor="aarch64", machine="aarch64", isa=(), cores=1)
    assert bare.kind == "aarch64 (Linux aarch64), 1 cores, no extensions"


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"system": "Linux 6.11.2"}, True),
        ({"memory_gb": 64.0}, True),
        ({"processor": "Some CPU @ 2.60GHz "}, True),
        ({"system": "Windows 11"}, False),
        ({"machine": "aarch64"}, False),
        ({"processor": "Other CPU"}, False),
        ({"cores": 4}, False),
        ({"isa": ("avx", "avx2", "avx512f")}, False),
    ],
)
def test_machines_of_one_kind(changes: dict[str, Any], same: bool) -> None:
    assert (hardware(**changes).kind == hardware().kind) == same
