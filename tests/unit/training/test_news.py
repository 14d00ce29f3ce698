"""What is remembered of the looks at training data, and when an event is due."""

from __future__ import annotations

from itertools import pairwise

from slmops.training.news import DAY_S, FIRST_REPEAT_S, Seen

HOUR = 3600.0


def test_data_are_new_until_a_retraining_has_used_them() -> None:
    assert Seen(version=3).look_at_data("a", None, 0) == (Seen(version=3, data="a"), False)  # nothing at the first look
    seen, is_told = Seen(data="a").look_at_data("b", "a", 0)
    assert is_told
    assert (seen.data, seen.told) == ("a", "b")
    # That retraining was cancelled or failed.
    seen, is_told = seen.look_at_data("b", "a", HOUR)
    assert is_told
    seen, is_told = seen.look_at_data("b", "b", DAY_S)
    assert (seen, is_told) == (Seen(data="b"), False)
    # Back to the old ones: the last retraining did not use those.
    assert seen.look_at_data("a", "b", DAY_S)[1]


def test_an_event_that_leads_to_nothing_is_repeated_more_and_more_rarely() -> None:
    seen, times = Seen(data="a"), []
    for now in range(0, 7 * DAY_S, 300):
        seen, is_told = seen.look_at_data("b", None, now)
        if is_told:
            times.append(now)
    pauses = [after - before for before, after in pairwise(times)]
    other, is_told = seen.look_at_data("c", None, times[-1] + 1)  # other new data are told at once
    assert (is_told, other.times) == (True, 1)
    assert pauses[:4] == [FIRST_REPEAT_S * 2**n for n in range(4)]
    assert set(pauses[6:]) == {DAY_S}
