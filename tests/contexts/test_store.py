"""Stores without an engine: files as vLLM's tier writes them, and the commands that read and delete them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from packets import Context

from kara_kernels.contexts import store as module
from kara_kernels.contexts.__main__ import main
from kara_kernels.contexts.directory import Directory, read_snapshot
from kara_kernels.contexts.folder import Slot, grain_file, own_folder, take_lock
from kara_kernels.contexts.packet import Header, Packet, seal
from kara_kernels.contexts.store import Part, Stored, parts_of
from kara_kernels.contexts.utility import Option, Tier

MODEL = "0123456789abcdef" + 48 * "0"
OTHER = "fedcba9876543210" + 48 * "0"
KEYS = [f"{name * 32}.256" for name in ("a1", "a2", "b3")]
GRAIN = 5120
Said = Callable[..., tuple[int, str, str]]


def packet_of(key: str, worker: int, model: str = MODEL, sections: int | None = None) -> Packet:
    """Of 256 tokens, nine grains, different for every key and worker."""
    made = Context.random(256, dim=16, v_dim=16, seed=int(key[:2], 16) * 8 + worker).packet()
    packet = seal(Header(f"{model} {worker:04}", key, made.header.layout, "knorm"), made.payload)
    return packet if sections is None else packet.cut(sections)


def write(
    path: Path, keys: list[str], workers: int = 1, model: str = MODEL, sections: int | None = None, grain: int = GRAIN
) -> Part:
    """A part as a server leaves it: a copy in memory, too, and numbers that are not those of places."""
    slot = Slot(own_folder(path) / model[:16])
    row = -(-grain * workers // 4096) * 4096
    directory = Directory([Tier("ram", 10**9, 1e10), Tier("disk", 10**9, 1e9)])
    for key in ["c" * 64 + ".512", *keys]:
        parts = [packet_of(key, worker, model, sections).to_bytes() for worker in range(workers)]
        grains = -(-len(parts[0]) // grain)
        option = Option("none/int8", packet_of(key, 0, model, sections).step.ratio, grains * grain, 0.9999)
        transfer = directory.store(key, option, "disk" if key in keys else "ram")
        assert transfer is not None
        assert transfer.target is not None
        directory.finish(transfer)
        for i in range(grains if key in keys else 0):
            file = slot.path / "packets" / "packets_0a1b2c3d4e5f_r0" / grain_file(transfer.target.number, i)
            file.parent.mkdir(parents=True, exist_ok=True)
            cells = [part[i * grain : (i + 1) * grain].ljust(grain, b"\xee") for part in parts]
            file.write_bytes(b"".join(cells).ljust(row, b"\xee"))
    about = {"model": "some/model", "grain": grain, "row": row, "workers": workers}
    directory.save(slot.path / "directory.json", about)
    slot.close()
    return Part(slot.path)


def files_of(part: Part, key: str) -> list[Path]:
    return [file for file in found(part, key).files if file is not None]


def found(part: Part, key: str) -> Stored:
    return next(each for each in part.contexts() if each.copy.key == key)


def everything(path: Path) -> list[Path]:
    return sorted(each for each in path.rglob("*") if not each.is_dir())


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# ---------------------------------------------------------------------------------------------------------- ls and show


def test_ls_says_what_lies_where_and_changes_nothing(tmp_path: Path, say: Said) -> None:
    store = tmp_path / "store"
    write(store, KEYS, workers=3)
    other = write(store, KEYS[:1], model=OTHER)
    (other.path / "lock").unlink()
    before = everything(store)
    holding = Slot(store / MODEL[:16])
    code, out, _ = say("ls", store)
    holding.close()
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:6] for line in lines[1:5]] == [
        *[["01234567", "server-0", "*", key[:12], "256", "none/int8"] for key in KEYS],
        ["fedcba98", "server-0", KEYS[0][:12], "256", "none/int8", "0.63"],
    ]
    assert "4 contexts, " in lines[5]
    assert "of 2 servers, 1 running (*)" in lines[5]
    assert lines[6:] == ["01234567: some/model", "fedcba98: some/model"]
    assert everything(store) == before


def test_ls_for_machines(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS, workers=3)
    read = json.loads(say("ls", tmp_path / "store", "--json")[1])
    assert read["servers"] == [
        {"model": MODEL[:16], "model_name": "some/model", "server": "server-0", "in_use": False, "error": None}
    ]
    assert [row["context"] for row in read["contexts"]] == KEYS
    for row in read["contexts"]:
        files = files_of(part, row["context"])
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        assert row["saved"] == max(file.stat().st_mtime for file in files)
        assert (row["tokens"], row["method"], row["in_use"]) == (256, "none/int8", False)


def test_show_says_everything_about_a_context(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS, workers=3)
    code, out, _ = say("show", tmp_path / "store", "b3")
    assert code == 0
    header = packet_of(KEYS[2], 0).header
    for expected in (
        KEYS[2], "some/model", "server-0", "whole: every checksum fits", "256 of 256 tokens, in 2 layers and 2 heads",
        "16 + 16 values of bfloat16", "int8", "knorm", *(f"{s.kind}, grade {s.grade}" for s in header.layout.sections),
        *(f"{s.sections} sections: {s.ratio:.3f}" for s in header.steps), *map(str, files_of(part, KEYS[2])),
    ):  # fmt: skip
        assert expected in out
    file = files_of(part, KEYS[2])[1]
    file.write_bytes(file.read_bytes()[:-4096])
    code, out, _ = say("show", tmp_path / "store", "b3")
    assert code == 1
    assert "state       truncated: worker 0: grain 1 of " in out


@pytest.mark.parametrize("prefix", ["a", "ff"])
def test_a_prefix_of_no_context_or_of_several_is_refused(tmp_path: Path, say: Said, prefix: str) -> None:
    write(tmp_path / "store", KEYS)
    for words in (["show"], ["drop"]):
        code, _, err = say(*words, tmp_path / "store", prefix)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"expected the first digits of one context, got '{prefix}' of {2 if prefix == 'a' else 0}" in err


# --------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("sections", [None, 5])
@pytest.mark.parametrize("grain", [GRAIN, 65536])
def test_what_a_server_left_is_whole(tmp_path: Path, say: Said, workers: int, sections: int | None, grain: int) -> None:
    """Also where several of a packet's steps take as many grains: it is not taken for a shorter one."""
    part = write(tmp_path / "store", KEYS, workers, sections=sections, grain=grain)
    assert say("verify", tmp_path / "store")[:2] == (0, "3 whole\n")
    for each in part.contexts():
        for worker in range(workers):
            expected = packet_of(each.copy.key, worker, sections=sections)
            assert each.packet(worker).to_bytes() == expected.to_bytes()


