"""The house rules that a machine can check: rooms, their size, one meaning for each name, one clock, few imports."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import slmops

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("slmops", "flows", "tasks") for path in sorted((ROOT / folder).rglob("*.py"))]
PRODUCT = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
PACKAGES = sorted(path.parent for path in (ROOT / "slmops").rglob("__init__.py") if any(path.parent.glob("[!_]*.py")))
MOST_LINES = 400
MOST_MODULES = 10
WALL_CLOCK = re.compile(r"time\.time\(|time\.time_ns\(|datetime\.now\(|datetime\.utcnow\(")
STAMPS = {
    "flows/retrain.py",  # until when a promotion waits, for other processes
    "slmops/cli/command.py",  # of crash logs
    "slmops/cli/terminal.py",  # of log lines
    "slmops/core/blobs.py",  # against the time of files, which the same clock gave; a cache is all it empties
    "slmops/checkpoints/chat_template.py",  # chat templates ask for the date
    *("flows/promote.py", "slmops/delivery/trouble.py"),  # of a decision, and of an event
    "slmops/evaluation/earlier.py",  # of results, for people
    *("slmops/conversion/convert.py", "slmops/foundry/service_worker.py", "slmops/foundry/prompt_template.py"),
    *("slmops/tracking/client.py", "slmops/tracking/registry.py", "slmops/tracking/training.py", "tasks/news.py"),
    *("slmops/serving/backend.py", "slmops/training/finetune.py", "slmops/core/locks.py"),
}
HEAVY = ["prefect", "mlflow", "torch", "olive", "onnxruntime", "onnxruntime_genai", "transformers", "onnx"]
FIGURES = {"numpy", "pandas", "matplotlib", "datasets", "foundry_local_sdk"}
EVALUATION = "from slmops.evaluation import dataset, scoring; dataset.load(None)"
PUBLIC = {
    *("optimize", "Job", "Comparison"),
    *("SlmopsError", "UsageError", "CheckpointError", "RecipeError", "PrerequisiteError", "BusyError", "WorkError"),
    *("ConversionError", "RegistrationError", "EvaluationError", "TrackingError", "GateError"),
}
PREFLIGHT = """
from slmops import preflight
from slmops.core.job import Job
from slmops.core.settings import Settings
preflight.check(Job(model="demo"), Settings())"""


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_says_what_it_is_about(package: Path) -> None:
    assert ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))


def test_no_file_is_longer_than_one_room_and_few_lie_directly_in_slmops() -> None:
    assert len(list((ROOT / "slmops").glob("[!_]*.py"))) <= MOST_MODULES
    assert [path for path, text in PRODUCT.items() if len(text.splitlines()) > MOST_LINES] == []


def test_the_public_names_are_these() -> None:
    assert set(slmops.__all__) == PUBLIC
    assert all(hasattr(slmops, name) for name in PUBLIC)
    assert all(name in (slmops.__doc__ or "") for name in ("optimize", "Job", "Comparison"))


def test_a_public_name_means_one_thing() -> None:
    """Two classes do not share a name, and neither do two constants."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, text in PRODUCT.items():
        for node in ast.parse(text).body:
            for name in _defined(node):
                places[name].append(path)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def _defined(node: ast.stmt) -> list[str]:
    """The public classes and constants that a statement at module level defines."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    names = [node.name] if isinstance(node, ast.ClassDef) else [one.id for one in targets if isinstance(one, ast.Name)]
    # One letter: a type variable.
    return [name for name in names if len(name) > 1 and not name.startswith("_") and name != "log"]


def test_nothing_is_timed_by_the_wall_clock() -> None:
    """A clock that is set back or forward must not end a wait, a budget or a watch: only stamps are taken from it."""
    assert {path for path, text in PRODUCT.items() if WALL_CLOCK.search(text)} - STAMPS == set()
    assert not [path for path, text in PRODUCT.items() if re.search(r"\w = time\.time\(\) \+", text)]


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import slmops", FIGURES),
        *((f"import slmops.cli.{module}", {*FIGURES, "fastapi"}) for module in ("command", "jobs", "deploy", "local")),
        # The list of commands needs none of them, and half a second goes by quickly.
        ("from slmops.cli.command import run; run(['--help'])", {*FIGURES, "pydantic", "jinja2", "httpx"}),
        (PREFLIGHT, {"huggingface_hub"}),
        (EVALUATION, {"rouge_score", "jsonschema", "httpx", "numpy", "scipy", "nltk"}),
        ("import slmops.serving.service", set()),  # MLflow takes seconds, and the registry may be away
    ],
)
def test_what_is_light_imports_nothing_heavy(program: str, absent: set[str]) -> None:
    program += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = set(done.stdout.splitlines()[-1].split())
    assert "slmops" in found
    assert not found & {*HEAVY, *absent}
