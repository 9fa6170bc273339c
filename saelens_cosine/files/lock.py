"""One run at a time in a folder.

The lock is the kernel's (`flock`), so that it ends with its process however that ends. Its file says who holds it. Where the
file system has no such locks, the file itself is the lock, and it is stale when its process is dead on this host.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LOCK = ".saelens-cosine.lock"
"""Its file in an output folder, while a run writes there."""


class OutputInUseError(OSError):
    """Another run writes to the folder."""


_held: set[int] = set()


def _let_go_in_a_child() -> None:
    for descriptor in _held:  # else a worker that outlives a killed run would hold its lock
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_a_child)


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder's lock.

    Raises:
        OutputInUseError: another run holds it; names its process, its host and its start.
        OSError: the folder cannot be written.
    """
    path = folder / LOCK
    descriptor = _take(path)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            try:
                with suppress(OSError):  # the folder may be gone, or closed to us, by now
                    if _is(path, descriptor):
                        path.unlink()
            finally:
                os.close(descriptor)


def _take(path: Path) -> int:
    """A descriptor of the lock's file, locked, with this process written in it."""
    while True:
        descriptor, new = _open(path)
        if descriptor is None:
            continue
        free = _flock(descriptor)
        if _is(path, descriptor):
            if free or (free is None and new):
                mine = {"process": os.getpid(), "host": socket.gethostname(), "started": _now()}
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(mine).encode(), 0)
                os.fsync(descriptor)
                return descriptor
            owner = _owner(descriptor)
            if free is not None or not _dead(owner):
                os.close(descriptor)
                raise OutputInUseError(_in_use(path, owner))
            path.unlink(missing_ok=True)
        os.close(descriptor)  # stale, or removed by its owner meanwhile


def _open(path: Path) -> tuple[int | None, bool]:
    """The file's descriptor and whether it is new; none if it went just now."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(f"{path} is no file, and the place of this package's lock. Move it away.") from None
            return descriptor, False
    return None, False


def _flock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours now; None where there are no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> dict[str, Any]:
    """What the file says; empty if it says nothing within a second, in which its owner would have written it."""
    for _ in range(20):
        with suppress(ValueError):
            owner = json.loads(os.pread(descriptor, 4096, 0))
            return owner if isinstance(owner, dict) else {}
        time.sleep(0.05)
    return {}


def _dead(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this host and does no more."""
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _in_use(path: Path, owner: dict[str, Any]) -> str:
    who = "another run"
    if owner:
        who = f"process {owner.get('process')} on {owner.get('host')}, started {owner.get('started')},"
    return (
        f"{path.parent} is in use: {who} writes to it. Wait for it or choose another folder; if that process is certain to "
        f"be gone, remove {path}."
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
