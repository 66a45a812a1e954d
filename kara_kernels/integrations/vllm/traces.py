"""Files that get one line of JSON for each event, and the names by which clients know their requests."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def check_trace(path: str | None) -> None:
    """Raises a ValueError if the file cannot be written, instead of failing at the first event."""
    if path is None:
        return
    try:
        open(path, "a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(f"trace: expected a file that can be written, got {path}: {error.strerror}") from None


def append(path: str, record: Mapping[str, Any]) -> None:
    """Appends a line in one unbuffered write, so that lines of several engines do not mix."""
    line = json.dumps(record, separators=(",", ":")) + "\n"
    with open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def client_id(request_id: str) -> str:
    """A request's id without the eight random digits that vLLM appends."""
    import vllm.envs as envs

    return request_id if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION else re.sub(r"-[0-9a-f]{8}$", "", request_id)
