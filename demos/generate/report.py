"""What came out: tables and texts at the end, and the JSON file.

:func:`collect` turns a finished run into one plain dictionary. Tables, picture and JSON file are made from it
and from nothing else, so they cannot disagree. Its keys are stable within one value of ``schema``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kara_kernels import __version__

from .. import DemoError
from ..screen import READABLE, Screen

SCHEMA = 1


def collect(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    prompt_tokens: int,
    full: Any,
    kara: Any,
    close: dict[str, dict[str, list[float]]],
    caches: dict[str, Any],
    phases: dict[str, float],
) -> dict[str, Any]:
    """Everything about the run as plain numbers, strings, lists and dictionaries."""
    import torch
    import transformers

    config, cache = model.config, kara.cache
    logical = prompt_tokens + options.tokens - 1  # the newest token is known, but not cached yet
    full_blocks = -(-logical // options.block_size)
    compressing = sum(event.seconds for event in cache.events)
    differ = [a != b for a, b in zip(full.ids, kara.ids, strict=True)]
    return {
        "schema": SCHEMA,
        "versions": {
            "kara_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": str(model.device), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "model": {
            "name": options.model or "SmolLM2-135M-Instruct",
            "layers": config.num_hidden_layers,
            "query_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "dtype": options.dtype,
        },
        "settings": {
            name: getattr(options, name)
            for name in (
                "tokens",
                "temperature",
                "repetition_penalty",
                "seed",
                "window",
                "keep",
                "tail",
                "block_size",
                "chunk_fraction",
                "max_chunk",
                "pool",
                "redundancy",
                "backend",
            )
        },
        "prompt": {"text": options.prompt, "tokens": prompt_tokens},
        "full": _decoded(full, tokenizer)
        | {
            "logical_tokens": logical,
            "physical_tokens": logical,
            "retention": 1.0,
            "blocks_end": full_blocks,
            "blocks_peak": full_blocks,
            "kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in full.cache.layers),
        },
        "kara": _decoded(kara, tokenizer)
        | {
            "logical_tokens": logical,
            "physical_tokens": int(cache.physical_lengths[0]),
            "retention": cache.retention,
            "blocks_end": cache.blocks_in_use,
            "blocks_peak": cache.peak_blocks,
            "kv_bytes": cache.kv_bytes,
            "query_bytes": cache.query_bytes,
            "compressions": len(cache.events),
            "compress_seconds": compressing,
            "compress_share": compressing / max(kara.decode_seconds, 1e-9),
            "windows": [_window(event, prompt_tokens) for event in cache.events],
        },
        "same_text_tokens": differ.index(True) if True in differ else options.tokens,
        "closeness": {"random": None}
        | {name: _closeness(found, caches[name].events, prompt_tokens) for name, found in close.items()},
        "phases": {name: round(seconds, 3) for name, seconds in phases.items()},
        "picture": None if options.picture is None else str(options.picture),
    }


def _decoded(run: Any, tokenizer: Any) -> dict[str, Any]:
    steps = run.step_seconds or [0.0]
    return {
        "tokens": len(run.ids),
        "text": tokenizer.decode(run.ids, skip_special_tokens=True),
        "prefill_seconds": run.prefill_seconds,
        "decode_seconds": run.decode_seconds,
        "ms_per_token": 1e3 * statistics.fmean(steps),
        "ms_per_token_median": 1e3 * statistics.median(steps),
        "blocks": run.blocks,
    }


def _window(event: Any, prompt_tokens: int) -> dict[str, Any]:
    """One compression of the only sequence, with the survivors of all heads and of one head."""
    keep = event.keep_indices.long()  # [L, H, K]
    layers, heads, _ = keep.shape
    physical_start, before, after = event.window_start, event.physical_len_before, event.physical_len_after
    width = before - after + keep.shape[-1]
    share = keep.flatten().bincount(minlength=width) / (layers * heads)
    layer = layers // 2  # the middle, chosen before looking
    return {
        "decoded_tokens": event.logical_len - prompt_tokens,
        "first_token": event.logical_len - prompt_tokens - (before - physical_start),
        "physical_before": before,
        "physical_after": after,
        "freed_blocks": event.freed_blocks,
        "seconds": event.seconds,
        "kept_share": [round(float(x), 4) for x in share],
        "kept_one_head": {"layer": layer, "head": 0, "positions": keep[layer, 0].tolist()},
    }


def _closeness(found: dict[str, list[float]], events: list[Any], prompt_tokens: int) -> dict[str, Any]:
    """Means over all decoded tokens and, the honest ones, over those predicted from a compressed cache."""
    kl, top1 = found["kl"], found["top1"]
    # A window is compressed after the forward that fills it; the token that this forward predicts is exact.
    first = events[0].logical_len - prompt_tokens + 1 if events else len(kl)
    kept = [event.keep_indices for event in events]
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
    """Texts first, figures last, so that the figures stay in sight."""
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
        ("KV cache", _bytes(full["kv_bytes"]), _bytes(kara["kv_bytes"])),
        ("queries kept for scoring", "-", _bytes(kara["query_bytes"])),
        ("time per token", f"{full['ms_per_token']:.1f} ms", f"{kara['ms_per_token']:.1f} ms"),
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
    """The figures in words; the picture's titles say the same."""
    full, kara, close = result["full"], result["kara"], result["closeness"]
    if not kara["compressions"]:
        due = result["settings"]["window"] + result["settings"]["tail"]
        return [f"Nothing was compressed: the first window (--window, --tail) is due after {due:,} tokens."]
    lines = [
        f"Kara ends with {kara['blocks_end']:,} blocks instead of {full['blocks_end']:,} and "
        + f"still caches {kara['retention']:.0%} of all tokens, the prompt whole."
    ]
    mine, other = close["kara"], close["random"]
    if mine["kl_compressed"] is not None and other and other["kl_compressed"] is not None:
        lines.append(
            f"Once compressed, its next-token predictions are {mine['kl_compressed']:.2g} nats from "
            f"the full cache's; with as many tokens drawn at random: {other['kl_compressed']:.2g}."
        )
    return lines


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