def spoil(part: Part, fault: str, worker: int) -> None:
    """Damages the first context and no other."""
    first, *_, last = files_of(part, KEYS[0])
    data, at = bytearray(first.read_bytes()), worker * GRAIN
    if fault == "missing":
        last.unlink()
    elif fault == "linked":
        shutil.move(last, last.with_suffix(".moved"))
        last.symlink_to(last.with_suffix(".none"))
    elif fault == "truncated":
        first.write_bytes(data[:-1])
    elif fault == "no packet":
        data[at] ^= 1
        first.write_bytes(data)
    elif fault == "description":
        data[at + 40] ^= 1
        first.write_bytes(data)
    elif fault == "rows":
        data[at + GRAIN - 1] ^= 128
        first.write_bytes(data)
    elif fault == "version":
        data[at + 8] = 2
        first.write_bytes(data)
    elif fault == "another context":
        for mine, other in zip(files_of(part, KEYS[0]), files_of(part, KEYS[1]), strict=True):
            shutil.copy(other, mine)
    elif fault == "another worker":
        for file in files_of(part, KEYS[0]):
            data = bytearray(file.read_bytes())
            data[at : at + GRAIN] = data[:GRAIN]
            file.write_bytes(data)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("missing", "missing: grain 8 of 9: no file"),
        ("linked", "missing: "),
        ("truncated", "truncated: worker 0: grain 0 of 9: expected a file of 16384 bytes, got 16383"),
        ("no packet", "damaged: worker 2: magic: "),
        ("description", "damaged: worker 2: description: "),
        ("rows", "damaged: worker 2: section "),
        ("version", "foreign: worker 2: version: expected 1, got 2"),
        ("another context", f"foreign: worker 0: context: expected '{KEYS[0]}', got '{KEYS[1]}'"),
        ("another worker", "foreign: worker 2: model: expected 0123456789abcdef... 0002, got "),
    ],
)
def test_what_is_wrong_is_named_and_can_be_deleted(tmp_path: Path, say: Said, fault: str, expected: str) -> None:
    part = write(tmp_path / "store", KEYS, workers=3)
    spoil(part, fault, 2)
    before = everything(tmp_path)
    code, out, _ = say("verify", tmp_path / "store")
    assert code == 1
    assert out.splitlines()[0].startswith(f"01234567/server-0 {KEYS[0][:12]}: {expected}")
    assert "2 whole" in out.splitlines()[-1]
    assert everything(tmp_path) == before
    assert say("verify", tmp_path / "store", "--delete")[0] == 1
    assert say("verify", tmp_path / "store")[:2] == (0, "2 whole\n")
    assert [each.copy.key for each in part.contexts()] == KEYS[1:]
    assert [file.suffix for file in everything(part.path / "packets") if file.suffix != ".moved"] == [".bin"] * 18


