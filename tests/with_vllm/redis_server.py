"""A Redis or Valkey of our own, to be stopped, killed and started again."""

import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")
PASSWORD = "p@ss/word"
needs_a_store = pytest.mark.skipif(PROGRAM is None, reason="needs the program valkey-server or redis-server")


class RedisServer:
    """In memory only, with a password."""

    def __init__(self, *options):
        with socket.socket() as some:
            some.bind(("127.0.0.1", 0))
            self.port = some.getsockname()[1]
        self.options, self.process = options, None
        self.url = f"redis://:p%40ss%2Fword@127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        """Empty, as after every start."""
        command = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
        self.process = subprocess.Popen([*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the store did not start")

    def send(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        self.process.wait()

    def client(self):
        import redis

        return redis.Redis.from_url(self.url, socket_timeout=10)
