"""``python -m bench.speed``: times one compression on this CPU, in turns with the baselines."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from bench import baselines, tables
from bench.store import concluded, digest_of_folders, make_folder, measure_all
from kara_kernels import LookAhead, PagedCache, compress_window
from kara_kernels.engine import Policy
from kara_kernels.ops import score_window
from kara_kernels.options import PAPER, RECOMMENDED, split_options
from kara_kernels.packed import Queries
from kara_kernels.reference import pack_queries

from . import report

RESULTS = Path(__file__).parents[1] / "results"
TAIL, PAGE = Policy().tail, 16


@dataclass(frozen=True)
class Case:
    layers: int
    heads: int
    group: int
    dim: int
    window: int
    sequences: int

    @property
    def label(self) -> str:
        return f"{self.layers} x {self.heads} x {self.dim}, W {self.window}, batch {self.sequences}"


SMALL, LARGE = (30, 3, 3, 64), (36, 8, 4, 128)
# Wide windows of the large shape at batch 8 are left out. They would need 4 GB of queries and a minute per round.
CASES = [Case(*SMALL, window, sequences) for sequences in (1, 8) for window in (256, 512, 1024)]
CASES += [Case(*LARGE, window, 1) for window in (256, 512, 1024)] + [Case(*LARGE, 256, 8)]
QUICK = [Case(2, 3, 3, 64, 128, 1)]


class World:
    """Inputs of one compression of a case. Rows of the pools are moved in place, which does not affect times.

    There are two sets of queries: those that the engine shim records by default, in rows ``ring_rows`` of ``ring``, and
    those of every token and head.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        blocks = -(-(case.window + TAIL) // PAGE) * case.sequences
        shape = (blocks, PAGE, case.heads, case.dim)
        self.keys, self.values = ([torch.randn(shape) for _ in range(case.layers)] for _ in range(2))
        self.cache = PagedCache(self.keys, self.values)
        self.tables = torch.randperm(blocks).int().view(case.sequences, -1)
        self.starts = torch.zeros(case.sequences, dtype=torch.int32)
        self.lengths = torch.full((case.sequences,), case.window + TAIL, dtype=torch.int32)
        self.window, self.keep = case.window, case.window // 2
        self.every = torch.randn(case.layers, case.sequences, case.window, case.heads * case.group, case.dim)
        rows = Policy(window=self.window, keep=self.keep).query_rows
        self.ring = pack_queries(torch.randn(case.layers, case.sequences * rows, case.heads * case.group, case.dim))
        angle = torch.arange(case.dim // 2).float()
        self.ahead = LookAhead(angle.cos(), angle.sin())
        self.ring_rows = torch.randperm(case.sequences * rows).int().view(case.sequences, -1)

    def recommended(self) -> object:
        return compress_window(
            self.ring, self.cache.k, self.cache.v, self.tables, self.lengths, window=self.window, keep=self.keep,
            window_starts=self.starts, query_rows=self.ring_rows, look_ahead=self.ahead, backend="torch",
            **RECOMMENDED,
        )  # fmt: skip

    def paper(self) -> object:
        return compress_window(
            self.every, self.cache.k, self.cache.v, self.tables, self.lengths, window=self.window, keep=self.keep,
            window_starts=self.starts, backend="torch", **PAPER,
        )  # fmt: skip

    def scoring(self) -> object:
        """Only the scoring, with the recommended options."""
        scoring, _ = split_options(RECOMMENDED)
        return score_window(
            self.ring, self.cache.k, self.tables, self.starts, self.window, query_rows=self.ring_rows, backend="torch",
            reduction=scoring.reduction, v_cache=self.cache.v, redundancy=scoring.redundancy, look_ahead=self.ahead,
        )  # fmt: skip

    def with_redundancy(self, query: Queries, rows: torch.Tensor | None = None) -> object:
        return score_window(query, self.cache.k, self.tables, self.starts, self.window, query_rows=rows,
                            redundancy=1.0, backend="torch")  # fmt: skip

    def theirs(self, scorer: baselines.Scorer) -> object:
        return baselines.compress(scorer, list(self.every), self.keys, self.values, self.tables, self.starts,
                                  self.lengths, self.window, self.keep)  # fmt: skip

    def jobs(self) -> dict[str, Callable[[], object]]:
        """Jobs of one compression or one scoring each. ``report.LABELS`` explains the names."""
        few = self.every[:, :, -baselines.RKV_QUERIES :].contiguous()
        return {
            "kara": self.recommended,
            "paper": self.paper,
            "predecessor": lambda: self.theirs(baselines.mean_attention),
            "r-kv": lambda: self.theirs(baselines.rkv),
            "snapkv": lambda: self.theirs(baselines.snapkv),
            "kara scorer": self.scoring,
            "redundancy, recorded": lambda: self.with_redundancy(self.ring, self.ring_rows),
            "redundancy, every": lambda: self.with_redundancy(self.every),
            "redundancy, 8": lambda: self.with_redundancy(few),
            "r-kv scorer": lambda: baselines.score(
                baselines.rkv, list(self.every), self.keys, self.tables, self.starts, self.window
            ),
        }


def alternate(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round, in turns, so that a slow moment of the machine affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, job in work.items():
            began = time.perf_counter()
            job()
            if round_:  # the first round loads code and memory
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    return alternate(World(case).jobs(), rounds)


def recorded() -> str:
    """What the engine shim records by default."""
    policy = Policy()
    return f"{policy.query_heads} heads, stride {policy.query_stride}, {policy.query_dtype}"


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for speed.md, speed.csv and speed.png")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default: 1, since waiting threads distort times)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one tiny case")
    options = parser.parse_args(arguments)
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    return concluded("speed", partial(_run, options))


def _run(options: argparse.Namespace) -> None:
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    cases = QUICK if options.quick else CASES
    head = {"kind": "measured on a CPU", "machine": machine(), "threads": options.threads, "torch": torch.__version__,
            "tail": TAIL, "page": PAGE, "recorded": recorded()}  # fmt: skip
    code = digest_of_folders("kara_kernels", "bench/speed", "bench/baselines.py")
    jobs = {case.label: partial(measure, case, options.rounds) for case in cases}
    seconds = measure_all("events", jobs, head, options.rounds, code)
    rows = [{"case": case.label, **asdict(case), "seconds": s} for case, s in zip(cases, seconds, strict=True)]
    tables.write(options.out / "speed.csv", rows, **head)
    (options.out / "speed.md").write_text(report.page(head, rows), encoding="utf-8")
    report.draw(head, rows, options.out / "speed.png")
    print(options.out / "speed.md")


if __name__ == "__main__":
    sys.exit(main())
