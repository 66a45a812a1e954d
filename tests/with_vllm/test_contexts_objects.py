"""Contexts in a bucket, by vLLM's object tier and NIXL, with the server of moto."""

import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from contexts_harness import ON, serving
from harness import prompts

from kara_kernels.integrations.vllm.contexts import objects, remote
from kara_kernels.integrations.vllm.contexts.objects import ROWS, ObjectStore
from kara_kernels.integrations.vllm.contexts.remote import SLOWEST
from kara_kernels.integrations.vllm.contexts.store import StoreError

MOST = 100_003


class Bucket:
    """A server with one bucket."""

    def __init__(self):
        with socket.socket() as some:
            some.bind(("127.0.0.1", 0))
            self.port = some.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.url = f"s3+http://127.0.0.1:{self.port}/contexts"
        until = time.monotonic() + 60
        while True:
            try:
                self.ask("PUT")
                return
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.1)

    def ask(self, method, path=""):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/contexts{path}", method=method)
        return urllib.request.urlopen(request).read().decode()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """The server is written in Python, and slow on a busy machine."""
    monkeypatch.setattr(objects, "TIMEOUT", 60.0)
    monkeypatch.setattr(remote, "TIMEOUT", 60.0)
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("EC2_METADATA_DISABLED", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)


@pytest.fixture(scope="module")
def bucket():
    some = Bucket()
    yield some
    some.kill()


@pytest.fixture
def store(bucket):
    some = ObjectStore(bucket.url, MOST, SLOWEST)
    yield some
    some.close()


def test_values_of_any_size_come_back_and_are_replaced(store):
    draw = np.random.default_rng(0)
    values = {f"a:{size}": draw.bytes(size) for size in (1, 1000, MOST)}
    for name, value in values.items():
        store.write(name, memoryview(value), 60)
    assert store.get(["nobody", *values]) == [None, *values.values()]
    store.write("a:1", b"another", 60)
    assert store.get(["a:1"]) == [b"another"]
    assert store.refresh(list(values), 60)
    assert not store.refresh(["a:1", "nobody"], 60)
    store.drop("a:1", b"some other value")
    assert store.get(["a:1"]) == [b"another"]
    store.drop("a:1", b"another")
    assert store.get(["a:1"]) == [None]
    assert store._free.qsize() == ROWS


def test_a_transfer_that_hangs_is_slow_and_keeps_its_row(store, monkeypatch):
    store.write("b", b"x", 60)
    store._longest = 0.0
    ended = store._tier.get_finished_jobs
    monkeypatch.setattr(store._tier, "get_finished_jobs", lambda: [])
    for _ in range(ROWS):
        with pytest.raises(StoreError, match="a transfer took more than") as found:
            store.get(["b"])
        assert found.value.what == "slow"
    with pytest.raises(StoreError, match=f"{ROWS} transfers run"):
        store.get(["b"])
    monkeypatch.setattr(store._tier, "get_finished_jobs", ended)
    store._longest, until = 60.0, time.monotonic() + 60
    while store._late and time.monotonic() < until:
        store._outcome(-1, False)
    assert store._free.qsize() == ROWS
    assert store.get(["b"]) == [b"x"]


def test_a_transfer_that_cannot_begin_gives_its_row_back(store, monkeypatch):
    def refuse(job):
        raise RuntimeError("refused")

    monkeypatch.setattr(store._tier, "submit_store", refuse)
    for _ in range(2 * ROWS):
        with pytest.raises(StoreError, match="refused") as found:
            store.write("d", b"x", 60)
        assert found.value.what == "gone"
    monkeypatch.undo()
    assert store._free.qsize() == ROWS


def test_a_server_that_is_gone_is_an_error_of_the_store():
    gone = Bucket()
    some = ObjectStore(gone.url, MOST, SLOWEST)
    some.write("c", b"x", 60)
    gone.kill()
    with pytest.raises(StoreError) as found:
        some.get(["c"])
    assert found.value.what == "gone"
    with pytest.raises(StoreError):
        some.write("c", b"y", 60)
    some.close()
    with pytest.raises(StoreError, match="closed"):
        some.get(["c"])


def test_two_servers_share_a_bucket(model, bucket):
    document, *questions = prompts(256, 9, 12, seed=170)
    contexts = {**ON, "grain_kib": 16, "remote": {"url": bucket.url, "wait": 30.0}}
    with serving(model, contexts) as first:
        first.ask(document + questions[0], context_tokens=256)
        first.rest()
        rows = first.rows_of(document + questions[0], 256)
        first.assert_nothing_leaks()
    with serving(model, contexts) as second:
        assert second.ask(document + questions[1], context_tokens=256) == [second.judge(document + questions[1], 256)]
        assert second.manager.counts["lookups", "found"] == 1
        assert second.manager.counts["hits", "remote"] == 1
        assert second.manager.counts["jobs", "store", "ok"] == 0
        for mine, its in zip(second.rows_of(document + questions[1], 256), rows, strict=True):
            assert (mine == its).all()
        second.assert_nothing_leaks()
