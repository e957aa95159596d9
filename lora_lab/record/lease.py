"""A lease on a run: an advisory lock on a file, held by a process while it works and freed by the kernel when it dies.

The lock is flock(2) on an open file, so SIGKILL frees it and no clock is involved. The file's content says who holds
it; it is information only and may be stale. Child processes close their inherited copy at once, so that a surviving
worker cannot keep a dead parent's lease.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from lora_lab.record.atomic import disk_error

# A reader looks at a lock by sharing it for microseconds; a claimer that meets one waits at most this long.
_READER_PATIENCE_SECONDS = 5.0
_READER_PAUSE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds, or last held, a lease."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lease:
    """An exclusive lock on `path` until `release` or the end of the process. Made by `take`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        _held.add(self)

    def release(self) -> None:
        """Give the lease back; doing so twice is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _held.discard(self)

    def close_inherited(self) -> None:
        """In a forked child: drop the copied descriptor; the parent's lock stays."""
        self.release()


_held: weakref.WeakSet[Lease] = weakref.WeakSet()


def _close_in_child() -> None:
    for lease in list(_held):
        lease.close_inherited()


os.register_at_fork(after_in_child=_close_in_child)


def take(path: Path) -> Lease | None:
    """The lease on `path` (created where missing), or None while another holder, in this process or any, has it.

    Raises:
        MachineError: the lock file cannot be made or written.
    """
    try:
        descriptor = _lock(path)
    except OSError as error:
        raise disk_error(error, path=path) from error
    if descriptor is None:
        return None
    lease = Lease(path, descriptor)
    try:
        _sign(descriptor)
    except OSError as error:
        lease.release()
        raise disk_error(error, path=path) from error
    return lease


def _lock(path: Path) -> int | None:
    deadline = time.monotonic() + _READER_PATIENCE_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        if _try_lock(descriptor, fcntl.LOCK_EX):
            if _is_still(path, descriptor):
                return descriptor
            os.close(descriptor)  # the file was replaced between open and lock
            continue
        only_readers = _try_lock(descriptor, fcntl.LOCK_SH)
        os.close(descriptor)
        if not only_readers or time.monotonic() > deadline:
            return None
        time.sleep(_READER_PAUSE_SECONDS)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        os.close(descriptor)
        raise
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _sign(descriptor: int) -> None:
    content = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def is_held(path: Path) -> bool:
    """Whether a process holds the lease now. A lock file that is missing or may not be read is not held."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    finally:
        os.close(descriptor)
    return False


def owner_of(path: Path) -> Owner | None:
    """Who signed the lock file last, or None where it says nothing readable."""
    try:
        content = json.loads(path.read_bytes())
        return Owner(pid=int(content["pid"]), host=str(content["host"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
