"""The content-addressed store: each file once, as ``home/blobs/<SHA-256>``.

What the folders of variants, of Foundry Local and of installed versions have of it are hard links. Where the file
system cannot link, those folders have copies of their own, and only what came from other machines is here.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from slmops.core.files import intact, link_or_copy
from slmops.core.settings import Settings
from slmops.core.values import VariantFile

KEPT_S = 24 * 3600.0  # seconds that a file stays to which nothing links


def find(file: VariantFile, settings: Settings, *copies: Path) -> Path | None:
    """The file of this content, or one of its ``copies``, only to be read; None: none is here, or all were altered."""
    blob = settings.blobs / file.sha256
    for path in (blob, *copies):
        if intact(path, file.size, file.sha256):
            if path.stat().st_nlink == 1:  # what is linked elsewhere stays as it is, its time too
                os.utime(path)
            return path
    blob.unlink(missing_ok=True)
    return None


def keep(path: Path, file: VariantFile, settings: Settings) -> None:
    """Have a file, which lies at ``path``, in the store; if its content is there already, ``path`` becomes a link."""
    blob = find(file, settings)
    if blob is not None:
        path.unlink()
        link_or_copy(blob, path)
        return
    settings.blobs.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # whoever links it elsewhere says that this file system cannot
        (settings.blobs / file.sha256).hardlink_to(path)


def prune(settings: Settings, unused_s: float = KEPT_S) -> None:
    """Remove what nothing in this home has used for so many seconds, what is left of downloads, and this store's
    predecessor."""
    shutil.rmtree(settings.home / "exchange", ignore_errors=True)
    for path in (*settings.blobs.glob("*"), *(settings.blobs / "downloads").rglob("*.part")):
        with suppress(FileNotFoundError):  # another process was faster
            stat = path.stat()
            if path.is_file() and stat.st_nlink == 1 and time.time() - stat.st_mtime > unused_s:
                path.unlink()
