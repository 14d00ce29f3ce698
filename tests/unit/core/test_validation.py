"""Pydantic's errors in our own words."""

import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Self

import pytest
from pydantic import BaseModel, Field, Json, TypeAdapter, ValidationError, model_validator

from slmops.core.settings import Settings
from slmops.core.validation import problems
from slmops.core.values import Name


class Pair(BaseModel):
    low: int
    high: int

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


def refused(kind: Any, value: Any) -> ValidationError:
    """What pydantic says of a value."""
    with pytest.raises(ValidationError) as raised:
        TypeAdapter(kind).validate_python(value)
    return raised.value


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (bool, "maybe", "it must be true or false"),
        (datetime, "soon", "it must be a date and time"),
        (dict[str, int], 1, "it must be a table of keys and values"),
        (Pair, 1, "it must be a table of keys and values"),
        (Pair, {"low": 2, "high": 1}, "low is above high"),
        (list[Pair], [{"low": 2, "high": 1}], "0 low is above high"),
        (float, "much", "it must be a number"),
        (Annotated[float, Field(allow_inf_nan=False)], math.nan, "it must be a finite number"),
        (int, 1.5, "it must be a whole number"),
        (Path, 1, "it must be a path"),
        (tuple[int, ...], 1, "it must be a list"),
        (Annotated[str, Field(min_length=3)], "ab", "it must have at least 3 characters"),
        (Annotated[str, Field(max_length=3)], "abcd", "it must have at most 3 characters"),
        (Annotated[list[int], Field(max_length=1)], [1, 2], "it must have at most 1 entries"),
        (Annotated[str, Field(pattern="^a$")], "b", "it must match ^a$"),
        (Annotated[int, Field(lt=3)], 3, "it must be less than 3"),
        (Annotated[int, Field(multiple_of=16)], 3, "it must be a multiple of 16"),  # of which we say nothing ourselves
        (Json[int], "", "it is not valid JSON: EOF while parsing a value at line 1 column 0"),
    ],
)
def test_words(kind: Any, value: Any, said: str) -> None:
    assert problems(refused(kind, value)) == [said]


def test_all_that_is_wrong_is_named_in_the_callers_words() -> None:
    error = refused(list[Pair], [{"low": "x", "high": 1}, {"low": 1}])
    assert problems(error, name=lambda location: f"pair {location[0]}, {location[1]},") == [
        "pair 0, low, must be a whole number",
        "pair 1, high, is missing",
    ]


def test_a_value_is_quoted_on_request_and_not_at_any_length() -> None:
    [said] = problems(refused(Name, "../x"), got=True)
    assert said.endswith("must begin with a letter or a digit (got '../x')")
    [said] = problems(refused(int, "9" * 100 + "x"), got=True)
    assert said.endswith("999...)")
    assert len(said) < 130


def test_a_password_in_an_address_is_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_JUDGE_URL", "http://me:secret@judge/v1")
    with pytest.raises(ValidationError) as raised:
        Settings()
    [said] = problems(raised.value, got=True)
    assert said.startswith("judge_url must be an http:// or https:// address")
    assert "secret" not in said
