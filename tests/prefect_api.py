"""Prefect's REST API as a browser asks it, but for its patience."""

import httpx
from prefect.client.base import PrefectHttpxSyncClient


def client(api: str) -> httpx.Client:
    """A client of the API at ``api``, to which paths are relative; a server whose SQLite is busy is asked again."""
    return PrefectHttpxSyncClient(base_url=api, timeout=30, raise_on_all_errors=False)