def test_one_file_less_than_there_should_be_is_missing(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS[:1])
    files_of(part, KEYS[0])[-1].unlink()
    assert "missing: grain 8 of 9: no file" in say("verify", tmp_path / "store")[1]


def test_a_packet_of_another_model_is_foreign(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS[:1], model=OTHER)
    shutil.move(part.path.parent, tmp_path / "store" / MODEL[:16])
    code, out, _ = say("verify", tmp_path / "store")
    assert code == 1
    assert f"foreign: worker 0: model: expected {MODEL[:16]}... 0000, got '{OTHER} 0000'" in out


def test_files_of_no_context_are_named_and_can_be_deleted(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS)
    strays = [files_of(part, KEYS[0])[0].with_name(name) for name in ("00ff.bin", "00ff.bin_77.tmp")]
    for stray in strays:
        stray.write_bytes(b"half")
    code, out, _ = say("verify", tmp_path / "store")
    assert code == 1
    for stray in strays:
        assert f"01234567/server-0: of no context: {stray.relative_to(part.path)}" in out
    assert out.endswith("3 whole, 2 of no context\n")
    assert say("verify", tmp_path / "store", "--delete")[0] == 1
    assert say("verify", tmp_path / "store")[:2] == (0, "3 whole\n")
    assert not any(stray.exists() for stray in strays)


def test_a_file_in_another_place_is_not_that_of_a_context(tmp_path: Path, say: Said) -> None:
    """The server would not find it."""
    part = write(tmp_path / "store", KEYS)
    file = files_of(part, KEYS[0])[0]
    file.rename(file.parents[1] / file.name)
    assert say("verify", tmp_path / "store")[1].endswith("1 missing, 2 whole, 1 of no context\n")


def test_a_running_server_is_left_alone(tmp_path: Path, say: Said) -> None:
    """It moves contexts and writes files after its snapshot. What is damaged is damaged all the same."""
    part = write(tmp_path / "store", KEYS)
    files_of(part, KEYS[1])[0].unlink()
    files_of(part, KEYS[2])[0].with_name("new.bin").write_bytes(b"new")
    slot = Slot(tmp_path / "store" / MODEL[:16])
    assert say("verify", tmp_path / "store")[:2] == (0, "2 whole, 1 moved\n")
    spoil(part, "rows", 0)
    before = everything(tmp_path)
    code, out, _ = say("verify", tmp_path / "store", "--delete")
    assert code == 1
    assert out.splitlines()[1].startswith("not deleted: 0123456789abcdef/server-0: expected no running server")
    assert everything(tmp_path) == before
    slot.close()


# ----------------------------------------------------------------------------------------------------------------- drop


