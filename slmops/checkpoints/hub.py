"""Checkpoints from the Hugging Face hub, kept in the hub's own cache, which other programs share."""

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from slmops.checkpoints import inspection, weight_files
from slmops.core.errors import CheckpointError, PrerequisiteError, SlmopsError
from slmops.core.job import Job

log = logging.getLogger(__name__)

CheckTexts = Callable[[Path, Job, str], object]
"""Looks at the small files in a folder, for a job, before the large ones are fetched."""

_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def parse(text: str) -> tuple[str, str | None]:
    """Repository and revision of ``org/name`` or ``org/name@revision``; a CheckpointError if it is not a hub id."""
    repo, at, revision = text.partition("@")
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII) and bool(at) == bool(revision)
    if not is_id or text.lower().endswith(".gguf"):
        raise CheckpointError(
            f"There is no such folder: {text}",
            "Give a folder in Hugging Face format, a hub id (org/name), a .gguf file, an MLflow URI "
            "(models:/name/version) or 'demo'.",
        )
    return repo, revision or None


def fetch(repo: str, revision: str | None, job: Job, check: CheckTexts = inspection.read_texts) -> Path:
    """Fetch a model into a folder of the hub's cache, small files first, so that what cannot be converted costs little.

    The token comes from HF_TOKEN or from ``hf auth login``. Without a connection a copy in the cache is used. It is a
    PrerequisiteError if the hub cannot be reached or the connection broke, else a CheckpointError.
    """
    from huggingface_hub import HfApi, errors, snapshot_download

    texts = [*_TEXTS, *(["*.py"] if job.trust_remote_code else [])]
    # Only the top folder: repositories keep exports and originals in folders below it.
    get = partial(snapshot_download, repo, revision=revision, ignore_patterns=["*/*"])
    try:
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=10)
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise
        except Exception as error:
            pickles = ["pytorch_model*.bin", "adapter_model.bin"] if job.allow_pickle else []
            patterns = [*texts, "model*.safetensors", "adapter_model.safetensors", *pickles]
            try:
                cached = Path(get(allow_patterns=patterns, local_files_only=True))
            except Exception:
                raise PrerequisiteError(
                    f"There is no folder {repo} here, and the hub cannot be reached: {_line(error)}",
                    "Connect to the network (behind a proxy set HTTPS_PROXY, for a mirror HF_ENDPOINT), "
                    "or give a folder in Hugging Face format.",
                ) from error
            log.warning("the hub cannot be reached; using the copy of %s in its cache", repo)
            return cached
        present = {file.rfilename for file in info.siblings or () if "/" not in file.rfilename}
        root = weight_files.choose(present, repo, allow_pickle=job.allow_pickle)
        weights = root.partition(".")[0] + f"*{Path(root.removesuffix('.index.json')).suffix}"
        small = Path(get(allow_patterns=texts))
        if root not in weight_files.ADAPTER_ROOTS:
            check(small, job, repo)
        log.info("fetching the weights of %s", repo)
        return Path(get(allow_patterns=[*texts, weights]))
    except SlmopsError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: the hub gives it only to accounts that accepted its licence.",
            "Accept the licence on the model's page, then set HF_TOKEN to a token of that account.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision or 'main'}.", "Give a branch, a tag or a commit: org/name@revision."
        ) from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise CheckpointError(
            f"The hub shows no model {repo}, and there is no such folder.",
            "Check the spelling; for a private model set HF_TOKEN; for a folder write ./ before its name.",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is not a hub id: {error}", "Give org/name or org/name@revision.") from error
    except Exception as error:
        # Whatever the transport raises: huggingface_hub has changed its HTTP library before.
        raise PrerequisiteError(
            f"The download of {repo} from the hub broke off: {type(error).__name__}: {_line(error)}",
            "Run it again: what has arrived is kept. Or give a folder in Hugging Face format.",
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
