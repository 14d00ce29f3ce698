"""Print what a pull costs whose connection is cut three times.

    python benchmarks/cut.py NAME TRACKING_URI

A new device pulls the champion of NAME through a line that breaks after 10 %, 50 % and 90 % of its size.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from slmops.tracking.registry import Registry

SLMOPS = str(Path(sys.executable).with_name("slmops"))
CUTS = (0.1, 0.5, 0.9)
BLOCK = 65536


class Line:
    """A TCP line to a server that breaks whenever one of ``cuts``, in bytes received over it in all, is passed."""

    def __init__(self, host: str, port: int, cuts: list[float]) -> None:
        self._server, self._cuts = (host, port), cuts
        self.received = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._carry, args=(one, other, one is server), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, downwards: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while block := source.recv(BLOCK):
                target.sendall(block)
                self.received += len(block) * downwards
                if self._cuts and self.received > self._cuts[0]:
                    self._cuts.pop(0)
                    for end in (source, target):
                        end.shutdown(socket.SHUT_RDWR)


def main(name: str, uri: str) -> None:
    """Pull, and compare what came over the line with the version's size."""
    champion = Registry(uri).champion(name)
    assert champion is not None  # noqa: S101 - the caller promoted it
    size = champion.size_mb * 1e6
    address = urlsplit(uri)
    cuts = [share * size for share in CUTS]
    line = Line(str(address.hostname), int(address.port or 80), cuts)
    with tempfile.TemporaryDirectory() as device:
        started = time.monotonic()
        done = subprocess.run(
            [SLMOPS, "pull", name, "--from", line.url, "--json"],
            env={**os.environ, "SLMOPS_HOME": device},
            stdout=subprocess.PIPE,
            check=True,
        )
        took = time.monotonic() - started
        foundry_id = json.loads(done.stdout)["foundry_id"]
    print(
        f"\npull of {foundry_id}, cut after 10, 50 and 90 %: {len(CUTS) - len(cuts)} cuts, whole and verified in "
        f"{took:.0f} s; {line.received / 1e6:.1f} MB over the line for {size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
