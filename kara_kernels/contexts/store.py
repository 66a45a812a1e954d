"""What lies in the folder of a disk tier, read and deleted without an engine; :mod:`.folder` says how it is laid out.

Servers may run meanwhile. What one of them holds is read and never changed. Its snapshot may be some seconds old, but a
file never changes under its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..values import check_count
from .directory import Copy, Snapshot, read_snapshot, write_snapshot
from .folder import DIRECTORY, DISK, PACKETS, check_folder, grain_file, is_locked, packet_files, take_lock
from .packet import (
    MOST_DESCRIPTION,
    ForeignPacket,
    Header,
    Packet,
    PacketError,
    Step,
    TruncatedPacket,
    UnknownVersion,
    read_packet,
)
from .utility import MAX_BYTES

MODEL, SERVER = re.compile(r"[0-9a-f]{16}"), re.compile(r"server-\d+")
MOST_HEADER = MOST_DESCRIPTION + 4096  # bytes that hold any header


class InUse(Exception):
    """A running server has this part."""


class Shape(NamedTuple):
    """Of files, as the server saved it."""

    grain: int
    """Bytes of each worker."""
    row: int
    """Bytes of a file."""
    workers: int

    @classmethod
    def of(cls, snapshot: Snapshot) -> Shape:
        """Raises ValueError if an older server has saved it."""
        if not snapshot.about:
            raise ValueError(
                "expected a snapshot with sizes of files, got one of an older server; the next one adds them"
            )
        try:
            grain, row, workers = (check_count(name, snapshot.about.get(name), 1, MAX_BYTES) for name in cls._fields)
            check_count("row", row, grain * workers, MAX_BYTES)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return cls(grain, row, workers)


class Fault(NamedTuple):
    """Why a context cannot be read."""

    kind: str
    """``"missing"``, ``"truncated"``, ``"damaged"``, ``"foreign"`` or ``"unreadable"``."""
    what: str


@dataclass(frozen=True)
class Stored:
    """A context on the disk.

    Args:
        model: the digits that its folder is named by.
        files: of its grains; None for those that are missing. Of more grains than there are files, some are left out.
    """

    model: str
    copy: Copy
    shape: Shape
    files: Sequence[Path | None]

    @property
    def grains(self) -> int:
        return -(-self.copy.option.nbytes // self.shape.grain)

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, if none is missing."""
        return self.grains * self.shape.row

    @property
    def saved(self) -> float | None:
        """When its files were written, in seconds since 1970; None if one is missing."""
        try:
            return max(os.stat(file).st_mtime for file in self.files if file) if all(self.files) else None
        except FileNotFoundError:
            return None

    def header(self, worker: int = 0) -> Header:
        """What a worker's packet says about itself. Raises as :meth:`packet`."""
        return Header.read(self._read(worker, MOST_HEADER))

    def step(self, header: Header) -> Step:
        """The compression that is stored. Raises TruncatedPacket if none of the header's takes as many grains."""
        fits = [step for step in header.steps if -(-step.nbytes // self.shape.grain) == self.grains]
        if not fits:
            raise TruncatedPacket(f"grains: expected as many as one of the packet's steps takes, got {self.grains}")
        return min(fits, key=lambda step: abs(step.ratio - self.copy.option.ratio))

    def packet(self, worker: int) -> Packet:
        """A worker's packet, verified.

        Raises:
            PacketError: one of its kinds, also where a file has another size, or another context or worker is in it.
            FileNotFoundError: a file is missing.
            OSError: it cannot be read.
        """
        data = self._read(worker)
        packet = read_packet(data[: self.step(Header.read(data)).nbytes])
        packet.require(context=self.copy.key)
        digest, _, rank = packet.header.model.partition(" ")
        if not digest.startswith(self.model) or rank != f"{worker:04}":
            raise ForeignPacket(f"model: expected {self.model}... {worker:04}, got {packet.header.model!r}")
        return packet

    def fault(self) -> Fault | None:
        """Reads the packets of all workers."""
        worker = 0
        try:
            for worker in range(self.shape.workers):
                self.packet(worker)
        except PacketError as error:
            kinds = {TruncatedPacket: "truncated", ForeignPacket: "foreign", UnknownVersion: "foreign"}
            return Fault(kinds.get(type(error), "damaged"), f"worker {worker}: {error}")
        except FileNotFoundError as error:
            return Fault("missing", str(error))
        except OSError as error:
            return Fault("unreadable", str(error))
        return None

    def _read(self, worker: int, most: int | None = None) -> memoryview:
        """A worker's bytes out of the files, whole grains, the first ``most`` at least."""
        grain, row, _ = self.shape
        data = bytearray()
        for i, file in enumerate(self.files):
            if most is not None and len(data) >= most:
                break
            if file is None:
                raise FileNotFoundError(f"grain {i} of {self.grains}: no file")
            with file.open("rb") as opened:
                if (size := os.fstat(opened.fileno()).st_size) != row:
                    raise TruncatedPacket(f"grain {i} of {self.grains}: expected a file of {row} bytes, got {size}")
                opened.seek(worker * grain)
                data += opened.read(grain)
        return memoryview(data)


class Part:
    """One server's part of a store. Raises ValueError for a folder that is not this user's alone."""

    def __init__(self, path: Path) -> None:
        self.path = check_folder(path)
        if (path / PACKETS).is_symlink():
            raise ValueError(f"path: expected a folder, got a link: {path / PACKETS}")

    @property
    def model(self) -> str:
        return self.path.parent.name

    @property
    def server(self) -> str:
        return self.path.name

    @property
    def in_use(self) -> bool:
        return is_locked(self.path)

    @property
    def snapshot(self) -> Snapshot:
        """Empty before the server has saved one. Raises ValueError if it is damaged."""
        try:
            return read_snapshot(self.path / DIRECTORY)
        except FileNotFoundError:
            return Snapshot(0, [], {})

    def contexts(self) -> list[Stored]:
        """Raises ValueError for a snapshot that is damaged, or too old to say how large files are."""
        snapshot = self.snapshot
        copies = [copy for copy in snapshot.copies if copy.tier == DISK]
        if not copies:
            return []
        shape, found = Shape.of(snapshot), {"/".join(file.parts[-3:]): file for file in packet_files(self.path)}
        stored = []
        for copy in copies:
            grains = -(-copy.option.nbytes // shape.grain)
            files = [found.get(grain_file(copy.number, i)) for i in range(min(grains, len(found) + 1))]
            stored.append(Stored(self.model, copy, shape, files))
        return stored

    def strays(self, contexts: Sequence[Stored]) -> list[Path]:
        """Files of packets that none of the contexts has."""
        named = {file for each in contexts for file in each.files}
        return [file for file in packet_files(self.path) if file not in named]

    def drop(self, chosen: Callable[[Stored], bool]) -> list[Stored]:
        """Deletes the contexts that are ``chosen``, and strays. A crash leaves more strays, and no context in part.

        Raises:
            InUse: a running server has this part.
            ValueError: as :meth:`contexts`.
        """
        with self._held():
            contexts = self.contexts()
            gone = [each for each in contexts if chosen(each)]
            numbers = {each.copy.number for each in gone}
            if gone:
                snapshot = self.snapshot
                copies = [copy for copy in snapshot.copies if copy.number not in numbers]
                write_snapshot(self.path / DIRECTORY, snapshot._replace(copies=copies))
            _delete(self.strays([each for each in contexts if each.copy.number not in numbers]))
        return gone

    def clear(self) -> None:
        """Deletes everything, whatever the snapshot says. Raises InUse."""
        with self._held():
            (self.path / DIRECTORY).unlink(missing_ok=True)
            _delete(packet_files(self.path))

    @contextmanager
    def _held(self) -> Iterator[None]:
        lock = take_lock(self.path)
        if lock is None:
            raise InUse(f"{self.model}/{self.server}: expected no running server, got one that uses it")
        try:
            yield
        finally:
            os.close(lock)


def parts_of(path: Path) -> list[Part]:
    """All parts of a store, by model and server.

    Raises:
        FileNotFoundError, ValueError: there is no store, or one that is not this user's alone.
    """
    models = [each for each in sorted(check_folder(path).iterdir()) if MODEL.fullmatch(each.name)]
    servers = [each for model in models for each in check_folder(model).iterdir() if SERVER.fullmatch(each.name)]
    if not servers:
        raise ValueError(f"path: expected the folder of a disk tier, got one that no server has used: {path}")
    return [Part(each) for each in sorted(servers, key=lambda each: (each.parent, len(each.name), each.name))]


def _delete(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
