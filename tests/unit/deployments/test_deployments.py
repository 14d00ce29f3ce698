"""Everything that is deployed, against a snapshot: what users see and have in scripts changes knowingly.

``SNAPSHOT=write python -m pytest tests/unit/test_deployments.py`` renews it; the commit explains the difference.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
SNAPSHOT = Path(__file__).with_name("deployments.json")
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
NAMES = [deployment["name"] for deployment in DEPLOYMENTS]


def flow_of(deployment: dict[str, Any]) -> Any:
    module, _, name = deployment["entrypoint"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """Each deployment with the schema that its form is made of."""
    return {
        one["name"]: {**one, "schema": flow_of(one).parameters.model_dump(exclude={"definitions"})}
        | {"definitions": flow_of(one).parameters.definitions}
        for one in DEPLOYMENTS
    }


def test_nothing_that_is_deployed_has_changed(shown: dict[str, Any]) -> None:
    text = json.dumps(shown, indent=1, sort_keys=True) + "\n"
    if os.environ.get("SNAPSHOT") == "write":
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert json.loads(SNAPSHOT.read_text(encoding="utf-8")) == json.loads(text)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_the_form_can_be_filled_in_without_the_manual(deployment: dict[str, Any]) -> None:
    schema = flow_of(deployment).parameters.model_dump()
    fields = dict(_fields(schema))
    assert fields
    for name, field in fields.items():
        assert field.get("title"), name
        assert field.get("description"), f"{name} has no help"


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_what_is_filled_in_is_valid(deployment: dict[str, Any]) -> None:
    if parameters := deployment.get("parameters"):
        assert flow_of(deployment).validate_parameters(parameters)


def test_what_starts_by_itself_is_switched_off_at_first() -> None:
    schedules = {one["name"]: one.get("schedules", []) for one in DEPLOYMENTS}
    triggers = [trigger for one in DEPLOYMENTS for trigger in one.get("triggers", [])]
    assert {name for name, of in schedules.items() if of} == {"retrain", "look-for-news", "soak", "remeasure"}
    assert not any(schedule["active"] for of in schedules.values() for schedule in of)
    assert {event for trigger in triggers for event in trigger["expect"]} == {"slmops.data.new", "slmops.version.new"}
    assert not any(trigger["enabled"] for trigger in triggers)


def test_what_measures_never_runs_twice_at_once() -> None:
    limits = {one["name"]: one["concurrency_limit"] for one in DEPLOYMENTS if "measures" in one["tags"]}
    assert {limit["limit"] for limit in limits.values()} == {1}
    assert limits["retrain"]["collision_strategy"] == "CANCEL_NEW"


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields of a form, those of the models in it included."""
    definitions = schema.get("definitions") or {}
    for name, field in schema["properties"].items():
        model = next((one for one in _models(field, definitions) if "properties" in one), None)
        if model is None:
            yield name, field
        else:
            yield from _fields({**model, "definitions": definitions})


def _models(field: dict[str, Any], definitions: dict[str, Any]) -> Iterator[dict[str, Any]]:
    references = [field, *field.get("allOf", []), *field.get("anyOf", [])]
    for reference in references:
        if "$ref" in reference:
            yield definitions[reference["$ref"].rpartition("/")[2]]
