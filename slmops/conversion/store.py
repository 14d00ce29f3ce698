"""Finished variants on disk: a folder without a complete manifest does not exist for the program."""

from pathlib import Path

from slmops.core.files import digest_of_json, intact, sha256
from slmops.core.values import MANIFEST, Checkpoint, Recipe, Variant, VariantFile

FORMAT = 5
# The packages whose versions change the result.
DECISIVE = ("olive-ai", "onnxruntime-genai", "transformers", "torch", "onnx")


def made_with(versions: dict[str, str]) -> dict[str, object]:
    """What makes variants of the same input others: how slmops makes them, and the packages."""
    return {"format": FORMAT, "versions": {name: versions.get(name) for name in DECISIVE}}


def key(recipe: Recipe, checkpoint: Checkpoint, versions: dict[str, str]) -> str:
    """Folder name of a variant: the same for the same checkpoint, recipe and versions of the packages."""
    went_in = {
        **made_with(versions),
        "config": recipe.config,
        "order": list(recipe.config.get("passes", {})),
        "genai": recipe.genai,
        "checkpoint": checkpoint.digest,
        "compared": checkpoint.context_length if recipe.baseline else None,  # with the checkpoint, up to this length
    }
    return f"{recipe.name}-{digest_of_json(went_in)[:16]}"


def files_of(folder: Path) -> tuple[VariantFile, ...]:
    """Name, size and SHA-256 of all files in a folder except the manifest."""
    return tuple(
        VariantFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    )


def load(folder: Path) -> Variant | None:
    """The variant in ``folder``, or None unless its manifest is complete and every file is what the manifest says."""
    variant = Variant.from_file(folder / MANIFEST, path=folder)
    whole = variant and all(intact(folder / one.name, one.size, one.sha256) for one in variant.files)
    return variant if whole else None
