"""What is the best way to spend a context's bytes? ``python -m bench.contexts.frontier [--quick]``

A model reads 768 tokens of a text. Its cache, in 16 bits, is replaced by what a codec gives back, and the model reads
the next 192 tokens. A codec is judged by the KL divergence to the uncompressed cache, in nats per token, and by the
bytes it stores. Values are kept in the user's cache, so an interrupted run goes on. The whole takes an hour and a half
on one idle core, ``--quick`` four minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from bench import tables
from bench.quality import sources
from bench.quality.texts import Text
from bench.store import Store, code_of, concluded, digest, digest_of_folders, make_folder
from demos import DemoError
from demos.model import load
from demos.screen import Screen
from kara_kernels.contexts.profile import digest_of
from kara_kernels.contexts.profiler import REPEAT
from kara_kernels.contexts.replay import Replay, cache_of
from kara_kernels.integrations.transformers.rotary import find_look_ahead

from . import page, texts
from .codecs import SCORERS, Entry, entries
from .quantise import Context, nibbles

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTH, AHEAD = 768, 192  # tokens
QUICK = (
    "K8V8",
    "K4V4, K8V8 for the best quarter",
    "K4V4",
    "0.5 of the rows, K4V4",
    "int8",
    "int4",
    "0.5 of the rows, ours",
    "0.5 of the rows, SnapKV",
)
QUICK_TEXTS = 6  # one of each kind

Record = dict[str, Any]


class Reader:
    """A text in the cache of a model, in bfloat16, as a codec finds it. ``repeat``: an instruction, for KVzip."""

    def __init__(self, model: Any, ids: Tensor, repeat: list[int]) -> None:
        self.replay, self.after = Replay(model, ids[:LENGTH], ahead=find_look_ahead(model)), ids[LENGTH:]
        unrounded = self._read(self.replay.full())
        self.replay.keys, self.replay.values = map(self._rounded, (self.replay.keys, self.replay.values))
        self.full = self._read(self.replay.full())
        self.rounding = self._kl(unrounded, self.full)
        self.context = Context(self.replay.rows(repeat=repeat), SCORERS)

    def judge(self, keys: Tensor, values: Tensor) -> tuple[float, float]:
        """KL of the cache with these rows, and how often its most likely token is the uncompressed cache's."""
        seen = self._read(cache_of(self._rounded(keys), self._rounded(values)))
        return self._kl(self.full, seen), float((seen.argmax(-1) == self.full.argmax(-1)).float().mean())

    @staticmethod
    def _rounded(rows: Tensor) -> Tensor:
        return rows.bfloat16().float()

    def _read(self, cache: Any) -> Tensor:
        """Log-probabilities of what follows."""
        return self.replay.ask(cache, [self.after], [AHEAD])[0]

    @staticmethod
    def _kl(of: Tensor, seen: Tensor) -> float:
        return float((of.exp() * (of - seen)).sum(-1).mean())


def fidelity(reader: Reader, entry: Entry) -> Record:
    kept = entry.codec(reader.context)
    kl, top1 = reader.judge(kept.keys, kept.values)
    return {"bytes": kept.nbytes / reader.context.full_bytes, "kl": kl, "top1": top1}


def coders() -> dict[str, Callable[[bytes], bytes]]:
    """Lossless coders: Python's, and zstandard's if it is installed."""
    found: dict[str, Callable[[bytes], bytes]] = {"zlib 6": lambda data: zlib.compress(data, 6)}
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        found["zstd 3"] = zstandard.ZstdCompressor(level=3).compress
    return found


def entropy(codes: bytes) -> float:
    """The share that an ideal coder of single codes, two a byte, would keep."""
    both = np.frombuffer(codes, np.uint8)
    share = np.bincount(np.concatenate((both & 15, both >> 4)), minlength=16) / (2 * len(both))
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum()) / 4


def squeezed(reader: Reader) -> Iterator[Record]:
    """What lossless coders save of the codes of K4V4, two a byte, K and V apart; the bounds are left out."""
    for part, codes in nibbles(reader.context).items():
        yield {"part": part, "coder": "order-0 entropy", "squeezed": entropy(codes)}
        for coder, compress in coders().items():
            began = time.perf_counter()
            size = len(compress(codes))
            speed = len(codes) / (time.perf_counter() - began) / 1e6
            yield {"part": part, "coder": coder, "squeezed": size / len(codes), "megabytes_per_second": speed}


