"""A folder of packets on a disk: it belongs to one user, and each part of it to one server at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

MOST = 1024  # servers at one folder


def own_folder(path: Path) -> Path:
    """Creates a folder that only its owner may enter, if there is none.

    Raises:
        ValueError: it is a link, no folder, somebody else's, or open to others.
    """
    with contextlib.suppress(FileExistsError):
        os.makedirs(path.parent, exist_ok=True)
        os.mkdir(path, 0o700)
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


class Slot:
    """One server's part of a folder: the first that no living server has. The kernel lets go of it when the process
    ends, however it ends, so a restarted server finds what it left."""

    def __init__(self, folder: Path) -> None:
        for number in range(MOST):
            path = own_folder(own_folder(folder) / f"server-{number}")
            lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self.path, self._lock = path, lock
            return
        raise ValueError(f"path: expected fewer than {MOST} servers at one folder: {folder}")

    def close(self) -> None:
        os.close(self._lock)
