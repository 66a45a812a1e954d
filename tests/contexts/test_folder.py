"""Folders of packets: they belong to one user, and each part to one living server."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kara_kernels.contexts.folder import Slot, check_folder, grain_file, is_locked, own_folder, take_lock


def test_a_folder_that_only_its_owner_may_enter(tmp_path: Path) -> None:
    for _ in range(2):
        assert own_folder(tmp_path / "new" / "store").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match=r"path: expected a folder of this user's, .* may enter \(mode 755\): "):
        own_folder(tmp_path / "open")


def test_links_and_files_are_refused(tmp_path: Path) -> None:
    own_folder(tmp_path / "store")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="got a link: "):
        own_folder(tmp_path / "link")
    with pytest.raises(ValueError, match="got no folder: "):
        own_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_is_refused(tmp_path: Path) -> None:
    os.chown(own_folder(tmp_path / "store"), 12345, -1)
    with pytest.raises(ValueError, match="got a folder of user 12345: "):
        own_folder(tmp_path / "store")


def test_looking_at_a_folder_makes_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_folder(tmp_path / "none")
    assert not is_locked(own_folder(tmp_path / "store"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "store"]


def test_who_looks_sees_servers_and_takes_no_slot_from_them(tmp_path: Path) -> None:
    slot = Slot(tmp_path / "store")
    assert is_locked(slot.path)
    assert take_lock(slot.path) is None
    slot.close()
    assert not is_locked(slot.path)
    looking = os.open(slot.path / "lock", os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # as is_locked, caught in its instant
    assert take_lock(slot.path) is None
    threading.Timer(0.005, os.close, [looking]).start()
    assert Slot(tmp_path / "store").path == slot.path


def test_files_are_named_by_copy_and_grain() -> None:
    """At most 4,096 folders, with one folder in each; the rest of the name is a digest."""
    digest = hashlib.sha256(b"7 12").hexdigest()
    assert grain_file(7, 12) == f"{digest[:3]}/00_g0/{digest[:3]}000{digest}.bin"
    names = {grain_file(copy, grain) for copy in range(30) for grain in range(30)}
    assert len(names) == 900
    assert {name.split("/")[1] for name in names} == {"00_g0"}


def test_servers_do_not_share_a_slot(tmp_path: Path) -> None:
    first, second = Slot(tmp_path / "store"), Slot(tmp_path / "store")
    assert [first.path.name, second.path.name] == ["server-0", "server-1"]
    first.close()
    assert Slot(tmp_path / "store").path.name == "server-0"
    second.close()


def test_a_killed_server_leaves_its_slot(tmp_path: Path) -> None:
    code = f"""if True:
        import os, pathlib
        from kara_kernels.contexts.folder import Slot
        slot = Slot(pathlib.Path({str(tmp_path / "store")!r}))
        print(slot.path.name, flush=True)
        os.kill(os.getpid(), 9)
    """
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "server-0"
        assert done.returncode == -9