@dataclass
class Run:
    """Measures what is not in the store yet: every codec on the first ``count`` texts (None: all)."""

    model: Any
    tokenizer: Any
    store: Store
    screen: Screen
    quick: bool
    count: int | None = None

    def __post_init__(self) -> None:
        self.entries = [entry for entry in entries() if not self.quick or entry.name in QUICK]
        versions = platform.python_version(), torch.__version__, transformers.__version__
        code = digest_of_folders(
            "bench/contexts/quantise.py", "kara_kernels/contexts/replay.py", "kara_kernels/reference"
        )
        scorers = {name: sources.of_callable(scorer) for name, scorer in SCORERS.items()}
        here = [code_of(inspect.getsource(thing)) for thing in (Reader, fidelity, squeezed)]
        self._repeat: list[int] = self.tokenizer(REPEAT, add_special_tokens=False).input_ids
        self._reader = digest(digest_of(self.model), versions, LENGTH, AHEAD, self._repeat, code, scorers, here)

    def records(self) -> list[Record]:
        chosen = self._texts()
        records: list[Record] = []
        with self.screen.phase({}, "frontier", len(chosen) * (len(self.entries) + 1), "measurements") as advance:
            for text, ids in chosen:
                records += self._of_text(text, ids, partial(advance, 1, text.name))
        return records

    def _texts(self) -> list[tuple[Text, list[int]]]:
        chosen = []
        for text in texts.shipped()[: QUICK_TEXTS if self.quick else self.count]:
            ids = self.tokenizer(text.text, add_special_tokens=False).input_ids[: LENGTH + AHEAD]
            if len(ids) < LENGTH + AHEAD:
                self.screen.say(f"left out {text.name}: {len(ids)} tokens, {LENGTH + AHEAD} are needed")
                continue
            chosen.append((text, ids))
        return chosen

    def _of_text(self, text: Text, ids: list[int], done: Callable[[], None]) -> Iterator[Record]:
        reader: Reader | None = None

        def read() -> Reader:
            nonlocal reader
            if reader is None:
                reader = Reader(self.model, torch.tensor(ids, device=self.model.device), self._repeat)
            return reader

        def measure(entry: Entry) -> Record:
            return fidelity(read(), entry)

        where = {"text": text.name, "kind": text.kind}
        for entry in self.entries:
            key = digest("frontier", self._reader, ids, repr(entry.codec))
            found = self.store.kept(key, partial(measure, entry))
            yield {**where, "codec": entry.name, "family": entry.family, **found}
            done()
        key = digest("frontier", self._reader, ids, "once", sorted(coders()))
        once = self.store.kept(key, lambda: {"rounding": read().rounding, "coders": list(squeezed(read()))})
        yield {**where, "codec": "bfloat16", "family": "cache", "bytes": 1.0, "kl": once["rounding"]}
        for found in once["coders"]:
            yield {**where, "family": "coder", **found}
        done()


def load_model(name: str | None, say: Callable[[str], None]) -> tuple[Any, Any]:
    """As ``bench.quality`` does, and a single file in GGUF, which is unpacked to float32."""
    if name is None or not name.endswith(".gguf"):
        return load(name, dtype="float32", device="cpu", say=say)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    path = Path(name).expanduser()
    if not path.is_file():
        raise DemoError(f"--model {name}: no such file", 2)
    say(f"unpacking {path}")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.contexts.frontier", description="Compare codecs of contexts."
    )
    parser.add_argument("--quick", action="store_true", help="four minutes: six texts, few codecs")
    parser.add_argument(
        "--model", help="a directory, a Hugging Face name or a .gguf file (default: the packaged model)"
    )
    parser.add_argument("--texts", type=int, help="only the first texts; kinds take turns (default: all 60)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results)")
    options = parser.parse_args(argv)
    for name in ("threads", "texts"):
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"--{name}: expected 1 or more, got {given}")
    if options.out is None:  # a quick run never replaces the figures of a full one
        options.out = RESULTS / "quick" if options.quick else RESULTS
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return concluded("frontier", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    import kara_kernels.integrations.transformers

    make_folder(options.out)
    torch.set_num_threads(options.threads)
    screen = Screen()
    model, tokenizer = load_model(options.model, screen.say)
    records = Run(model, tokenizer, Store(), screen, options.quick, options.texts).records()
    head = {
        "model": Path(options.model).stem if options.model else page.PACKAGED,
        "quick": options.quick,
        "context": LENGTH,
        "ahead": AHEAD,
        "kara_kernels": kara_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    name = "contexts-frontier" + (f"-{head['model'].lower()}" if options.model else "")
    table = options.out / f"{name}.csv"
    tables.write(table, records, **head)
    report = table.with_suffix(".md")
    report.write_text(page.write(head, records), encoding="utf-8")
    print(table, report, sep="\n")


if __name__ == "__main__":
    raise SystemExit(main())
