"""How a retraining ends."""

from __future__ import annotations

from slmops.core.values import Measurement
from slmops.selection import policy
from slmops.training import outcome
from slmops.training.values import Retrained


def test_a_fine_tuning_may_not_make_it_worse() -> None:
    low, high = (Measurement(value=value, unit="1") for value in (0.4, 0.5))
    assert "0.50 before it, 0.40 after it" in str(outcome.worse(high, low))
    assert outcome.worse(high, high) is outcome.worse(low, high) is None


def test_the_policy_that_ships_can_be_read() -> None:
    gates = [f"{gate.metric} to {gate.to}" for gate in policy.load(outcome.DEFAULT_POLICY).gates]
    assert gates == ["accuracy to baseline", "perplexity to baseline", "accuracy to champion"]


def test_the_text_has_accuracy_and_times() -> None:
    base = Measurement(value=0.1, unit="1", samples=60, low=0.05, high=0.2)
    accuracy = {"base": base, "int4": Measurement(value=1.0, unit="1", samples=1)}
    told = {"outcome": "promoted", "detail": "It is good.", "accuracy": accuracy, "seconds": {"fine-tune": 61.6}}
    lines = outcome.text(Retrained(model="bot", input_digest="a", run_id="r", url="-", **told)).splitlines()
    assert lines[0] == "promoted: It is good."
    said = [" ".join(line.split()) for line in lines if line.startswith(("base", "int4", "fine-tune"))]
    assert said == ["base 0.10 [0.05, 0.20] 60", "int4 1.00 1", "fine-tune 62"]
