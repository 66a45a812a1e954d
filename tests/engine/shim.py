"""Shared by the tests of the shim: a small policy, a decoding sequence, queries that identify their token, and a
device that the host must not wait for."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kara_kernels import CompressedWindow, paged
from kara_kernels.engine import Held, Ledger, Plan, Policy, QueryRing, Span

aten = torch.ops.aten


def small(**settings: Any) -> Policy:
    """A window of eight tokens is reduced to four, with a tail of four. Every query is recorded as it is."""
    return Policy(**{"window": 8, "keep": 4, "tail": 4, "query_dtype": "auto"} | settings)


class Decoding:
    """One sequence with its own blocks that decodes one token per step. Its prompt is already computed."""

    def __init__(
        self, ledger: Ledger, name: str = "a", prompt: int = 5, computed: int = 0, decoded: int = 0, **own: int
    ) -> None:
        self.ledger, self.name, self.prompt = ledger, name, prompt
        self.logical = prompt + decoded
        ledger.start(name, prompt, computed, **own)

    @property
    def physical(self) -> int:
        return self.logical - self.ledger.dropped(self.name)

    @property
    def blocks(self) -> list[int]:
        return [100 + i for i in range(-(-self.physical // self.ledger.page_size))]

    def held(self, first_owned: int = 0) -> Held:
        return Held(self.name, self.logical, self.blocks, first_owned)

    def step(self, first_owned: int = 0) -> Plan | None:
        """Plans and commits, then decodes one token."""
        plans = self.ledger.plan([self.held(first_owned)])
        for plan in plans:
            self.ledger.commit(plan)
        self.logical += 1
        return plans[0] if plans else None

    def until_planned(self, most: int = 200) -> Plan:
        for _ in range(most):
            if plan := self.step():
                return plan
        raise AssertionError(f"no compression in {most} steps")


LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 4


def make_ring(policy: Policy, max_sequences: int = 3, max_tokens: int = 40, **options: Any) -> QueryRing:
    given: dict[str, Any] = {
        "layers": LAYERS, "query_heads": HEADS * GROUP, "kv_heads": HEADS, "head_dim": DIM,
        "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    return QueryRing(policy, max_sequences=max_sequences, max_tokens=max_tokens, **(given | options))


def asks(name: str, last_query: int, num_queries: int) -> Plan:
    """A plan with only the fields that the ring reads."""
    return Plan(name, 0, 0, 0, 0, 8, 4, (), 0, 0, last_query, num_queries)


def query_of(name: str, position: int, layer: int) -> torch.Tensor:
    """`[H*G, D]`, different for every token, layer and head. Heads of a group differ from their mean by up to 1."""
    head = torch.arange(HEADS * GROUP)
    value = int(name, 36) * 1000 + position + head % GROUP * 2 - (GROUP - 1)
    return torch.stack([value, head // GROUP, torch.full_like(head, layer), head * 0], -1).float()


def batch_of(spans: Sequence[Span], layer: int, padding: int = 0) -> torch.Tensor:
    """The queries of a step. Prompts behind a context and padding are NaN, because they must not be read."""
    nothing = torch.full((HEADS * GROUP, DIM), math.nan)
    rows = [
        query_of(span.request_id, position, layer)
        if position >= span.prompt_len or position < span.context
        else nothing
        for span in spans
        for position in range(span.first_position, span.first_position + span.num_tokens)
    ]
    return torch.stack([*rows, *[nothing] * padding]) if rows or padding else torch.empty(0, HEADS * GROUP, DIM)


class NoWaiting(TorchDispatchMode):
    """Fails if the host would wait for its device: values read back, or copies from memory that is not pinned.

    The device is "meta", whose values cannot be read. Counts uploads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if func is aten._to_copy.default:
            moves = kwargs.get("device", args[0].device).type != args[0].device.type
            assert not moves or kwargs.get("non_blocking"), "a copy that the host waits for"
            self.uploads += moves
        elif func is aten.copy_.default:
            assert args[2:] == (True,) or len(devices) == 1, "a copy that the host waits for"
            self.uploads += len(devices) == 2
        else:
            assert len(devices) <= 1, f"{func}: numbers on the host beside tensors on the device"
            assert func is not aten._local_scalar_dense.default
        return func(*args, **kwargs)


class NoHiddenUploads(TorchFunctionMode):
    """Fails on hidden copies to the device: tensors created from numbers, and lists used as indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            assert str(kwargs.get("device", "cpu")) == "cpu", "a tensor made on the device from numbers on the host"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].device.type != "cpu":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in parts), "a list as an index of a tensor on the device"
        return func(*args, **kwargs)


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaiting]:
    """Replaces `compress_window`, which has its own such test, by its shapes."""

    def shapes_only(query: Any, k: Any, v: Any, tables: Any, lengths: Any, *, keep: int, **options: Any) -> Any:
        given = query, *k, tables, lengths, options["window_starts"], options["query_rows"]
        assert {x.device.type for x in given} == {"meta"}
        keep_indices = tables.new_empty(len(k), len(tables), k[0].shape[2], keep)
        return CompressedWindow(lengths, keep_indices, keep_indices.float(), lengths)

    monkeypatch.setattr(sys.modules["kara_kernels.windows.execute"], "compress_window", shapes_only)
    monkeypatch.setattr(paged, "_check_overlap", lambda k, v: None)  # meta tensors have no addresses
    with NoHiddenUploads(), NoWaiting() as mode:
        yield mode
