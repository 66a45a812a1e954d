"""Facts, passages, tables and changing states inside filler text, and questions about them.

A haystack is one text. Its questions are asked one after the other, each from the same cache. Whether the model answers
correctly with the full cache is measured too, because a question it cannot answer there says nothing about compression.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

CITIES = (
    "Lisbon Oslo Cairo Lima Quebec Athens Dublin Havana Kyoto Nairobi Prague Riga Seoul Tunis Vienna Zagreb".split()
)
FIRST = "Harold Maria Oscar Ingrid Pablo Nadia Victor Helena Simon Clara Bruno Edith".split()
LAST = "Finch Calloway Brandt Moreau Okafor Lindqvist Hale Santoro Whitaker Novak Pryce".split()
THINGS = "lantern anchor violin compass kettle ladder mirror saddle hammer basket bottle".split()
PLACES = "kitchen garden attic cellar library stable workshop chapel tower pantry".split()
WORDS = (
    "river copper winter candle forest silver bridge thunder meadow pepper harbor velvet marble orchard falcon pebble "
    "ribbon walnut canyon ember glacier willow saffron quartz"
).split()


@dataclass(frozen=True)
class Case:
    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Haystack:
    name: str
    ids: list[int]
    cases: list[Case]


def haystacks(tokenizer: Any, filler: list[str], count: int, length: int, tail: int, seed: int) -> list[Haystack]:
    """``count`` texts of ``length`` tokens. Nothing asked about lies in the last ``tail`` or the first 64 tokens."""
    return [_haystack(tokenizer, filler[i % len(filler)], length, tail, random.Random(f"{seed} {i}"), i)
            for i in range(count)]  # fmt: skip


def _haystack(tokenizer: Any, filler: str, length: int, tail: int, rng: random.Random, index: int) -> Haystack:
    needles, cases = _needles(rng)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    needle_ids = [ids("\n" + needle + "\n") for needle in needles]
    room = length - 64 - tail - sum(map(len, needle_ids))
    if room < 0:
        raise ValueError(f"length: expected at least {length - room}, got {length}")
    text = ids(filler[rng.randrange(max(1, len(filler) // 4)) :])
    text = (text * (1 + length // max(1, len(text))))[: length - sum(map(len, needle_ids))]
    cuts = sorted(rng.randrange(64, 64 + room) for _ in needles)
    out, start = [], 0
    for cut, needle in zip(cuts, needle_ids, strict=True):
        out += text[start:cut] + needle
        start = cut
    return Haystack(f"haystack-{index + 1}", out + text[start:], cases)


def _needles(rng: random.Random) -> tuple[list[str], list[Case]]:
    needles: list[str] = []
    cases: list[Case] = []
    cities = rng.sample(CITIES, 9)

    single = str(rng.randrange(10_000, 100_000))
    needles.append(f"Remember this: the password of the vault is {single}.")
    cases.append(Case("single key", "\n\nTo open it, recall: the password of the vault is", f" {single}"))

    for city in cities[:4]:
        number = str(rng.randrange(1_000, 10_000))
        needles.append(f"The access code of the {city} office is {number}.")
        cases.append(Case("numbers", f"\n\nAs was said above, the access code of the {city} office is", f" {number}"))
    for city in cities[4:8]:
        name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
        needles.append(f"The director of the {city} museum is {name}.")
        cases.append(Case("names", f"\n\nAs was said above, the director of the {city} museum is", f" {name}"))

    keys = rng.sample([a + b for a in "bdfgkmpt" for b in "aeiou"], 8)
    table = {f"{key}{rng.randrange(10, 100)}": str(rng.randrange(100, 1000)) for key in keys}
    needles.append("Table of parts:\n" + "\n".join(f"{key}: {value}" for key, value in table.items()))
    for key in rng.sample(sorted(table), 3):
        cases.append(Case("key-value", f"\n\nFrom the table of parts:\n{key}:", f" {table[key]}"))

    for thing in rng.sample(THINGS, 2):
        first, second, third = rng.sample(PLACES, 3)
        for verb, place in (("is", first), ("was moved and is now", second), ("was moved again and is now", third)):
            needles.append(f"The {thing} {verb} in the {place}.")
        cases.append(Case("state", f"\n\nAfter all that moving, the {thing} is now in the", f" {third}"))

    passage = [rng.choice(WORDS) for _ in range(24)]
    needles.append(f"Verse of {cities[8]}: " + " ".join(passage))
    cases.append(Case("copying", f"\n\nVerse of {cities[8]}: " + " ".join(passage[:3]), " " + " ".join(passage[3:])))
    # Moves keep their order, and everything else is shuffled around them.
    moves = [needle for needle in needles if needle.startswith("The") and " in the " in needle]
    rest = [needle for needle in needles if needle not in moves]
    rng.shuffle(rest)
    places = sorted(rng.sample(range(len(needles)), len(moves)))
    for index, move in zip(places, moves, strict=True):
        rest.insert(index, move)
    return rest, cases
