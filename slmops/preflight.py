"""Is what a job was given usable? Looked at before anything starts: in about a second, and all of it at once."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

from slmops.checkpoints import inspection, source
from slmops.checkpoints.chat_template import ChatTemplate
from slmops.conversion import olive_config, recipe_files, recipes
from slmops.core.errors import PrerequisiteError, SlmopsError, UsageError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.evaluation import dataset, matchers
from slmops.foundry import prompt_template
from slmops.selection import policy
from slmops.selection.sweep import Sweep


def check(job: Job, settings: Settings) -> Job:
    """Look at the files and options of a job. Nothing is fetched, and no heavy library is imported.

    The matcher's file is run, as it will be run for the answers. Returns the job with the model that its Olive file
    names, if it names none itself.

    Raises:
        SlmopsError: What cannot be used; of several problems a UsageError that names them all.
    """
    checks: list[Callable[[], object]] = [
        lambda: source.check(olive_config.with_model(job)),
        lambda: _check_template(job),
        lambda: recipes.check(job, settings),
        lambda: olive_config.read(job.olive_config) if job.olive_config else None,
        lambda: policy.load(job.policy),
        lambda: dataset.load(job.evaluation_set, matcher=job.matcher, judge=settings.judge_configured),
        lambda: matchers.load_function(job.matcher) if job.matcher else None,
        lambda: dataset.perplexity_text(job.perplexity_text),
        lambda: dataset.perplexity_text(job.calibration_text, "calibration text") if job.calibration_text else None,
        lambda: _check_folder(job.output_path) if job.output_path else None,
        lambda: _check_peer(settings) if job.peer else None,
    ]
    problems: dict[str, SlmopsError] = {}  # a broken chat template is a problem of the checkpoint, too
    for one in checks:
        try:
            one()
        except SlmopsError as error:
            problems.setdefault(str(error), error)
    if len(problems) > 1:
        said = "\n".join(indent(problem, "  ") for problem in problems)
        raise UsageError(f"{len(problems)} things are wrong with what this job was given:\n{said}")
    for problem in problems.values():
        raise problem
    return olive_config.with_model(job)


def check_sweep(sweep: Sweep, settings: Settings) -> Job:
    """The job whose checkpoint and baseline the trials of a sweep have, checked as :func:`check` does."""
    if sweep.save is not None:
        recipe_files.place_of(sweep.save, settings)
    swept = [name for name in recipe_files.find(settings) if recipe_files.load(name, settings).sweep]
    return check(sweep.job(sweep.precision or swept), settings)


def _check_template(job: Job) -> None:
    if (text := inspection.read_template(job)) is not None and job.chat_template is not None:
        prompt_template.derive(ChatTemplate(path=job.chat_template, text=text))


def _check_peer(settings: Settings) -> None:
    if settings.pools:
        said = "A peer is measured beside the variants, which a job on work pools measures elsewhere."
        raise UsageError(said, "Leave out --peer, or unset SLMOPS_POOLS.")
    if importlib.util.find_spec("llama_cpp") is None:
        raise PrerequisiteError(
            "--peer llama.cpp needs the package llama-cpp-python, which is not installed.",
            "In slmops' source tree: pip install -c constraints.txt -e '.[peers]'. docs/measuring.md says with which "
            "CMAKE_ARGS.",
        )


def _check_folder(path: Path) -> None:
    path = path.expanduser()
    existing = next((one for one in (path, *path.absolute().parents) if one.exists()), None)
    if existing is not None and not existing.is_dir():
        raise UsageError(f"The output path {path} cannot be a folder: {existing} is a file.", "Give another path.")
