"""Which names of flow runs a person has given."""

import pytest
from prefect.utilities.names import generate_slug

from flows.running import is_made_up


def test_names_that_nobody_gave() -> None:
    names = ["", "amber-fox", "quick-witted-kumquat", "self-disciplined-puppy", *(generate_slug(2) for _ in range(500))]
    assert [name for name in names if not is_made_up(name)] == []


@pytest.mark.parametrize("name", ["nightly-test", "Before the Friday meeting", "fox", "demo", "qwen-2-fox-3", "-"])
def test_names_that_a_person_gave(name: str) -> None:
    assert not is_made_up(name)
