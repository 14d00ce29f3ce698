"""Which names of flow runs a person has given."""

from prefect.utilities.names import generate_slug

from flows.running import is_made_up


def test_names_that_nobody_gave_and_those_of_a_person() -> None:
    names = ["", "amber-fox", "quick-witted-kumquat", "self-disciplined-puppy", *(generate_slug(2) for _ in range(500))]
    assert [name for name in names if not is_made_up(name)] == []
    given = ["nightly-test", "Before the Friday meeting", "fox", "demo", "qwen-2-fox-3", "-"]
    assert [name for name in given if is_made_up(name)] == []
