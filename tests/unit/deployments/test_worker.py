"""deployments/worker.py around a stand-in of Prefect's worker with one flow run, which has a session of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import making

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="containers run Linux"),
]
ROOT = Path(__file__).parents[3]

SAYS = """
import os, signal, sys, time
def end(*_):
    time.sleep({after})
    os.write(1, b"{who} ended\\n")
    sys.exit()
signal.signal(signal.SIGTERM, end)
"""
FLOW_RUN = SAYS.format(who="flow run", after=0.3) + "os.write(1, b'at work\\n'); time.sleep(60)"
WORKER = (
    SAYS.format(who="worker", after=0)
    + f"import subprocess; subprocess.run([sys.executable, '-S', '-c', {FLOW_RUN!r}], start_new_session=True);"
    + "time.sleep(60)"
)


class Container:
    """A worker with a folder that is its own, and one for homes that it shares."""

    def __init__(self, root: Path, homes: Path) -> None:
        root.mkdir()
        self.home = root / "slmops"
        self.log = root / "log"
        command = [sys.executable, str(ROOT / "deployments" / "worker.py"), str(homes), sys.executable, "-S", "-c"]
        with self.log.open("wb") as log:
            env = {**os.environ, "HOME": str(self.home), "PYTHONPATH": str(ROOT)}
            self.first = subprocess.Popen([*command, WORKER], env=env, stdout=log, stderr=subprocess.STDOUT)

    def said(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines()

    def wait_at_work(self) -> None:
        making.until(lambda: "at work" in self.said(), "it works", 30)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Container]]:
    """Two workers at work."""
    with ExitStack() as ending:
        both = []
        for name in ("one", "two"):
            both.append(Container(tmp_path / name, tmp_path / "homes"))
            ending.callback(both[-1].first.wait, 30)
            ending.callback(both[-1].first.terminate)
            both[-1].wait_at_work()
        yield both


def test_each_worker_has_a_home_of_its_own_and_the_next_one_takes_what_was_left(
    started: list[Container], tmp_path: Path
) -> None:
    one, two = started
    assert [worker.home.resolve() for worker in started] == [tmp_path / "homes" / number for number in ("1", "2")]
    (one.home / "variant").write_text("kept")
    one.first.terminate()
    one.first.wait(30)
    three = Container(tmp_path / "three", tmp_path / "homes")
    three.wait_at_work()
    assert (three.home / "variant").read_text() == "kept"
    three.first.terminate()
    assert three.first.wait(30) == 0
    assert two.first.poll() is None


def test_a_worker_that_is_stopped_lets_its_flow_run_end_first(started: list[Container]) -> None:
    one = started[0]
    one.first.terminate()
    assert one.first.wait(30) == 0
    assert one.said()[-2:] == ["flow run ended", "worker ended"]