def test_drop_deletes_what_it_is_told(tmp_path: Path, say: Said) -> None:
    part, other = write(tmp_path / "store", KEYS), write(tmp_path / "store", KEYS[:2], model=OTHER)
    number = part.snapshot.next
    assert say("drop", tmp_path / "store", "a1a1")[:2] == (0, "2 contexts deleted, 144.0 KiB\n")
    assert [[each.copy.key for each in x.contexts()] for x in (part, other)] == [KEYS[1:], KEYS[1:2]]
    assert say("verify", tmp_path / "store")[:2] == (0, "3 whole\n")
    snapshot = read_snapshot(part.path / "directory.json")
    assert snapshot.next == number  # no other copy will have the name of one that is gone
    assert [copy.tier for copy in snapshot.copies] == ["ram", "disk", "disk"]
    assert snapshot.about["grain"] == GRAIN
    assert (part.path / "directory.json").stat().st_mode & 0o777 == 0o600
    assert say("drop", tmp_path / "store", KEYS[1], "b3")[0] == 0
    assert say("verify", tmp_path / "store")[1] == "nothing is stored\n"
    assert not [file for file in everything(tmp_path) if file.suffix == ".bin"]


def test_drop_by_age(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS)
    for file in files_of(part, KEYS[1]):
        os.utime(file, (time.time() - 7200, time.time() - 7200))
    for file in files_of(part, KEYS[2])[1:]:  # one of its files is new
        os.utime(file, (time.time() - 7200, time.time() - 7200))
    assert say("drop", tmp_path / "store", "--older-than", "3h")[1].startswith("0 contexts deleted")
    assert say("drop", tmp_path / "store", "--older-than", "119.5m")[1].startswith("1 contexts deleted")
    assert [each.copy.key for each in part.contexts()] == [KEYS[0], KEYS[2]]


def test_drop_refuses_what_a_running_server_has(tmp_path: Path, say: Said) -> None:
    part, other = write(tmp_path / "store", KEYS), write(tmp_path / "store", KEYS, model=OTHER)
    before = everything(part.path)
    slot = Slot(tmp_path / "store" / MODEL[:16])
    for words in (["a1"], ["--older-than", "0s"], ["--all"]):
        code, out, err = say("drop", tmp_path / "store", *words)
        assert code == 2
        assert err == "error: 0123456789abcdef/server-0: expected no running server, got one that uses it\n"
        assert everything(part.path) == before
        assert f"{len(KEYS) - 1 if '0s' in words else words == ['a1']:d} contexts deleted" in out
    assert other.contexts() == []
    slot.close()
    assert say("drop", tmp_path / "store", "--all")[:1] == (0,)
    assert take_lock(part.path) is not None  # it has let go of the part


def test_a_server_that_starts_in_the_middle_takes_another_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, taken = write(tmp_path / "store", KEYS), []
    delete = module._delete

    def while_it_deletes(files: list[Path]) -> None:
        taken.append(Slot(tmp_path / "store" / MODEL[:16]).path.name)
        delete(files)

    monkeypatch.setattr(module, "_delete", while_it_deletes)
    part.drop(lambda each: True)
    assert taken == ["server-1"]


