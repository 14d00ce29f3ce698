"""The house rules that a machine can check: rooms, their size, and one meaning for each name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = [path for folder in ("slmops", "flows", "tasks") for path in sorted((ROOT / folder).rglob("*.py"))]
PACKAGES = sorted(path.parent for path in (ROOT / "slmops").rglob("__init__.py") if any(path.parent.glob("[!_]*.py")))
MOST_LINES = 400
MOST_MODULES = 10


def test_few_modules_lie_directly_in_slmops() -> None:
    assert len(list((ROOT / "slmops").glob("[!_]*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_it_is_about(package: Path) -> None:
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))


def test_no_file_is_longer_than_one_room() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in PRODUCT}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_a_public_name_means_one_thing() -> None:
    """Two classes do not share a name, and neither do two constants."""
    places: dict[str, list[str]] = defaultdict(list)
    for path in PRODUCT:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for name in _defined(node):
                places[name].append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def _defined(node: ast.stmt) -> list[str]:
    """The public classes and constants that a statement at module level defines."""
    if isinstance(node, ast.ClassDef):
        names = [node.name]
    elif isinstance(node, ast.Assign):
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        names = [node.target.id]
    else:
        names = []
    return [
        name for name in names if len(name) > 1 and not name.startswith("_") and name != "log"
    ]  # T: a type variable
