"""Durability and locks of files."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from gossamer.errors import ConfigError, storage_errors

LOCK = ".lock"


def sync(path: Path) -> None:
    """Sync a file's content, or a directory's entries, to the disk.

    Raises:
        OSError: the disk refuses.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of `content`; if that fails, truncate the file to `offset`.

    Raises:
        OSError: the disk refuses.
    """
    done = 0
    try:
        while done < len(content):
            done += os.pwrite(descriptor, content[done:], offset + done)
    except OSError:
        os.ftruncate(descriptor, offset)
        raise


def remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that it holds.

    Raises:
        OSError: the disk refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def lock(path: Path) -> int | None:
    """Lock the file `path`, created if needed, against other processes.

    The kernel releases the lock when this process dies, and forked workers do not inherit it.

    Returns:
        a descriptor, to be closed to release the lock; None where the system or the disk has no such locks.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be created.
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


def is_locked(directory: Path) -> bool:
    """Say whether another process has locked a directory; nothing is created. See `DirectoryLock`."""
    if not os.access(directory / LOCK, os.W_OK):
        return False
    try:
        descriptor = lock(directory / LOCK)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name, sync it, and rename it.

    Raises:
        StorageError: the disk refuses a write.
    """
    aside = path.with_name(f".{path.name}.writing")
    with storage_errors(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync(path.parent)


class DirectoryLock:
    """Exclusive use of a directory, which is made if needed, among processes."""

    def __init__(self, directory: Path) -> None:
        """Make and lock `directory`.

        Raises:
            ConfigError: another process has locked it.
            StorageError: it cannot be made.
        """
        self.directory = directory
        with storage_errors(directory):
            self._made = [path for path in (directory, *directory.parents) if not path.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            self._present = set(os.listdir(directory))
            try:
                self._descriptor = lock(directory / LOCK)
            except BlockingIOError:
                raise ConfigError(
                    f"another process works on the run in {str(directory)!r}: wait for it, or stop it, and try again"
                ) from None

    def close(self, discard: bool = False) -> None:
        """Release the lock; a second call does nothing.

        Args:
            discard: whether to remove what was written into the directory since, and the directories made for it.
        """
        with suppress(OSError):
            for name in set(os.listdir(self.directory)) - self._present if discard else ():
                remove(self.directory / name)
            for path in self._made if discard else ():
                path.rmdir()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