def test_a_crash_leaves_strays_and_no_context_in_part(
    tmp_path: Path, say: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = write(tmp_path / "store", KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_delete", lambda files: (files[0].unlink(), exec("raise OSError('killed')")))
        code, _, err = say("drop", tmp_path / "store", "a1")
        assert (code, err) == (2, "error: killed\n")
    assert [each.copy.key for each in part.contexts()] == KEYS[1:]
    assert say("verify", tmp_path / "store")[1].endswith("2 whole, 8 of no context\n")
    say("verify", tmp_path / "store", "--delete")
    assert say("verify", tmp_path / "store")[:2] == (0, "2 whole\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "expected contexts, --all or --older-than, got none"),
        (["a1", "--all"], "expected contexts, --all or --older-than, got two"),
        (["--older-than", "7"], "--older-than: expected a number and one of s, m, h, d, got '7'"),
        (["--older-than", "d"], "--older-than: expected a number and one of s, m, h, d, got 'd'"),
        (["--older-than", "nand"], "--older-than: expected 0..1000000000000.0, got nan"),
    ],
)
def test_what_cannot_be_dropped_is_an_error(tmp_path: Path, say: Said, words: list[str], expected: str) -> None:
    part = write(tmp_path / "store", KEYS)
    code, _, err = say("drop", tmp_path / "store", *words)
    assert (code, len(err.splitlines())) == (2, 1)
    assert expected in err
    assert len(part.contexts()) == 3


# ----------------------------------------------------------------------------------------------------- what is no store


@pytest.mark.parametrize("damage", ["cut", "old", "grain", "row"])
def test_a_snapshot_that_does_not_say_enough(tmp_path: Path, say: Said, damage: str) -> None:
    """Nothing is taken for a stray then. Only ``--all`` deletes."""
    part, other = write(tmp_path / "store", KEYS), write(tmp_path / "store", KEYS, model=OTHER)
    file = part.path / "directory.json"
    read = json.loads(file.read_text())
    if damage == "old":
        del read["about"]
    elif damage == "grain":
        read["about"]["grain"] = "5120"
    elif damage == "row":
        read["about"]["row"] = GRAIN - 1
    file.write_text(json.dumps(read)[: 100 if damage == "cut" else None])
    before = everything(tmp_path)
    expected = {
        "cut": "path: expected a snapshot of format 1",
        "old": "expected a snapshot with sizes of files, got one of an older server",
        "grain": "grain: expected an int",
    }
    for words in (["ls"], ["verify"], ["verify", "--delete"], ["drop", "--older-than", "1d"]):
        code, out, err = say(words[0], tmp_path / "store", *words[1:])
        assert code == {"ls": 0, "verify": 1, "drop": 2}[words[0]]
        assert f"01234567/server-0: {expected.get(damage, 'row: expected')}" in out + err
        assert everything(tmp_path) == before
    assert json.loads(say("ls", tmp_path / "store", "--json")[1])["servers"][0]["error"]
    slot = Slot(tmp_path / "store" / MODEL[:16])
    assert say("drop", tmp_path / "store", "--all")[0] == 2
    assert set(everything(part.path)) < set(before)
    slot.close()
    assert say("drop", tmp_path / "store", "--all")[0] == 0
    assert [path.name for path in everything(part.path)] == ["lock"]
    assert other.contexts() == []


def test_a_server_that_never_saved_has_no_contexts(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS)
    (part.path / "directory.json").unlink()
    assert say("verify", tmp_path / "store")[1].endswith("27 of no context\n")


def refused(case: str, path: Path) -> None:
    model = path / MODEL[:16]
    if case == "none":
        shutil.rmtree(path)
    elif case == "open":
        path.chmod(0o750)
    elif case == "no servers":
        shutil.rmtree(model)
    elif case == "link":
        shutil.move(path, path.with_name("real"))
        path.symlink_to(path.with_name("real"))
    elif case == "linked model":
        shutil.move(model, path.with_name("real"))
        model.symlink_to(path.with_name("real"))
    elif case == "linked packets":
        packets = model / "server-0" / "packets"
        shutil.move(packets, path.with_name("real"))
        packets.symlink_to(path.with_name("real"))
    elif case == "file":
        shutil.rmtree(path)
        path.write_text("")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("none", "No such file or directory"),
        ("open", "got a folder that others may enter (mode 750)"),
        ("no servers", "expected the folder of a disk tier, got one that no server has used"),
        ("link", "got a link"),
        ("linked model", "got a link"),
        ("linked packets", "got a link"),
        ("file", "got no folder"),
    ],
)
def test_folders_that_are_not_ones_own_are_refused(tmp_path: Path, say: Said, case: str, expected: str) -> None:
    write(tmp_path / "store", KEYS)
    refused(case, tmp_path / "store")
    before = everything(tmp_path)
    for words in (["ls"], ["show", "a1"], ["verify", "--delete"], ["drop", "--all"]):
        code, _, err = say(words[0], tmp_path / "store", *words[1:])
        assert (code, len(err.splitlines())) == (2, 1)
        assert expected in err
    assert everything(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_somebody_elses_is_refused(tmp_path: Path, say: Said) -> None:
    part = write(tmp_path / "store", KEYS)
    os.chown(part.path, 12345, -1)
    code, _, err = say("ls", tmp_path / "store")
    assert code == 2
    assert "got a folder of user 12345" in err
    with pytest.raises(ValueError, match="got a folder of user 12345"):
        parts_of(tmp_path / "store")
