"""What a sweep tries and in which order, when it gives a trial up, and where the knee of the front is."""

from typing import Any

import pytest

from slmops.core.settings import Settings
from slmops.selection import sweep
from slmops.selection.search import Search
from slmops.selection.sweep import Trial

CHOICES: dict[str, dict[str, list[Any]]] = {
    "int4": {"q.group_size": [32, 16, 64], "q.overrides": [{"head": {"bits": 8}}, {}]},
    "int8": {},
}
FIRST = [("int4", {"q.group_size": 32, "q.overrides": {"head": {"bits": 8}}}), ("int8", {})]
ALL = 7


def measured(number: int, size: float, kl: float, first: float | None = None) -> Trial:
    metrics = {"size_mb": size, "kl_mean": kl, "first_kl": kl if first is None else first}
    return Trial(number=number, recipe="int4", options={"n": number}, outcome="measured", metrics=metrics)


def search(settings: Settings, name: str = "bot 1") -> Search:
    return Search(name, CHOICES, settings)


def end(trial: Trial, outcome: str = "measured") -> Trial:
    metrics = {"size_mb": 100.0, "kl_mean": 0.1, "first_kl": 0.1} if outcome == "measured" else {}
    return trial.model_copy(update={"outcome": outcome, "metrics": metrics})


def test_each_combination_is_tried_once_beginning_with_the_recipes_themselves(settings: Settings) -> None:
    one = search(settings)
    tried = []
    for outcome in ("measured", "stopped", "failed", "measured", "measured", "measured", "measured"):
        trial = one.ask()
        one.tell(end(trial, outcome))
        tried.append(trial)
    assert [(trial.recipe, trial.options) for trial in tried[:2]] == FIRST
    assert len({trial.variant for trial in tried}) == ALL
    assert all(value in CHOICES[trial.recipe][name] for trial in tried for name, value in trial.options.items())
    assert one.ask() is None
    # As often as it is opened; another search begins anew.
    again = search(settings)
    assert [(one.variant, one.outcome) for one in again.trials][1:3] == [
        (tried[1].variant, "stopped"),
        (tried[2].variant, "failed"),
    ]
    assert again.ask() is None
    assert search(settings, "bot 2").trials == []


def test_what_was_under_way_when_a_sweep_was_killed_is_tried_next(settings: Settings) -> None:
    killed = search(settings)
    first = killed.ask()
    killed.tell(end(first))
    under_way = killed.ask()
    again = search(settings)
    seen = again.ask()
    again.tell(end(seen))
    assert [one.variant for one in again.trials] == [first.variant, seen.variant]
    assert (seen.recipe, seen.options) == (under_way.recipe, under_way.options)


TRIALS = [measured(0, 150, 0.004), measured(1, 100, 0.06), measured(2, 90, 0.5), measured(3, 110, 0.07)]
FAILED = Trial(number=4, recipe="int4", options={}, outcome="failed")


def test_the_front_has_what_nothing_beats_and_the_knee_is_far_below_the_line_between_its_ends() -> None:
    found = sweep.front([*TRIALS, FAILED, measured(5, 100, 0.06)])
    assert [one.number for one in found] == [2, 1, 0]
    # In scaled logarithms trial 1 is at (0.21, 0.56), the ends at (0, 1) and (1, 0).
    assert sweep.knee(found) == TRIALS[1]
    assert sweep.knee([TRIALS[0]]) == TRIALS[0]
    assert sweep.knee([]) is None
    exact = measured(6, 500, 0)  # as fp32 is
    assert sweep.knee(sweep.front([*TRIALS, exact])) in TRIALS


@pytest.mark.parametrize(
    ("size", "first_kl", "why"),
    [
        (150, 0.0079, None),
        (150, 0.0081, "trial 0 is no larger, with a KL divergence of 0.004 against 0.0081"),
        (149, 0.11, None),  # the closest of those that are no larger is trial 1
        (100, 0.13, "trial 1 is no larger"),
        (89, 9.0, None),
    ],
)
def test_a_trial_is_given_up_if_one_that_is_no_larger_is_twice_as_close(
    size: float, first_kl: float, why: str | None
) -> None:
    said = sweep.why_hopeless([*TRIALS, FAILED], {"size_mb": size, "first_kl": first_kl})
    assert said == why or (why is not None and why in str(said))
