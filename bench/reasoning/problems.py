"""Problems with known answers whose working fills several windows, drawn from a seed.

A conversation shows one short problem with its working, so that a model knows the form, and asks another. The model
works step by step and ends with a line ``Answer: ...``. What the answer depends on beyond the question, the model has
written itself, so it lies in what is compressed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

NAMES = "Ann Bob Cleo Dan".split()
SHOWN = 5  # steps of the problem that is shown


class Task(NamedTuple):
    """A question, the lines of its working, and the answer."""

    question: str
    working: tuple[str, ...]
    answer: str

    @property
    def reply(self) -> str:
        return "\n".join([*self.working, f"Answer: {self.answer}"])


@dataclass(frozen=True)
class Problem:
    name: str
    """``FAMILY-NUMBER``"""
    shown: Task
    asked: Task

    @property
    def family(self) -> str:
        return self.name.rpartition("-")[0]

    @property
    def messages(self) -> list[dict[str, str]]:
        told = (("user", self.shown.question), ("assistant", self.shown.reply), ("user", self.asked.question))
        return [{"role": role, "content": content} for role, content in told]

    def solved_by(self, text: str) -> bool:
        """Whether the last answer in ``text`` is the right one."""
        return answer_in(text) == answer_in(f"Answer: {self.asked.answer}")


def answer_in(text: str) -> list[str] | None:
    """The words of the line after the last ``Answer:``; None if there is none."""
    found = re.findall(r"Answer:([^\n]*)", text)
    return re.findall(r"-?\w+", found[-1]) or None if found else None


def trace(rng: random.Random, steps: int) -> Task:
    """A program, executed iteration by iteration."""
    a, b, c = (rng.randrange(1, 10) for _ in range(3))
    program = f"a, b, c = {a}, {b}, {c}\n"
    program += f"for i in range({steps}):\n    a = (a + b) % 10\n    b = (b + c + i) % 10\n    c = (a + c) % 10\n"
    program += "print(a, b, c)"
    working = []
    for i in range(steps):
        line = f"i={i}: a = ({a} + {b}) % 10 = {(a + b) % 10}, "
        a = (a + b) % 10
        line += f"b = ({b} + {c} + {i}) % 10 = {(b + c + i) % 10}, "
        b = (b + c + i) % 10
        line += f"c = ({a} + {c}) % 10 = {(a + c) % 10}"
        c = (a + c) % 10
        working.append(line)
    return Task(f"Execute this program step by step. What does it print?\n\n{program}", tuple(working), f"{a} {b} {c}")


def coins(rng: random.Random, steps: int) -> Task:
    """Who holds how many coins after many gifts."""
    held = {name: rng.randrange(10, 20) for name in NAMES}
    start = ", ".join(f"{name} has {count}" for name, count in held.items())
    moves, working = [], []
    for i in range(steps):
        giver = rng.choice([name for name in NAMES if held[name] > 1])
        taker = rng.choice([name for name in NAMES if name != giver])
        count = rng.randrange(1, min(6, held[giver]))
        held[giver] -= count
        held[taker] += count
        moves.append(f"{i + 1}. {giver} gives {count} to {taker}.")
        working.append(f"{moves[-1]} " + ", ".join(f"{name} {held[name]}" for name in NAMES))
    asked = rng.choice(NAMES)
    listed = "\n".join(moves)
    question = f"Four people have coins: {start}.\n\n{listed}\n\nHow many coins does {asked} have at the end?"
    return Task(question, tuple(working), str(held[asked]))


def total(rng: random.Random, steps: int) -> Task:
    """A long sum with a running total."""
    numbers = [rng.randrange(11, 100) for _ in range(steps)]
    sums = [sum(numbers[: i + 1]) for i in range(steps)]
    working = [f"{i + 1}. {before} + {number} = {before + number}"
               for i, (before, number) in enumerate(zip([0, *sums], numbers, strict=False))]  # fmt: skip
    return Task(
        f"Add these numbers, one after the other: {', '.join(map(str, numbers))}.", tuple(working), str(sums[-1])
    )


def ranks(rng: random.Random, steps: int) -> Task:
    """Sorting by selection, list by list."""
    left = rng.sample(range(10, 100), steps)
    question = f"Sort these numbers by taking the smallest again and again: {', '.join(map(str, left))}."
    ordered, working = sorted(left), []
    for number in ordered:
        left = [other for other in left if other != number]
        working.append(f"take {number}, left: {', '.join(map(str, left)) or 'nothing'}")
    return Task(question, tuple(working), ", ".join(map(str, ordered)))


def table(rng: random.Random, steps: int) -> Task:
    """Looking up values that the model derived long before."""
    factor, shift = rng.randrange(3, 10), rng.randrange(2, 30)
    values = [factor * n + shift for n in range(1, steps + 1)]
    working = [f"f({n}) = {factor} * {n} + {shift} = {factor * n} + {shift} = {values[n - 1]}"
               for n in range(1, steps + 1)]  # fmt: skip
    first, second = sorted(rng.sample(range(1, 1 + max(2, steps // 2)), 2))
    a, b = values[first - 1], values[second - 1]
    working.append(f"f({first}) + f({second}) = {a} + {b} = {a + b}")
    question = f"Let f(n) = {factor} * n + {shift}. Compute f(1) to f({steps}), then f({first}) + f({second})."
    return Task(question, tuple(working), str(a + b))


def chain(rng: random.Random, steps: int) -> Task:
    """Questions of which later ones ask for earlier results."""
    results: list[int] = []
    asked, working = [], []
    for i in range(steps):
        count = rng.randrange(2, 30)
        if i < 3 or rng.random() < 0.4:
            other = rng.randrange(2, 60)
            asked.append(f"Q{i + 1}: What is {count} + {other}?")
        else:
            earlier = rng.randrange(max(0, i - 10), i - 1)
            other, told = count, f"Q{earlier + 1}"
            count = results[earlier]
            asked.append(f"Q{i + 1}: What is the result of {told} plus {other}?")
        results.append(count + other)
        working.append(f"Q{i + 1}: {count} + {other} = {results[-1]}")
    listed = "\n".join(asked)
    return Task(
        f"Answer these questions. The answer is that of Q{steps}.\n\n{listed}", tuple(working), str(results[-1])
    )


Family = Callable[[random.Random, int], Task]
FAMILIES: Mapping[str, tuple[Family, int]] = MappingProxyType({
    "trace": (trace, 12), "coins": (coins, 14), "total": (total, 30), "ranks": (ranks, 10), "table": (table, 20),
    "chain": (chain, 28),
})  # fmt: skip
"""Each with the number of its steps."""


def problems(count: int, seed: int, steps: Mapping[str, int] = MappingProxyType({})) -> list[Problem]:
    """``count`` problems, the families in turn. The first ones do not depend on ``count``."""
    names, found = list(FAMILIES), []
    for i in range(count):
        name, number = names[i % len(names)], i // len(names)
        family, usual = FAMILIES[name]
        rng = random.Random(f"{seed} {name} {number}")
        found.append(Problem(f"{name}-{number}", family(rng, SHOWN), family(rng, steps.get(name, usual))))
    return found
