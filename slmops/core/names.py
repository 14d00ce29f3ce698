"""Names of models and variants, which become parts of paths on every system; MLflow and Foundry Local accept them."""

import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

from slmops.core.files import reserved

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"


def _portable(name: str) -> str:
    if reserved(name):
        raise ValueError("must not be a name that Windows keeps for a device")
    return name


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN), AfterValidator(_portable)]
"""Name of a model or a variant."""


def is_name(text: str) -> bool:
    """Whether a text can be a :data:`Name`."""
    return re.fullmatch(NAME_PATTERN, text) is not None and not reserved(text)


def to_name(text: str) -> str:
    """A name that MLflow, Foundry Local and Prefect accept: org/Qwen2.5-0.5B becomes qwen2-5-0-5b."""
    base = text.rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9_]+", "-", base).strip("-_")[:63].rstrip("-_") or "model"
    return f"{name}-model" if reserved(name) else name
