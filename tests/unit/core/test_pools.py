"""Which work pool a job fans out to."""

import pytest
from pydantic import ValidationError

from slmops.core.errors import PrerequisiteError
from slmops.core.pools import Pool, choose, conversion_memory
from slmops.core.settings import Settings
from tests import values

SMALL, LARGE, HUGE = (Pool(name=name, memory_gb=gb) for name, gb in (("small", 8), ("large", 64), ("huge", 512)))


@pytest.mark.parametrize(
    ("parameters", "taken"), [(135_000_000, SMALL), (909_000_000, SMALL), (910_000_000, LARGE), (8_000_000_000, HUGE)]
)
def test_the_smallest_pool_that_is_large_enough_is_taken(parameters: int, taken: Pool) -> None:
    checkpoint = values.checkpoint(parameters=parameters)
    assert conversion_memory(checkpoint) == pytest.approx(8.8 * parameters)  # of one conversion in fp32
    twin = Pool(name="a", memory_gb=8)  # of two of one size the first is taken
    assert choose([HUGE, SMALL, LARGE, twin], checkpoint, "cpu") == taken


@pytest.mark.parametrize(("parameters", "device"), [(70_000_000_000, "cpu"), (1000, "gpu")])
def test_need_and_pools_are_named_where_none_fits(parameters: int, device: str) -> None:
    with pytest.raises(PrerequisiteError, match="No work pool can convert tiny") as caught:
        choose([SMALL, LARGE], values.checkpoint(parameters=parameters), device)
    need = f"about {parameters * 8.8 / 1e9:.1f} GB of memory on a {device} machine"
    assert need in caught.value.message
    assert "small (8 GB, cpu), large (64 GB, cpu)" in caught.value.message
    assert "SLMOPS_POOLS" in (caught.value.fix or "")


def test_pools_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, pools in (("", ()), ("  ", ()), ('[{"name": "small", "memory_gb": 8}]', (SMALL,))):
        monkeypatch.setenv("SLMOPS_POOLS", text)
        assert Settings().pools == pools


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("small", "is not JSON"),
        ('{"name": "small"}', "valid tuple"),
        ('[{"name": "small", "memory_gb": 0}]', "greater than 0"),
        ('[{"name": "a/b", "memory_gb": 1}]', "match pattern"),
        ('[{"name": "a", "memory_gb": 1, "device": "tpu"}]', "'cpu'"),
        ('[{"name": "a", "memory_gb": 1}, {"name": "a", "memory_gb": 2}]', "names a more than once"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.setenv("SLMOPS_POOLS", text)
    with pytest.raises(ValidationError, match=said):
        Settings()
