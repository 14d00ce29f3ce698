"""Child process: perplexity of a variant on a text, from the logits of ONNX Runtime on the deployed files.

Perplexity is exp(mean negative log-likelihood) over teacher-forced tokens. The text is cut into windows; the first
token of a window has no context and is not scored.
"""

from __future__ import annotations

from pathlib import Path

from slmops import child
from slmops.errors import EvaluationError
from slmops.models import Frozen

WINDOW = 512
ROWS = 64
LARGEST_NLL = 700.0  # exp() of more overflows


class Request(Frozen):
    """A folder, a text file and the number of tokens to score at most."""

    folder: Path
    text: Path
    tokens: int


class Result(Frozen):
    """Mean negative log-likelihood in nats, and the tokens it is the mean of."""

    nll: float
    tokens: int


def handle(request: Request) -> Result:
    """Score the text.

    Raises:
        EvaluationError: The text has fewer than two tokens, or the model's logits are not finite.
    """
    import numpy as np
    from tokenizers import Tokenizer

    from slmops.logits import OnnxModel

    tokenizer = Tokenizer.from_file(str(request.folder / "tokenizer.json"))
    tokenizer.no_truncation()
    ids = np.array(tokenizer.encode(request.text.read_text(encoding="utf-8"), add_special_tokens=False).ids, np.int64)[
        : request.tokens
    ]
    if len(ids) < 2:
        raise EvaluationError("The perplexity text has fewer than two tokens.", "Give a longer text.")
    model = OnnxModel(request.folder)
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        if len(window) < 2:
            break
        logits = model.logits(window)
        for row in range(0, len(window) - 1, ROWS):
            part = logits[row : min(row + ROWS, len(window) - 1)].astype(np.float64)
            target = window[row + 1 : row + 1 + len(part)]
            top = part.max(axis=1, keepdims=True)
            norm = top[:, 0] + np.log(np.exp(part - top).sum(axis=1))
            total += float((norm - part[np.arange(len(part)), target]).sum())
            count += len(part)
    nll = total / count
    if not nll < LARGEST_NLL:
        raise EvaluationError(
            "The model is broken: its logits are not finite numbers, or they call the text all but impossible."
        )
    return Result(nll=nll, tokens=count)


if __name__ == "__main__":
    child.main(Request, handle)
