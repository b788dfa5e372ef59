"""One open file of a checkpoint: reading ranges of it, and noticing that it changes meanwhile."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hybrid_k2.errors import CheckpointError


@dataclass(frozen=True)
class FileIdentity:
    """Tell whether a name still means the same file with the same content.

    changed_ns: when content, owner or permissions changed last. Unlike the time of the last write nobody can set it.
    """

    device: int
    inode: int
    nbytes: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """Take what the system says about a file."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)

    def difference(self, now: FileIdentity) -> str:
        """Say what has happened to the file since."""
        if (now.device, now.inode) != (self.device, self.inode):
            return "another file of that name"
        if now.nbytes != self.nbytes:
            return f"{now.nbytes} bytes instead of {self.nbytes}"
        return "one that was changed"


class OpenedFile:
    """Read a file by ranges, from any number of threads.

    `identity` is taken before the first byte is read. Messages begin with the name of the tensor that is wanted.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.identity = FileIdentity.of(os.fstat(file.fileno()))

    @classmethod
    def open(cls, path: Path, named_by: str) -> OpenedFile:
        """Open a regular file; `named_by` says who claims that it exists. Raises: CheckpointError."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise CheckpointError(f"{path}: expected a file, got something else of that name")
            return cls(path, open(path, "rb", buffering=0))
        except FileNotFoundError:
            link = "expected a file, got a link to one that does not exist"
            raise CheckpointError(
                f"{path}: {link if path.is_symlink() else f'expected the file that {named_by} names, got none'}",
                hint="the download is incomplete: fetch the missing file",
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error

    def fileno(self, tensor: str) -> int:
        """Return the descriptor, which stays open until `close`. Raises: CheckpointError if it is closed."""
        if self.file.closed:
            raise CheckpointError(f"{tensor}: expected an open checkpoint, got a closed one (in {self.path})")
        return self.file.fileno()

    def read_into(self, memory: memoryview, offset: int, tensor: str) -> None:
        """Fill `memory` from the file, in as many reads as it takes. Raises: CheckpointError."""
        fd, done = self.fileno(tensor), 0
        try:
            while done < len(memory) and (count := os.preadv(fd, [memory[done:]], offset + done)):
                done += count
        except OSError as error:
            raise CheckpointError(f"{tensor}: cannot be read: {error.strerror} (in {self.path})") from error
        if done != len(memory):
            raise CheckpointError(f"{tensor}: expected {len(memory)} bytes, got {done} (in {self.path})")

    def check_unchanged(self, tensor: str) -> None:
        """Check that the file of this name is the one that was opened, with the size and time of change it had then.

        To be called after a read: bytes that were read before a change belong together.
        Raises: CheckpointError.
        """
        try:
            now = FileIdentity.of(os.stat(self.path))
        except OSError as error:
            raise CheckpointError(
                f"{tensor}: expected a file that stays until it is loaded: {error.strerror} (in {self.path})"
            ) from error
        if now != self.identity:
            raise CheckpointError(
                f"{tensor}: expected a file that does not change while it is loaded, "
                f"got {self.identity.difference(now)} (in {self.path})",
                hint="wait until the download or copy is complete, then load again",
            )

    def close(self) -> None:
        """Close the file; later reads fail."""
        self.file.close()
