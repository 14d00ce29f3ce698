"""Which version is meant, and what speaks against it; the registry and the tracking server are stand-ins here."""

from types import SimpleNamespace
from typing import Any

import pytest

from slmops.core.errors import UsageError
from slmops.core.values import Choice, Measurement, VariantResult
from slmops.delivery import promotion
from slmops.foundry.versions import ModelVersion, Promoted, Promotion
from slmops.selection.policy import Gate, Policy
from tests import values

ACCURACY = Gate(metric="accuracy", of="difference", to="champion", min=-0.1, inconclusive="accept")
CHAMPION = values.model_version(1, variant="fp32")


def tracker(
    *results: VariantResult,
    chosen: str | None = "int8",
    differs: tuple[str, ...] = (),
    gates: tuple[Gate, ...] = (ACCURACY,),
    champions_machine: str = "this machine",
) -> Any:
    """The tracking server, as far as a promotion of run 2 in place of run 1 asks it."""
    comparison = values.comparison(*results, chosen=chosen, reason="Nothing passes.")
    figures = {"accuracy": Measurement(value=0.8, unit="1", samples=40, low=0.75, high=0.85)}
    return SimpleNamespace(
        latest={"bot": comparison}.__getitem__,
        judged={"job-2": (comparison, Policy(gates=gates))}.__getitem__,
        champion=lambda *asked: {("bot", "run-2"): figures}[asked],
        differences=lambda *asked: {("run-2", "run-1"): differs}[asked],
        hardware_kind={"run-1": champions_machine, "run-2": "this machine"}.__getitem__,
    )


def pick(request: Promotion, server: Any) -> ModelVersion:
    """With a registry that finds whatever it is asked for."""
    registry: Any = SimpleNamespace(
        find=lambda name, which: values.model_version(int(which), name=name),
        newest=lambda name, variant: values.model_version(9, name=name, variant=variant),
    )
    return promotion.pick(registry, server, request)


def judge(server: Any, champion: ModelVersion | None = CHAMPION) -> promotion.Decision:
    return promotion.judge(server, values.model_version(2, variant="int8"), champion)


def measured(accuracy: float, **changes: Any) -> VariantResult:
    made = values.result("int8", 100, accuracy=accuracy, spread=0.05)
    return made.model_copy(update={"run_id": "run-2", **changes})


def test_the_choices_for_other_targets_come_along_and_one_that_is_refused_refuses_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = {3: "webgpu", 4: "cuda"}
    others = [measured(0.8, name=f"int4-{target}", version=number) for number, target in targets.items()]
    server = tracker(measured(0.8, version=2), *others)
    choices = {target: Choice(variant=f"int4-{target}", reason="") for target in targets.values()}
    judged = server.judged("job-2")[0].model_copy(update={"other_choices": choices}), Policy(gates=(ACCURACY,))
    server.judged = {f"job-{number}": judged for number in (2, 3, 4)}.__getitem__
    found = SimpleNamespace(
        find=lambda _, which: values.model_version(int(which), run_id="run-2", job_id="job-2", variant=names[which]),
        champion=lambda _: CHAMPION,
        release=lambda one: [one, deployed],
    )
    names = {"2": "int8", "3": "int4-webgpu", "4": "int4-cuda"}
    deployed = values.model_version(9, variant="fp16-webgpu", run_id="run-1")
    monkeypatch.setattr(promotion, "Registry", lambda _: found)
    monkeypatch.setattr(promotion, "Tracker", lambda _: server)
    decision = promotion.decide("uri", Promotion(name="bot", version=2))
    against = [(one.challenger.version, one.champion and one.champion.version) for one in decision.others]
    assert against == [(3, 9), (4, 1)]  # what is deployed for the same target, or else for the first
    assert not decision.against
    assert "With it: bot version 3 (int4-webgpu), bot version 4" in promotion.text(decision, Promotion(name="bot"))
    refused = decision.others[0].model_copy(update={"differs": ("text",)})
    assert "int4-webgpu: bot version 9" in decision.model_copy(update={"others": (refused,)}).against[0]
    assert promotion.decide("uri", Promotion(name="bot", version=4)).others == ()  # which is asked for alone


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param({}, (4, "int8"), id="the choice"),
        pytest.param({"version": 7}, (7, "int8"), id="a number"),
        pytest.param({"precision": "int4"}, (9, "int4"), id="a precision"),
        pytest.param({"precision": "4"}, (9, "4"), id="a variant that is called by a number"),
    ],
)
def test_the_version_that_is_meant(asked: dict[str, Any], expected: tuple[int, str]) -> None:
    found = pick(Promotion(name="bot", **asked), tracker(measured(0.5, version=4)))
    assert (found.name, found.version, found.variant) == ("bot", *expected)


