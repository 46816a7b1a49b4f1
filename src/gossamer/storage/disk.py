"""What the file system is asked for beyond reading and writing: durability, and keeping others away."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Force a file's content, or a directory's entries, onto the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path) -> int | None:
    """Hold the file `path`, which is made if need be, against other processes.

    The kernel lets go of it when this process dies, and forked workers do not inherit it.

    Returns:
        a descriptor; closing it lets go. None where the system or the disk knows no such locks.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path)) from None
        return None
    return descriptor
