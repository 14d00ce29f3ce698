"""Child process: how far the next-token distributions of a model are from those of its references, on one text.

All models see the same teacher-forced tokens, in windows that start without context; the first token of a window is not
scored. A reference is a file of bare log-probabilities, float32, shape (scored tokens, vocabulary), written by an
earlier call; it is mapped, not read whole. Logits of a variant come from ONNX Runtime on the registered files, because
the serving runtime gives none.
"""

import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from slmops.checkpoints import model as stored
from slmops.core.errors import EvaluationError
from slmops.core.files import move
from slmops.core.values import Frozen

LEAST_TOKENS = 1024  # with fewer, the interval is too wide for the policy's limits
WINDOW = 512
ROWS = 64
LARGEST_NLL = 700.0  # exp() of more overflows


class LogitsRequest(Frozen):
    """A model, a text, the references, and where to leave the log-probabilities for others."""

    folder: Path
    hugging_face: bool = False
    gguf: Path | None = None  # the weights, for llama.cpp; the folder has the tokenizer
    trust_remote_code: bool = False
    text: Path
    tokens: int
    context_length: int  # of the model, in tokens: a window is not longer
    references: dict[str, Path] = Field({})
    write: Path | None = None
    budget_s: float | None = None  # the rest of the text is left out


class Distance(Frozen):
    """Per scored token: KL divergence of the reference to the model in nats, and whether both prefer the same token."""

    kl: tuple[float, ...]
    same_top: tuple[bool, ...]


class LogitsResult(Frozen):
    """Negative log-likelihood of each scored token in nats, and the distances to the references by name."""

    nll: tuple[float, ...]
    distances: dict[str, Distance]
    tokens: int = Field(0, description="How many of the text's were used,")
    all_tokens: int = Field(0, description="of so many.")


def handle(request: LogitsRequest) -> LogitsResult:
    """Score the text window by window, with the logits of one window in memory."""
    before = time.monotonic()
    end = before + (request.budget_s or math.inf)
    windows, all_tokens = _windows(request)
    tokens = 0
    scored = sum(len(window) - 1 for window in windows)
    references = {
        name: np.memmap(file, np.float32, "r").reshape(scored, -1) for name, file in request.references.items()
    }
    nll: list[float] = []
    kl: dict[str, list[float]] = {name: [] for name in references}
    same: dict[str, list[bool]] = {name: [] for name in references}
    with ThreadPoolExecutor(os.cpu_count()) as pool, _kept(request.write) as file:
        for window, logits in zip(windows, _logits(request, windows), strict=True):
            rows = range(0, len(window) - 1, ROWS)
            parts = [(logits[:-1][row : row + ROWS], window[1:][row : row + ROWS], len(nll) + row) for row in rows]
            for own, part in pool.map(lambda part: _compare(*part, references=references), parts):
                file.write(own.data)
                nll += part.nll
                for name, distance in part.distances.items():
                    kl[name] += distance.kl
                    same[name] += distance.same_top
            tokens += len(window)
            last_s, before = time.monotonic() - before, time.monotonic()
            if tokens >= LEAST_TOKENS and before + last_s > end:
                break
        if sum(nll) / len(nll) > LARGEST_NLL:
            raise EvaluationError("The model is broken: its logits call the text all but impossible.")
    distances = {name: Distance(kl=tuple(kl[name]), same_top=tuple(same[name])) for name in kl}
    return LogitsResult(nll=tuple(nll), distances=distances, tokens=tokens, all_tokens=all_tokens)


@contextmanager
def _kept(path: Path | None) -> Iterator[IO[bytes]]:
    """A file that appears when complete. Not mapped: a full disk would be a SIGBUS."""
    if path is None:
        with Path(os.devnull).open("wb") as file:
            yield file
        return
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            yield file
        move(part, path)
    finally:
        part.unlink(missing_ok=True)


def _windows(request: LogitsRequest) -> tuple[list[NDArray[Any]], int]:
    """The token ids by window, and how many tokens the whole text has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(request.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    whole = tokenizer.encode(request.text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = np.array(whole[: request.tokens], np.int64)
    if len(ids) < 2:
        raise EvaluationError("The perplexity text has fewer than two tokens.", "Give a longer text.")
    window = min(WINDOW, request.context_length)
    return [ids[start : start + window] for start in range(0, len(ids) - 1, window)], len(whole)


def _logits(request: LogitsRequest, windows: list[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Logits of each window, shape (tokens, vocabulary)."""
    if request.gguf:
        from slmops.evaluation.gguf_model import GgufModel

        gguf = GgufModel(request.gguf, WINDOW)
        yield from (gguf.logits(window) for window in windows)
        return
    if not request.hugging_face:
        from slmops.conversion.logits import OnnxModel

        onnx = OnnxModel(request.folder)
        yield from (onnx.logits(window) for window in windows)
        return
    import torch

    model = stored.load(request.folder, trust_remote_code=request.trust_remote_code, attn_implementation="eager")
    with torch.no_grad():
        for window in windows:
            yield model(torch.from_numpy(window)[None]).logits[0].float().numpy()


def _compare(
    logits: NDArray[Any], targets: NDArray[Any], at: int, *, references: dict[str, NDArray[Any]]
) -> tuple[NDArray[Any], LogitsResult]:
    """Score some rows, the first of which has the number ``at``. Returns the log-probabilities and the figures.

    KL divergence of the reference p to the model q: sum of p (log p - log q). Elements are float32, sums float64.
    """
    own = logits - logits.max(axis=1, keepdims=True)
    own -= np.log(np.exp(own).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    if not np.isfinite(own).all():
        raise EvaluationError("The model is broken: its logits are not finite numbers.")
    distances = {}
    for name, log_probabilities in references.items():
        theirs = log_probabilities[at : at + len(own)]
        if theirs.shape != own.shape:
            raise EvaluationError(f"Its vocabulary has {own.shape[1]} tokens, and that of {name} {theirs.shape[1]}.")
        kl = (np.exp(theirs) * (theirs - own)).sum(axis=1, dtype=np.float64)
        same = theirs.argmax(axis=1) == own.argmax(axis=1)
        distances[name] = Distance(kl=tuple(np.maximum(kl, 0).tolist()), same_top=tuple(same.tolist()))
    nll = -own[np.arange(len(own)), targets].astype(np.float64)
    return own, LogitsResult(nll=tuple(nll.tolist()), distances=distances)
