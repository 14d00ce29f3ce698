"""Recipes as files: those that come with slmops, and the user's own in ``recipes/`` of the home, in TOML or JSON."""

import copy
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from slmops.core.errors import RecipeError
from slmops.core.files import read_table
from slmops.core.job import CHECKPOINT, SHIPPED
from slmops.core.names import is_name
from slmops.core.settings import Settings
from slmops.core.targets import CPU, TargetName, split
from slmops.core.validation import dotted, problems
from slmops.core.values import Frozen

FOLDER = Path(__file__).with_name("shipped")
# What a variant cannot be called: an alias of the registry, or something else of a comparison.
_TAKEN = {*SHIPPED, CHECKPOINT, "champion", "previous", "latest"}


class RecipeFile(Frozen):
    """What a recipe's file says. Its name is that of the file."""

    when: str = Field(min_length=1, description="One sentence: when to take it.")
    bits: Literal[4, 8, 16, 32] | None = Field(None, description="Bits that most weights must have; None: not checked.")
    passes: dict[str, dict[str, Any]] = Field(min_length=1, description="Olive's passes in their order.")
    targets: tuple[TargetName, ...] = Field((CPU,), min_length=1, description="What it makes sense for.")
    gpu: dict[str, dict[str, Any]] = Field({}, description="Its passes for a GPU; empty: those for the CPU.")
    genai: dict[str, Any] = Field({}, description="Settings of the runtime that are put into genai_config.json.")
    sweep: dict[str, dict[str, Any]] = Field({}, description="By pass and option, the values that a sweep tries.")

    @field_validator("passes", "gpu")
    @classmethod
    def _named(cls, passes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, step in passes.items():
            if not isinstance(step.get("type"), str):
                raise ValueError(f'needs the type of each pass: {name} has none, such as type = "ModelBuilder"')
        return passes

    @field_validator("sweep")
    @classmethod
    def _of_passes(cls, sweep: dict[str, dict[str, Any]], info: ValidationInfo) -> dict[str, dict[str, Any]]:
        passes = info.data.get("passes", sweep)
        if unknown := [name for name in sweep if name not in passes]:
            raise ValueError(f"has {unknown[0]}, which is none of its passes: {', '.join(passes)}")
        for place, values in _leaves(sweep):
            if not isinstance(values, list) or not values:
                raise ValueError(f"needs a list of values: {dotted(place)} is {values!r}")
        return sweep

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The values that a sweep tries, by option: ``quantize.group_size`` to ``[16, 32]``."""
        return {dotted(place): values for place, values in _leaves(self.sweep)}

    @property
    def own(self) -> dict[str, Any]:
        """Its own values of the options of :attr:`choices`; None: it leaves that to the pass."""
        found = {}
        for place, _ in _leaves(self.sweep):
            value: Any = self.passes
            for key in place:
                value = value.get(key) if isinstance(value, dict) else None
            found[dotted(place)] = value
        return found

    def with_options(self, options: dict[str, Any]) -> Self:
        """The recipe with one value each of some of its :attr:`choices`, and without them."""
        passes: dict[str, Any] = copy.deepcopy(self.passes)
        for (*tables, option), _ in _leaves(self.sweep):
            table = passes
            for key in tables:
                table = table.setdefault(key, {})
            if (name := dotted([*tables, option])) in options:
                table[option] = options[name]
        return self.model_copy(update={"passes": passes, "sweep": {}})

    @property
    def chain(self) -> tuple[str, ...]:
        """The types of its passes."""
        return tuple(step["type"] for step in self.passes.values())


def find(settings: Settings) -> dict[str, Path]:
    """The files of all recipes by name, the shipped ones first; a RecipeError if a file cannot have its name."""
    found = {name: FOLDER / f"{name}.toml" for name in SHIPPED}
    for path in sorted(settings.recipes.glob("[!.]*")):
        if path.suffix in (".toml", ".json"):
            _check_name(path)
            if path.stem in found:
                raise RecipeError(f"{path} and {found[path.stem].name} have one name.", "Rename one of them.")
            found[path.stem] = path
    return found


def place_of(name: str, settings: Settings) -> Path:
    """The file of a new recipe; a RecipeError if there is one of this name, or if it cannot have it."""
    path = settings.recipes / f"{name}.json"
    _check_name(path)
    if name in find(settings):
        raise RecipeError(f"There is a recipe {name!r} already.", "Take another name, or remove its file.")
    return path


def _check_name(path: Path) -> None:
    precision, target = split(path.stem)
    if target != CPU:
        said = f"{path}: {path.stem!r} is what {precision!r} is called for the target {target}."
        raise RecipeError(said, f'Give the file another name, and put targets = ["{target}"] into it.')
    if path.stem in _TAKEN or not is_name(path.stem) or re.fullmatch(r"v\d+", path.stem):
        raise RecipeError(
            f"{path}: a recipe of your own cannot be called {path.stem!r}.",
            f"Give the file another name, of letters, digits, - and _, and none of {', '.join(sorted(_TAKEN))}.",
        )


def load(name: str, settings: Settings) -> RecipeFile:
    """The recipe of a variant of this name, with the passes for its target; a RecipeError if there is none, or if its
    file is broken."""
    name, target = split(name)
    known = find(settings)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        fix = f"Known are {', '.join(known)}; one of your own is a file in {settings.recipes}."
        raise RecipeError(f"There is no recipe {name!r}.{hint}", fix)
    table = read_table(known[name], "recipe")
    try:
        file = RecipeFile.model_validate(table)
    except ValidationError as error:
        raise RecipeError(f"{known[name]}: {'; '.join(problems(error))}.", "Correct it; see docs/recipes.md.") from None
    return file if target == CPU or not file.gpu else file.model_copy(update={"passes": file.gpu})


def _leaves(table: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is in a table and in the tables within it, each with its keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*place, key))
        else:
            yield (*place, key), value
