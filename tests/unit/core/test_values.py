"""Kinds of machine, whose speeds compare."""

from typing import Any

import pytest

from slmops.core.values import Hardware

KIND = "Some CPU @ 2.60GHz (Linux x86_64), 8 cores, avx avx2"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, KIND),
        ({"system": "Linux 6.11.2", "memory_gb": 64.0, "processor": "Some CPU @ 2.60GHz "}, KIND),
        ({"system": "Windows 11"}, KIND.replace("Linux", "Windows")),
        ({"isa": ("avx", "avx2", "avx512f")}, f"{KIND} avx512f"),
        (
            {"processor": "aarch64", "machine": "aarch64", "isa": (), "cores": 1},
            "aarch64 (Linux aarch64), 1 cores, no extensions",
        ),
    ],
)
def test_machines_of_one_kind(changes: dict[str, Any], kind: str) -> None:
    fields = {"system": "Linux 6.8.0-45", "machine": "x86_64", "processor": "Some  CPU @ 2.60GHz", "cores": 8}
    assert Hardware(**{**fields, "memory_gb": 32.0, "isa": ("avx", "avx2"), **changes}).kind == kind
