"""How much memory a process and its children take, looked at often without being in their way."""

import time

import psutil

LOOKING = 0.02  # share of the time that may go into exact looks


class Meter:
    """Memory of a process group.

    For the proportional set size, which counts shared pages once, the kernel walks through all pages of a process, and
    the process waits meanwhile if it asks for memory: 40 ms for 1.5 GB, and ten such looks a second slowed a training
    on two cores by 40 %. So exact looks are rare. In between the resident size is taken, which costs nothing, less what
    was shared at the last exact look.
    """

    def __init__(self) -> None:
        self._members: list[psutil.Process] = []
        self._shared = 0
        self._next_look = 0.0

    def mb(self, pid: int) -> float:
        """Memory in MB (10^6 bytes) of the process and its children now; 0 if it is gone."""
        began = time.monotonic()
        if began >= self._next_look:
            self._shared = self._look(pid)
            self._next_look = began + (time.monotonic() - began) / LOOKING
        resident = sum(_size(member, exact=False)[0] for member in self._members)
        return max(0, resident - self._shared) / 1e6

    def _look(self, pid: int) -> int:
        """Bytes of the resident size that count for other processes."""
        try:
            leader = psutil.Process(pid)
            self._members = [leader, *leader.children(recursive=True)]
        except psutil.Error:
            self._members = []
        sizes = [_size(member, exact=True) for member in self._members]
        return sum(resident - proportional for resident, proportional in sizes)


def _size(process: psutil.Process, *, exact: bool) -> tuple[int, int]:
    """Resident and proportional set size in bytes, which differ only if ``exact``. A process that is gone has none."""
    try:
        info = process.memory_full_info() if exact else process.memory_info()
    except psutil.Error:
        return 0, 0
    return info.rss, getattr(info, "pss", info.rss)
