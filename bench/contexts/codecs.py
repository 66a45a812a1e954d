"""The codecs that the frontier compares, by name. Bits are written K first: K6V4."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from kara_kernels import scorers
from kara_kernels.options import Scoring

from .quantise import Channels, Codec, Float8, Packet, Residual, Scorer

SCORERS: dict[str, Scorer] = {
    "ours": scorers.kara,
    "ours (mean)": scorers.kara_mean,
    "ours (mean, 256)": partial(scorers.kara, scoring=Scoring(reduction="mean"), window=256),
    "KVzip": scorers.kvzip,
    "SnapKV": scorers.snapkv,
    "KeyDiff": scorers.keydiff,
    "Knorm": scorers.knorm,
    "Compactor": scorers.compactor,
    "random": scorers.random_per_head,
}
plain = partial(Packet, order="position", exact=0, rotate="")  # as bits alone are usually published


@dataclass(frozen=True)
class Entry:
    """``family``: the packet; its ``change`` of one thing at K4V4; ``plain`` codes; ``rows`` in 16 bits; ``other``."""

    name: str
    family: str
    codec: Codec


def entries() -> list[Entry]:
    families = {"packet": _packets(), "change": _changes(), "plain": _plain(), "rows": _rows(), "other": _others()}
    return [Entry(name, family, codec) for family, some in families.items() for name, codec in some.items()]


def _packets() -> dict[str, Codec]:
    found: dict[str, Codec] = {"K8V8": Packet(8, 8), "K4V4": Packet(4, 4)}
    for name, better in {"half": 0.5, "quarter": 0.25, "64 rows": 64 / 768}.items():
        found[f"K4V4, K8V8 for the best {name}"] = Packet(4, 4, better=better)
    for kept in (0.75, 0.5, 0.25, 0.125):
        found[f"{kept} of the rows, K4V4"] = Packet(4, 4, kept)
    found["0.75 of the rows, K8V8"] = Packet(8, 8, 0.75)
    found["0.75 of the rows, K4V4, K8V8 for the best 64"] = Packet(4, 4, 0.75, better=64 / 576)
    for name in ("ours (mean)", "ours (mean, 256)", "KVzip", "Compactor"):
        found[f"K4V4, K8V8 for the best quarter by {name}"] = Packet(4, 4, order=name, better=0.25)
        for kept in (0.75, 0.5, 0.25):
            found[f"{kept} of the rows by {name}, K4V4"] = Packet(4, 4, kept, name)
    return found


def _changes() -> dict[str, Codec]:
    return {
        "no rotation": Packet(4, 4, rotate=""),
        "V rotated too": Packet(4, 4, rotate="kv"),
        "sinks coded like others": Packet(4, 4, exact=0),
        "neither rotation nor exact sinks": Packet(4, 4, exact=0, rotate=""),
        "groups of 32 rows": Packet(4, 4, group=32),
        "groups of 128 rows": Packet(4, 4, group=128),
        "rows by position": Packet(4, 4, order="position"),
        "rows by position in 4 grades": Packet(4, 4, grades=4),
        "rows by position in 16 grades": Packet(4, 4, grades=16),
        "K per row": Packet(4, 4, k_per="row"),
        "K6V4": Packet(6, 4),
        "K4V6": Packet(4, 6),
        "K6V6": Packet(6, 6),
        "K3V3": Packet(3, 3),
        "K3V2 for the worse half": Packet(3, 2, better=0.5, better_bits=(4, 4)),
    }


def _plain() -> dict[str, Codec]:
    found: dict[str, Codec] = {f"int{bits}": plain(bits, bits) for bits in (8, 4, 3, 2)}
    return found | {"fp8 e4m3": Float8(), "K16V8": plain(16, 8)}


def _rows() -> dict[str, Codec]:
    shares = dict.fromkeys(SCORERS, (0.5, 0.25)) | {"ours": (0.75, 0.5, 0.25, 0.125)}
    return {f"{kept} of the rows, {name}": Packet(16, 16, kept, name) for name, some in shares.items() for kept in some}


def _others() -> dict[str, Codec]:
    return {
        "residuals, stride 8, K4V4": Residual(8, 4, 4),
        "residuals, stride 8, K3V3": Residual(8, 3, 3),
        "ThinK, 0.8 of K's channels": Channels(0.8),
        "ThinK, 0.6 of K's channels": Channels(0.6),
        "ThinK, 0.8 of K's channels, K4V4": Channels(0.8, 4),
    }
