"""The results: tables, texts and the JSON file.

:func:`collect` turns a finished run into one plain dictionary. Tables, picture and JSON file are made only from that
dictionary, so they cannot disagree. Its keys are stable within one value of ``schema``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache, PreTrainedModel

from kara_kernels import __version__
from kara_kernels.integrations.transformers import KaraCache
from kara_kernels.options import RECOMMENDED

from .. import DemoError
from ..machine import doubt, size
from ..screen import READABLE, Screen
from .closeness import Found

SCHEMA = 1


@dataclass(frozen=True)
class Window:
    """One compression of the only sequence. Tokens are counted from the first decoded one."""

    decoded_tokens: int  # so far
    first_token: int  # of the window
    physical_before: int
    physical_after: int
    freed_blocks: int
    seconds: float
    keep_indices: torch.Tensor  # [L, H, K], window-relative, ascending


@dataclass(frozen=True)
class Decoded:
    """The results of one decoding. Its cache has been freed."""

    ids: list[int]
    seconds: list[float] = field(repr=False)  # per new token; the first includes the prompt
    blocks: list[int] = field(repr=False)  # in use after new token i
    held: dict[str, Any]
    windows: list[Window]


@dataclass(frozen=True)
class Compared:
    """Results of one cache on the common text: ``kl`` and ``top1`` per token."""

    found: Found = field(repr=False)
    windows: list[Window]


def windows(cache: KaraCache, prompt_tokens: int) -> list[Window]:
    """The cache's own records. No other function here depends on their format."""
    found = []
    for event in cache.events:
        decoded = event.logical_len - prompt_tokens
        found.append(
            Window(
                decoded_tokens=decoded,
                first_token=decoded - (event.physical_len_before - event.window_start),
                physical_before=event.physical_len_before,
                physical_after=event.physical_len_after,
                freed_blocks=event.freed_blocks,
                seconds=event.seconds or 0.0,
                keep_indices=event.keep_indices,
            )
        )
    return found


