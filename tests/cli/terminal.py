"""A pseudo-terminal with `hybrid-k2` in it: type, wait for what appears, read the screen's text."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from types import TracebackType

WAIT_S = 60.0
# The terminal becomes the controlling one, so that Ctrl-C reaches the process as from a keyboard.
START = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from hybrid_k2.cli.main import run
run()
"""
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")


class Terminal:
    """`hybrid-k2` in a terminal of its own; everything that it printed is in `text`."""

    def __init__(self, arguments: list[str], environment: dict[str, str], columns: int = 80, rows: int = 24) -> None:
        self.text = ""
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._keyboard, child = pty.openpty()
        self.resize(columns, rows)
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
        )
        os.close(child)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._keyboard)

    @property
    def plain(self) -> str:
        """The text without escape sequences and carriage returns."""
        return ESCAPES.sub("", self.text).replace("\r", "")

    def resize(self, columns: int, rows: int = 24) -> None:
        """Change the size of the window."""
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._keyboard, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Wait until new text matches; return the text since the match before, up to the end of this one."""
        deadline = time.monotonic() + WAIT_S
        while True:
            if match := re.search(pattern, self.plain[self._seen :]):
                since = self.plain[self._seen : self._seen + match.end()]
                self._seen += match.end()
                return since
            if not self._read(deadline):
                raise AssertionError(f"{pattern!r} did not appear; since the last match: {self.plain[self._seen :]!r}")

    def exit_code(self) -> int:
        """Wait for the end of the process."""
        deadline = time.monotonic() + WAIT_S
        while self._read(deadline):
            pass
        return self._process.wait(WAIT_S)

    def _read(self, deadline: float) -> bool:
        """Take what was printed; False at the end or when the time is over."""
        ready = select.select([self._keyboard], [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            return False
        try:
            data = os.read(self._keyboard, 65536)
        except OSError:  # Linux says EIO when the process has gone
            return False
        self.text += self._decoder.decode(data)
        return bool(data)
