"""How much anonymous memory a process holds: mapped file pages, which the system can drop at any time, are not in it."""

import threading
from pathlib import Path


def anonymous_bytes() -> int:
    """Return the process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Peak(threading.Thread):
    """Looks at the process's anonymous memory every 10 ms until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self._most, self._stopped = anonymous_bytes(), threading.Event()
        self.start()

    def run(self) -> None:
        """Look until stopped."""
        while not self._stopped.wait(0.01):
            self._most = max(self._most, anonymous_bytes())

    def stop(self) -> int:
        """Return the largest value seen."""
        self._stopped.set()
        self.join()
        return max(self._most, anonymous_bytes())