def held_in_full(cache: DynamicCache, block_size: int) -> dict[str, Any]:
    """What transformers' own cache holds, converted to blocks."""
    rows = cache.get_seq_length()
    return {
        "logical_tokens": rows,
        "physical_tokens": rows,
        "retention": 1.0,
        "blocks_end": -(-rows // block_size),
        "blocks_peak": -(-rows // block_size),
        "kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers),
    }


def held_in_kara(cache: KaraCache) -> dict[str, Any]:
    return {
        "logical_tokens": cache.get_seq_length(),
        "physical_tokens": int(cache.physical_lengths[0]),
        "retention": cache.retention,
        "blocks_end": cache.blocks_in_use,
        "blocks_peak": cache.peak_blocks,
        "kv_bytes": cache.kv_bytes,
        "query_bytes": cache.query_bytes,
    }


def collect(
    options: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: Any,
    trial: dict[int, float],
    decoded: dict[str, Decoded],
    others: float | None,
    compared: dict[str, Compared],
) -> dict[str, Any]:
    """Everything about the run as plain numbers, strings, lists and dictionaries. ``phases`` is added later.

    Args:
        trial: seconds per token for each number of threads tried.
        others: share of CPU time that other programs used while decoding. None: unknown.
    """
    full, kara = decoded["full"], decoded["kara"]
    both = {name: _decoded(run, tokenizer) | run.held for name, run in decoded.items()}
    differ = [a != b for a, b in zip(full.ids, kara.ids, strict=True)]
    return {
        "schema": SCHEMA,
        "versions": {
            "kara_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "threads_tried_ms": {str(count): round(seconds * 1e3, 3) for count, seconds in trial.items()},
            "cores": os.cpu_count(),
            "cpu_share_of_others": others,
        },
        "model": _model(options, model),
        "settings": _settings(options),
        "prompt": {"text": options.prompt, "tokens": both["full"]["logical_tokens"] - options.tokens + 1},
        "full": both["full"],
        "kara": both["kara"] | _compressions(kara),
        "time_ratio": both["kara"]["ms_per_token_median"] / max(both["full"]["ms_per_token_median"], 1e-9),
        "same_text_tokens": differ.index(True) if True in differ else options.tokens,
        "closeness": {"random": None} | {name: _closeness(run) for name, run in compared.items()},
        "picture": None if options.picture is None else str(options.picture),
    }


def _model(options: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "name": options.model or "SmolLM2-135M-Instruct",
        "layers": model.config.num_hidden_layers,
        "query_heads": model.config.num_attention_heads,
        "kv_heads": model.config.num_key_value_heads,
        "dtype": options.dtype,
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = "tokens", "temperature", "repetition_penalty", "seed", "window", "keep", "tail", "block_size", "backend"
    return {name: getattr(options, name) for name in names} | dict(RECOMMENDED) | options.policy


def _decoded(run: Decoded, tokenizer: Any) -> dict[str, Any]:
    steps = run.seconds[1:]
    return {
        "tokens": len(run.ids),
        "text": tokenizer.decode(run.ids, skip_special_tokens=True),
        "prefill_seconds": run.seconds[0],
        "decode_seconds": sum(steps),
        "ms_per_token": 1e3 * statistics.fmean(steps or [0.0]),
        "ms_per_token_median": 1e3 * statistics.median(steps or [0.0]),
        "blocks": run.blocks,
    }


def _compressions(run: Decoded) -> dict[str, Any]:
    seconds = sum(window.seconds for window in run.windows)
    return {
        "compressions": len(run.windows),
        "compress_seconds": seconds,
        "compress_share": seconds / max(sum(run.seconds[1:]), 1e-9),
        "windows": [_window(window) for window in run.windows],
    }


def _window(window: Window) -> dict[str, Any]:
    """Figures of one compression, with the kept tokens of all heads together and of one head."""
    keep = window.keep_indices.long()
    layers, heads, count = keep.shape
    width = window.physical_before - window.physical_after + count
    share = keep.flatten().bincount(minlength=width) / (layers * heads)
    layer = layers // 2  # the middle layer, chosen in advance
    names = "decoded_tokens", "first_token", "physical_before", "physical_after", "freed_blocks", "seconds"
    return {name: getattr(window, name) for name in names} | {
        "kept_share": [round(float(x), 4) for x in share],
        "kept_one_head": {"layer": layer, "head": 0, "positions": keep[layer, 0].tolist()},
    }


def _closeness(run: Compared) -> dict[str, Any]:
    """Means over all decoded tokens, and over those predicted from a compressed cache."""
    kl, top1 = run.found["kl"], run.found["top1"]
    # A window is compressed after the forward pass that fills it. The token predicted by that pass is still exact.
    first = run.windows[0].decoded_tokens + 1 if run.windows else len(kl)
    kept = [window.keep_indices for window in run.windows]
    runs = sum(int((keep.diff(dim=-1) > 1).sum()) + keep[..., 0].numel() for keep in kept)
    return {
        "kl": _mean(kl),
        "top1": _mean(top1),
        "kl_compressed": _mean(kl[first:]),
        "top1_compressed": _mean(top1[first:]),
        "tokens": len(kl),
        "tokens_compressed": len(kl[first:]),
        "mean_run": sum(keep.numel() for keep in kept) / runs if runs else None,
        "kl_per_token": [float(f"{x:.4g}") for x in kl],
    }


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DemoError(f"--json {path}: {error}") from error


def show(screen: Screen, result: dict[str, Any]) -> None:
    """Print texts first and figures last, so that the figures stay visible."""
    console, full, kara = screen.console, result["full"], result["kara"]
    width = min(console.width, READABLE)
    _text(console, "Prompt", result["prompt"]["text"], width)
    _text(console, "Written with the full cache", full["text"], width)
    same = result["same_text_tokens"]
    _text(
        console,
        "Written with Kara"
        + (f" (the same {same:,} tokens at first)" if same < full["tokens"] else " (the same text)"),
        kara["text"],
        width,
    )
    console.print()
    console.print(_cost_table(result))
    console.print()
    console.print(_closeness_table(result))
    console.print()
    for line in findings(result):
        console.print(Text(line), width=width)
    console.print()
    screen.say("took: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["phases"].items()))
    if result["picture"]:
        screen.say(f"picture: {result['picture']}")


def _text(console: Console, head: str, text: str, width: int) -> None:
    console.print()
    console.print(Text(head, style="bold"))
    for line in Text(text.strip()).wrap(console, width - 2):
        line.rstrip()
        console.print(Text("  ") + line if line else "")


def _cost_table(result: dict[str, Any]) -> Table:
    full, kara = result["full"], result["kara"]
    table = _table("What it costs", "full cache", "Kara")
    rows: list[tuple[str, str, str]] = [
        ("tokens decoded", f"{full['tokens']:,}", f"{kara['tokens']:,}"),
        ("tokens still cached", f"{full['physical_tokens']:,}", f"{kara['physical_tokens']:,}"),
        ("realised retention", "100.0%", f"{kara['retention']:.1%}"),
        ("blocks in use at the end", f"{full['blocks_end']:,}", f"{kara['blocks_end']:,}"),
        ("blocks in use at peak", f"{full['blocks_peak']:,}", f"{kara['blocks_peak']:,}"),
        ("KV cache", size(full["kv_bytes"]), size(kara["kv_bytes"])),
        ("queries kept for scoring", "-", size(kara["query_bytes"])),
        ("time per token, median", f"{full['ms_per_token_median']:.1f} ms", f"{kara['ms_per_token_median']:.1f} ms"),
        ("  as a multiple of the full cache's", "1.00", f"{result['time_ratio']:.2f}"),
        ("time per token, mean", f"{full['ms_per_token']:.1f} ms", f"{kara['ms_per_token']:.1f} ms"),
        ("time compressing", "-", f"{kara['compress_seconds']:.2f} s ({kara['compress_share']:.1%})"),
        ("compressions", "-", f"{kara['compressions']:,}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _closeness_table(result: dict[str, Any]) -> Table:
    close = result["closeness"]
    columns = {"Kara": close["kara"]} | ({"random tokens": close["random"]} if close["random"] else {})
    table = _table("How close it stays (one text through every cache)", *columns)
    count = close["kara"]["tokens_compressed"]
    rows = (
        ("KL to the full cache, nats/token", "kl", "{:.4f}"),
        (f"  of {count:,} after the first compression", "kl_compressed", "{:.4f}"),
        ("same most likely next token", "top1", "{:.1%}"),
        (f"  of {count:,} after the first compression", "top1_compressed", "{:.1%}"),
        ("tokens kept in a row, mean", "mean_run", "{:.2f}"),
    )
    for name, key, form in rows:
        values = [column[key] for column in columns.values()]
        table.add_row(name, *("-" if value is None else form.format(value) for value in values))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", min_width=39)
    for column in columns:
        table.add_column(column, justify="right", min_width=13)
    return table


def findings(result: dict[str, Any]) -> list[str]:
    """The figures in words. The picture's titles say the same."""
    full, kara, close = result["full"], result["kara"], result["closeness"]
    if not kara["compressions"]:
        due = result["settings"]["window"] + result["settings"]["tail"]
        line = f"Nothing was compressed. The first window is due after {due:,} new tokens (--window plus --tail)."
        return [line, *_timing(result)]
    lines = [
        f"Kara ends with {kara['blocks_end']:,} blocks instead of {full['blocks_end']:,}. It still caches "
        f"{kara['retention']:.0%} of all tokens, including the whole prompt."
    ]
    mine, other = close["kara"], close["random"]
    if mine["kl_compressed"] is not None:
        lines.append(
            f"Once compressed, its next-token predictions are {mine['kl_compressed']:.2g} nats from the full cache's."
        )
        if other:
            lines[-1] += f" With the same number of random tokens they are {other['kl_compressed']:.2g} nats away."
    return lines + _timing(result)


def _timing(result: dict[str, Any]) -> list[str]:
    """A line about time, and a warning if the machine was busy."""
    if result["full"]["tokens"] < 2:
        return []
    line = f"A token took {result['time_ratio']:.2f} times as long with Kara (medians, decoding in turns)."
    return [line, *filter(None, [doubt(result["machine"]["cpu_share_of_others"])])]
