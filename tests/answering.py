"""A web server on loopback that answers what a function says, in a thread of its own."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Respond = Callable[[BaseHTTPRequestHandler, Any], tuple[int, str] | tuple[int, bytes, dict[str, str]]]
"""From a request and its body, read as JSON, to the status, content and headers of the answer."""


@contextmanager
def answering(respond: Respond, headers: Callable[[], dict[str, str]] = dict) -> Iterator[str]:
    """The address of a server that answers with ``respond`` and adds ``headers``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            status, content, *own = respond(self, json.loads(self.rfile.read(length)) if length else None)
            self.send_response(status)
            for name, value in (headers() | (own[0] if own else {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(BrokenPipeError):  # the one that asked has given up
                    self.wfile.write(content if isinstance(content, bytes) else content.encode())

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
