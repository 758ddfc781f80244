"""Folders that a run works in: where they lie, one process at a time, and what becomes of them.

The lock is ``flock`` on the folder itself: it leaves no file behind, never waits, and the operating system releases it when the
process ends, however it ends. Limits: where there is no ``fcntl`` (Windows), or a file system cannot lock a folder (some network
ones), nothing is locked; on network file systems a lock may hold on one machine only.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixbits.errors import DataError

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have ``folder`` (made if it is not there) for this process alone. Raises DataError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = _is_same(handle, folder)  # not removed by the process that had it until now
        except OSError as error:
            is_free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        if not is_free:
            raise DataError(
                f"{folder}: another process is working in this folder; wait until it has ended, or choose another output folder"
            )
        yield
    finally:
        os.close(handle)


def _is_same(handle: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder))
    except FileNotFoundError:
        return False


def work_folder(output: str | Path) -> Path:
    """Where a command's checkpoints lie until ``output`` is written: ``<output>.work``."""
    output = Path(output)
    return output.with_name(output.name + ".work")


@contextmanager
def workplace(output: Path, key: str) -> Iterator[Path]:
    """A folder in ``<output>.work`` named after the fingerprint ``key``, while a command makes ``output``; ``<output>.work`` is locked.

    It is removed when the command is done, or has failed before it left anything to resume from. Raises DataError when another
    process is at work on the same output.
    """
    work = work_folder(output)
    place = work / key[:16]
    with locked(work):
        try:
            yield place
        except BaseException:
            if not any(any(place.rglob(name)) for name in ("checkpoint-*", "codes.pt")):
                _remove(place, work)
            raise
        _remove(place, work)


def _remove(place: Path, work: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    if not any(work.iterdir()):
        work.rmdir()
