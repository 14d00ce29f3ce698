"""Training data from a web address."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from slmops.core.errors import DataError, PrerequisiteError
from slmops.training.examples import shown

SCHEMES = ("http://", "https://")
READ_TIMEOUT_S, DOWNLOAD_TIMEOUT_S = 30.0, 600.0
"""Seconds without a byte, and in total, after which a download is given up."""
_OFTEN = "Try again, or fetch the file yourself and give its path."


def download(url: str, file: Path, largest: int) -> None:
    """Fetch a file, which appears only when it is whole.

    Args:
        url: Its address. Errors never show credentials that it contains.
        file: Where to put it.
        largest: Bytes allowed.

    Raises:
        DataError: The file does not exist, is not data, or is too large.
        PrerequisiteError: The network failed.
    """
    import httpx

    where = public(url)
    if "@" in urlsplit(url).netloc:
        raise DataError(
            f"The URL of {where} contains a name or a password.", "Leave them out: they would end up in logs."
        )
    # httpx's timeout covers a single read, so data that trickle in would never time out.
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    part = file.with_suffix(".part")
    try:
        with (
            httpx.Client(follow_redirects=True, max_redirects=5, timeout=READ_TIMEOUT_S) as client,
            client.stream("GET", url) as response,
            part.open("wb") as out,
        ):
            if not response.is_success:
                raise DataError(f"{where} answers {response.status_code} {response.reason_phrase}.", "Check the URL.")
            if "html" in response.headers.get("content-type", ""):
                raise DataError(f"{where} is a web page, not data.", "Give the address of the .jsonl file itself.")
            for block in response.iter_bytes():  # no block size: httpx would wait until a block is full
                out.write(block)
                if out.tell() > largest:
                    raise DataError(f"{where} is too large: {largest / 1e6:.0f} MB are allowed.", "Give fewer items.")
                if time.monotonic() > deadline:
                    raise PrerequisiteError(f"{where} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s.", _OFTEN)
    except httpx.TimeoutException:
        raise PrerequisiteError(f"{where} does not answer, or stopped halfway.", _OFTEN) from None
    except httpx.TransportError as error:
        raise PrerequisiteError(f"{where} cannot be fetched ({type(error).__name__}).", _OFTEN) from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise DataError(f"{where} cannot be fetched ({type(error).__name__}).", "Check the URL.") from None
    part.replace(file)


def public(url: str) -> str:
    """A URL without what may be secret: user, password, query and fragment.

    Raises:
        DataError: It is not a URL.

    >>> public("https://me:secret@example.org/data.jsonl?key=secret")
    'https://example.org/data.jsonl'
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise DataError("The address of the training data is not a URL.", "Check it.") from None
    return shown(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")))
