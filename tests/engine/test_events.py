"""The record of a compression, in memory and as a line of a trace."""

from __future__ import annotations

import json

import torch
from shim import Decoding, small

from kara_kernels.engine import Compression, Ledger


def test_a_record_says_what_a_plan_did_and_is_a_line_of_json() -> None:
    plan = Decoding(Ledger(small(keep=5), 4), "7", prompt=6, keep=4).until_planned()
    keep = torch.arange(4, dtype=torch.int32).expand(2, 3, 4)
    record = Compression.of(plan, keep, seconds=0.5)
    assert record == ("7", 18, 18, 14, 6, 8, 4, keep, 1, 0, 0.5, None, True)
    renamed = Compression.of(
        plan, keep, seconds=0.5, request_id="cmpl-7", recomputed_len=11, lost=0.25, moved=False
    )  # fmt: skip
    line = json.loads(json.dumps(renamed.as_dict()))
    assert line == {
        "request_id": "cmpl-7", "logical_len": 18, "physical_len_before": 18, "physical_len_after": 14,
        "window_start": 6, "window": 8, "keep": 4, "keep_indices": [[[0, 1, 2, 3]] * 3] * 2, "freed_blocks": 1,
        "recomputed_len": 11, "seconds": 0.5, "lost": 0.25, "moved": False,
    }  # fmt: skip
    assert list(line) == list(Compression._fields)
