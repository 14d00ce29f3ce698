"""How a retraining ends, and when the next one is due."""

from itertools import pairwise

from slmops.core.values import Measurement
from slmops.selection import policy
from slmops.training import answers
from slmops.training.values import DAY_S, DEFAULT_POLICY, FIRST_REPEAT_S, Retrained, Seen


def test_a_fine_tuning_may_not_make_it_worse() -> None:
    low, high = (Measurement(value=value, unit="1") for value in (0.4, 0.5))
    assert "0.50 before it, 0.40 after it" in str(answers.worse(high, low))
    assert answers.worse(high, high) is answers.worse(low, high) is None


def test_the_policy_that_ships_can_be_read() -> None:
    gates = [f"{gate.metric} to {gate.to}" for gate in policy.load(DEFAULT_POLICY).gates]
    assert gates == ["accuracy to baseline", "perplexity to baseline", "accuracy to champion"]


def test_the_text_has_accuracy_and_times() -> None:
    base = Measurement(value=0.1, unit="1", samples=60, low=0.05, high=0.2)
    accuracy = {"base": base, "int4": Measurement(value=1.0, unit="1", samples=1)}
    told = {"outcome": "promoted", "detail": "It is good.", "accuracy": accuracy, "seconds": {"fine-tune": 61.6}}
    lines = Retrained(model="bot", input_digest="a", run_id="r", url="-", **told).text.splitlines()
    assert lines[0] == "promoted: It is good."
    said = [" ".join(line.split()) for line in lines if line.startswith(("base", "int4", "fine-tune"))]
    assert said == ["base 0.10 [0.05, 0.20] 60", "int4 1.00 1", "fine-tune 62"]


def test_data_are_new_until_a_retraining_has_used_them() -> None:
    assert Seen(version=3).look_at_data("a", None, 0) == (Seen(version=3, data="a"), False)  # nothing at the first look
    seen, is_told = Seen(data="a").look_at_data("b", "a", 0)
    assert is_told
    assert (seen.data, seen.told) == ("a", "b")
    # That retraining was cancelled or failed.
    seen, is_told = seen.look_at_data("b", "a", 3600)
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
