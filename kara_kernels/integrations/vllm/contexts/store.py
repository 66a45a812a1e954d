"""A Valkey or Redis, as the remote tier uses it: few commands, short timeouts, one kind of error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

TIMEOUT = 1.0  # seconds for a connection, and from one part of a reply to the next

_Answer = TypeVar("_Answer")


class StoreError(Exception):
    """``what``: ``"slow"``, ``"gone"`` or ``"refused"``, which is an answer that says no. The text is fit for a log."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(text)
        self.what = what


class ValueStore(Protocol):
    """Values by name, which the store drops when they have not been used for a while. All methods raise StoreError."""

    def get(self, names: Sequence[str]) -> list[bytes | None]:
        """In one round trip."""

    def write(self, name: str, value: bytes | memoryview, seconds: int) -> None:
        """Replaces a value, which lives for ``seconds``."""

    def refresh(self, names: Sequence[str], seconds: int) -> bool:
        """Values live for ``seconds`` from now. Returns whether all of them are there."""

    def delete(self, names: Sequence[str]) -> None: ...

    def drop(self, name: str, value: bytes) -> None:
        """Deletes a value, unless it was replaced."""

    def close(self) -> None:
        """Ends what runs: it fails."""


def _told(command: Callable[..., _Answer]) -> Callable[..., _Answer]:
    """Errors of the client as StoreError, without the password."""

    @functools.wraps(command)
    def body(self: RedisStore, *args: Any) -> _Answer:
        import redis

        try:
            return command(self, *args)
        except redis.TimeoutError as error:
            what, text = "slow", str(error)
        except (redis.ResponseError, redis.AuthenticationError) as error:
            what, text = "refused", str(error)
        except (redis.RedisError, OSError, ValueError) as error:  # redis.InvalidResponse, among others
            what, text = "gone", str(error)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        raise StoreError(what, text)

    return body


class RedisStore:
    """See :class:`ValueStore`. Nothing is tried twice.

    Args:
        url: ``redis://[[user]:password@]host[:port][/database]``, ``rediss://`` with TLS, or ``unix://``.
    """

    def __init__(self, url: str) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        options = {
            "socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "retry": Retry(NoBackoff(), 0),
            "socket_keepalive": True, "decode_responses": False, "protocol": 2,
        }  # fmt: skip
        self._client: Any = redis.Redis.from_url(url, **options)
        self._client.connection_pool.connection_kwargs.update(options)  # whatever the URL says
        password = urlsplit(url).password
        self.secrets = {password, unquote(password)} if password else set()

    @_told
    def get(self, names: Sequence[str]) -> list[bytes | None]:
        return self._client.mget(names)

    @_told
    def write(self, name: str, value: bytes | memoryview, seconds: int) -> None:
        self._client.set(name, value, ex=seconds)

    @_told
    def refresh(self, names: Sequence[str], seconds: int) -> bool:
        several = self._client.pipeline(transaction=False)
        for name in names:
            several.expire(name, seconds)
        return all(several.execute())

    @_told
    def delete(self, names: Sequence[str]) -> None:
        self._client.delete(*names)

    @_told
    def drop(self, name: str, value: bytes) -> None:
        import redis

        with self._client.pipeline() as steps, suppress(redis.WatchError):
            steps.watch(name)
            if steps.get(name) == value:
                steps.multi()
                steps.delete(name)
                steps.execute()

    def close(self) -> None:
        self._client.connection_pool.disconnect(inuse_connections=True)
