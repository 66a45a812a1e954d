"""A folder of packets on a disk: it belongs to one user, and each part of it to one server at a time.

    PATH/<first 16 digits of the model's digest>/server-<n>/
        lock               held by the server whose part this is
        directory.json     what lies here; see :meth:`~kara_kernels.contexts.directory.Directory.save`
        packets/*/         a file for each grain of each copy, named by :func:`grain_name`

A grain's file is a row of the memory that workers share: a grain of each worker, one behind the other, and what aligns
rows to pages. So a worker's packet lies in its parts of the files of a copy.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from pathlib import Path

DISK = "disk"
"""The tier of copies that lie here."""
DIRECTORY, PACKETS = "directory.json", "packets"
MOST = 1024  # servers at one folder
GLANCE = 0.02  # seconds for which one who only looks may hold a lock, at most


def own_folder(path: Path) -> Path:
    """Creates a folder that only its owner may enter, if there is none.

    Raises:
        ValueError: it is a link, no folder, somebody else's, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(path.parent, exist_ok=True)
        os.mkdir(path, 0o700)
    return check_folder(path)


def check_folder(path: Path) -> Path:
    """Raises ValueError as :func:`own_folder`, and FileNotFoundError."""
    found = os.lstat(path)
    what = ""
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
    elif found.st_uid != os.geteuid():
        what = f"a folder of user {found.st_uid}"
    elif found.st_mode & 0o077:
        what = f"a folder that others may enter (mode {stat.S_IMODE(found.st_mode):o})"
    if what:
        raise ValueError(f"path: expected a folder of this user's, of mode 700, or none yet, got {what}: {path}")
    return path


def take_lock(part: Path) -> int | None:
    """The lock of a server's part, until its descriptor is closed or the process ends, however it ends. None: somebody
    has it."""
    lock = os.open(part / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def is_locked(part: Path) -> bool:
    """Whether a server has this part. Changes nothing, and holds the lock for an instant to find out."""
    try:
        lock = os.open(part / "lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


class Slot:
    """One server's part of a folder: the first that no living server has. A restarted server finds what it left."""

    def __init__(self, folder: Path) -> None:
        for number in range(MOST):
            path = own_folder(own_folder(folder) / f"server-{number}")
            if (lock := take_lock(path)) is None:
                time.sleep(GLANCE)
                lock = take_lock(path)
            if lock is not None:
                self.path, self._lock = path, lock
                return
        raise ValueError(f"path: expected fewer than {MOST} servers at one folder: {folder}")

    def close(self) -> None:
        os.close(self._lock)


def grain_name(copy: int, grain: int) -> bytes:
    """Names the file of a copy's grain. vLLM makes a folder of the first three hexadecimal digits and one of the next
    two. Here these two are always 0, because folders are never deleted."""
    digest = hashlib.sha256(f"{copy} {grain}".encode()).digest()
    return bytes([digest[0], digest[1] & 0xF0, 0]) + digest


def grain_file(copy: int, grain: int) -> str:
    """Where vLLM's tier puts a grain, below the folder that it makes in ``packets``."""
    name = grain_name(copy, grain).hex()
    return f"{name[:3]}/{name[3:5]}_g0/{name}.bin"


def packet_files(part: Path) -> list[Path]:
    """Every file that vLLM's tier has written or begun in a server's part, wanted or not. Links are not followed."""
    found = (Path(top, name) for top, _, names in os.walk(part / PACKETS) for name in names)
    return sorted(path for path in found if path.suffix in (".bin", ".tmp"))
