"""Everything that is deployed, against a snapshot: what users see and have in scripts changes knowingly.

``SNAPSHOT=write python -m pytest tests/unit/deployments/test_deployments.py`` renews it; the commit explains the
difference.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
SNAPSHOT = Path(__file__).with_name("deployments.txt")
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]


def flow(deployment: dict[str, Any]) -> Any:
    return resolve_name(deployment["entrypoint"])


def form(deployment: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of the form of a deployment's Run button with its path."""
    schema = flow(deployment).parameters.model_dump()
    return fields(schema, schema["definitions"] or {}, path)


def fields(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field of a JSON schema with its path, those of the models in it included."""
    for name, field in schema["properties"].items():
        references = [one["$ref"] for one in (field, *field.get("allOf", ()), *field.get("anyOf", ())) if "$ref" in one]
        models = [definitions[reference.rpartition("/")[2]] for reference in references]
        here = f"{path}.{name}"
        if models and "properties" in models[0]:
            assert models[0]["additionalProperties"] is False, f"{here} takes misspelt fields"
            yield from fields(models[0], definitions, here)
        else:
            field = {**field, **(models[0] if models else {})}
            yield here, {**field, "required": name in schema.get("required", ())}


def lines(deployment: dict[str, Any]) -> Iterator[str]:
    """A deployment in lines that a person can review: its settings, then each field of its form, without its help."""
    settings = {key: value for key, value in deployment.items() if key != "name"}
    settings["work_pool"] = settings["work_pool"]["name"]
    name = deployment["name"]
    for key, value in settings.items():
        for one in value if key in ("schedules", "triggers") else [value]:
            yield f"{name} {key} = {one if isinstance(one, str) else json.dumps(one, sort_keys=True)}"
    for path, field in form(deployment, name):
        of_value = {key: value for key, value in field.items() if key not in ("title", "description", "position")}
        yield f"{path} ({field['title']}): {json.dumps(of_value, sort_keys=True)}"


def test_nothing_that_is_deployed_has_changed() -> None:
    text = "\n".join(line for deployment in DEPLOYMENTS for line in (*lines(deployment), ""))
    if os.environ.get("SNAPSHOT") == "write":
        SNAPSHOT.write_text(text, encoding="utf-8")
    assert SNAPSHOT.read_text(encoding="utf-8").splitlines() == text.splitlines()


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda one: one["name"])
def test_the_form_can_be_filled_in_without_the_manual(deployment: dict[str, Any]) -> None:
    found = dict(form(deployment))
    assert found
    for name, field in found.items():
        assert field.get("title"), name
        assert field.get("description"), f"{name} has no help"
    if filled_in := deployment.get("parameters"):
        assert flow(deployment).validate_parameters(filled_in)