def test_nothing_to_promote_or_two_ways_to_name_it_or_an_evaluation_that_is_not_in_its_job() -> None:
    for chosen in (None, "int8"):  # nothing was chosen, or before there was a registry
        with pytest.raises(UsageError, match=r"(?s)Nothing passes.*--precision"):
            pick(Promotion(name="bot"), tracker(measured(0.5), chosen=chosen))
    with pytest.raises(UsageError, match="--precision and --version"):
        pick(Promotion(name="bot", precision="int8", version=3), tracker())
    with pytest.raises(UsageError, match=r"bot version 2 \(int8\)"):
        judge(tracker(measured(0.9, run_id="another")), None)


@pytest.mark.parametrize(
    ("accuracy", "refused"), [(0.9, False), (0.75, False), (0.65, True)], ids=["better", "within the margin", "worse"]
)
def test_the_margin_of_the_policy_decides(accuracy: float, refused: bool) -> None:
    decision = judge(tracker(measured(accuracy)))
    assert decision.elsewhere is None
    assert "note:" not in promotion.text(decision, Promotion(name="bot"))
    error = promotion.refuse(decision)
    assert (error is not None) == refused
    if error is not None:
        assert "bot version 2 (int8)" in error.message
        assert "accuracy differs from the champion's by -0.15" in error.message
        assert "slmops promote bot --version 2 --force REASON" in (error.fix or "")
        assert "Against it:" in promotion.text(decision, Promotion(name="bot"))


def test_the_first_version_has_nobody_to_beat() -> None:
    decision = judge(tracker(measured(0.1)), None)
    assert [gate.outcome for gate in decision.gates] == ["skipped"]
    assert promotion.refuse(decision) is None
    said = promotion.text(decision, Promotion(name="bot", force="why not"))
    assert "nothing is deployed yet" in said
    assert "Nothing speaks against it." in said
    assert "Forced: why not" in said


def test_what_was_measured_with_other_things_is_not_compared() -> None:
    differs = ("evaluation set", "perplexity text")
    decision = judge(tracker(measured(0.9), differs=differs))
    assert decision.differs == differs
    error = promotion.refuse(decision)
    not_same = "were not measured with the same evaluation set and perplexity text, so they cannot be compared"
    assert f"bot version 1 (fp32) and bot version 2 (int8) {not_same}" in error.message
    assert "Measure bot version 1 (fp32) with the same" in str(error.fix)


SPEED = Gate(metric="decode_tok_s", of="ratio", to="champion", min=0.8)


@pytest.mark.parametrize(("doubt", "refused"), [("accept", False), ("refuse", True)])
def test_speeds_of_two_kinds_of_machine_are_not_compared(doubt: Any, refused: bool) -> None:
    gates = (ACCURACY, SPEED.model_copy(update={"inconclusive": doubt}))
    decision = judge(tracker(measured(0.8), gates=gates, champions_machine="a small one"))
    kinds = "another kind of machine (a small one; not this machine)"
    note = f"The speed of the champion was measured on {kinds}: speeds are not compared."
    assert (decision.elsewhere, decision.differs) == (note, ())
    assert f"\n- note: {note}\n" in promotion.text(decision, Promotion(name="bot"))
    assert [gate.outcome for gate in decision.gates] == ["pass", "inconclusive"]
    assert decision.gates[1].detail == "decode_tok_s was not measured of the champion"
    assert (promotion.refuse(decision) is not None) == refused


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"replaced": 1}, "bot version 2 (int8) is the champion now, in place of version 1."),
        ({"replaced": None}, "bot version 2 (int8) is the champion now."),
        ({"changed": False}, "bot version 2 (int8) is the champion already."),
    ],
)
def test_the_result_in_a_sentence(changes: dict[str, Any], text: str) -> None:
    fields = {"model": "bot", "version": 2, "variant": "int8", "replaced": 1, "changed": True, "url": "u", **changes}
    assert Promoted(**fields).text == text
