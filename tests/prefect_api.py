"""Prefect's REST API as a browser asks it, but for its patience."""

from __future__ import annotations

import time

import httpx


class _Patient(httpx.HTTPTransport):
    """A server whose SQLite is busy says 503; Prefect's own client asks again then, too."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        for pause in (0.2, 1.0, 3.0, 6.0):
            response = super().handle_request(request)
            if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                return response
            response.close()
            time.sleep(pause)
        return super().handle_request(request)


def client(api: str) -> httpx.Client:
    """A client of the API at ``api``; paths are relative to it."""
    return httpx.Client(base_url=api, timeout=30, transport=_Patient())
