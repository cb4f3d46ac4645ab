"""Memory of this process, as the kernel counts it. Linux only."""

import ctypes
import gc
import threading
from pathlib import Path


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def give_back() -> None:
    """Returns memory that nothing uses to the kernel."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory(threading.Thread):
    """The most anonymous memory of this process that a sample has seen."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self._is_over = threading.Event()

    def run(self) -> None:
        """Samples until `stop`."""
        while not self._is_over.wait(0.005):
            self.peak = max(self.peak, memory("RssAnon"))

    def stop(self) -> int:
        """The peak, in bytes."""
        self._is_over.set()
        self.join()
        return max(self.peak, memory("RssAnon"))
