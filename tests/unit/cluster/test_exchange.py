"""Files from other machines: their names, their cache, and the values that travel with them; without a server."""

import hashlib
import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic import ValidationError

from slmops.cluster import parts
from slmops.cluster.parts import Failure
from slmops.core import blobs, errors
from slmops.core.errors import ConversionError, SlmopsError, TrackingError, WorkError
from slmops.core.settings import Settings
from slmops.core.values import Hardware, Measurement, Recipe, VariantFile
from slmops.tracking.exchange import Exchange
from tests import values

NOWHERE = "http://127.0.0.1:9"


def cached(settings: Settings, content: bytes, name: str = "weights") -> VariantFile:
    digest = hashlib.sha256(content).hexdigest()
    path = settings.blobs / digest
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return VariantFile(name=name, size=len(content), sha256=digest)


def test_what_is_in_the_cache_is_not_asked_for_unless_it_was_altered(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    files = [cached(settings, b"a", "one"), cached(settings, b"b", "sub/two")]
    exchange = Exchange(NOWHERE, "run", settings)
    for _ in range(2):
        exchange.bring(files, tmp_path / "folder")
    assert [(tmp_path / "folder" / file.name).read_bytes() for file in files] == [b"a", b"b"]
    kept = settings.blobs / files[0].sha256
    kept.unlink()
    kept.write_bytes(b"wrong")
    with pytest.raises(TrackingError, match="one"):
        exchange.get(files[0])
    assert not kept.exists()


def test_no_name_and_no_digest_leads_out_of_its_folder(settings: Settings, tmp_path: Path) -> None:
    exchange = Exchange(NOWHERE, "run", settings)
    for name in ("", "/etc/passwd", "../up", "a/../../up", "a//b", "a\\b", "c:d", "dot.", "...", "a\n"):
        with pytest.raises(WorkError, match="is called"):
            exchange.bring([cached(settings, b"x", name)], tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
    for digest in ("../../x", "A" * 64, "0" * 63, f"{'0' * 64}\n"):
        with pytest.raises(ValidationError, match="sha256"):
            VariantFile(name="x", size=1, sha256=digest)


def test_the_store_keeps_what_is_new_or_used(settings: Settings, tmp_path: Path) -> None:
    blobs.prune(settings)  # there is none yet
    new, used, old = (settings.blobs / cached(settings, content).sha256 for content in (b"1", b"2", b"3"))
    (tmp_path / "link").hardlink_to(used)
    part = settings.blobs / "downloads" / "files" / "x.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    before_this_store = settings.home / "exchange" / "files"
    before_this_store.mkdir(parents=True)
    long_ago = time.time() - blobs.KEPT_S - 60
    for path in (used, old, part):
        os.utime(path, (long_ago, long_ago))
    blobs.prune(settings)
    paths = (new, used, old, part, before_this_store)
    assert [path.exists() for path in paths] == [True, True, False, False, False]


@pytest.mark.parametrize("error", [ConversionError("no model", "see the log"), SlmopsError("odd")])
def test_an_error_comes_back_as_itself(error: SlmopsError) -> None:
    back = Failure.model_validate_json(Failure.of(error).model_dump_json()).error
    assert (type(back), back.message, back.fix) == (type(error), error.message, error.fix)
    assert type(Failure(kind="Strange", message="m", fix=None).error) is errors.WorkError


def hardware(processor: str) -> Hardware:
    return values.variant(Path("/nowhere")).hardware.model_copy(update={"processor": processor})


def test_figures_of_another_kind_of_machine_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = values.evaluation({"decode_tok_s": Measurement(value=40, unit="tokens/s")})
    monkeypatch.setattr(parts, "evaluation", lambda *_: figures)
    kept, reason = parts.figures(Mock(hardware=hardware("x")), Mock(hardware=hardware("x")))
    assert (kept, reason) == (figures, None)
    kept, reason = parts.figures(Mock(hardware=hardware("y")), Mock(hardware=hardware("x")))
    assert kept.measurements.keys() == {"size_mb", "perplexity", "accuracy", "accuracy.low"}
    assert (kept.curves, kept.samples) == ((), ())
    assert kept.answers == figures.answers
    assert (reason or "").startswith("Speed and memory were measured on y")


def test_a_recipe_that_names_the_checkpoint_names_it_where_it_is() -> None:
    def config(path: str) -> dict[str, Any]:
        return {"passes": {"a": {"type": "T", "model": path, "files": [path, 1]}}, "other": f"{path}/config.json"}

    moved = parts._relocated(Recipe(name="own", config=config("/there")), Path("/there"), Path("/here"))
    assert moved.config["passes"] == config("/here")["passes"]
    assert moved.config["other"] == "/there/config.json"
