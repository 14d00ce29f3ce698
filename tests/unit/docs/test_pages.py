"""README and docs: what they link to and name is there."""

import re
import tomllib
from pathlib import Path

import pytest

from slmops.cli.command import COMMANDS

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = [line for page in PAGES for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
NAMED = {name for row in ROWS for name in re.findall(r"`((?:slmops|flows|tasks)(?:\.\w+)+)`", row)}


def anchors(page: Path) -> set[str]:
    """Headings as GitHub spells them in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", sorted(NAMED))
def test_modules_that_are_named_exist(name: str) -> None:
    path, rest = ROOT, name.split(".")
    while rest and (path / rest[0]).is_dir():
        path /= rest.pop(0)
    if rest:
        path /= f"{rest.pop(0)}.py"
        assert path.is_file()
    assert not rest or re.search(rf"^(class )?{rest[0]}\b", path.read_text("utf-8"), re.MULTILINE)


def test_the_table_has_all_commands() -> None:
    firsts = [row.split("|")[1] for row in ROWS if row.startswith("| `slmops ")]
    assert {name for first in firsts for name in re.findall(r"`(?:slmops )?([a-z]+)", first)} == set(COMMANDS)


def test_the_floors_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    [layers] = [one["layers"] for one in contracts if one["type"] == "layers"]
    table = PAGES[0].read_text("utf-8").partition("| floor | holds |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert [re.findall(r"`([\w.]+)`", row.split("|")[1]) for row in table] == [one.split(" | ") for one in layers]
