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

NAMES = "Ann", "Bob"
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
    x, y, by, add = rng.randrange(1, 20), rng.randrange(1, 20), rng.randrange(2, 5), rng.randrange(2, 10)
    program = f"x, y = {x}, {y}\nfor i in range(1, {steps + 1}):\n    if i % {by} == 0:\n        x = x + i\n"
    program += f"    else:\n        y = y + {add}\nprint(x, y)"
    working = []
    for i in range(1, steps + 1):
        if i % by == 0:
            working.append(f"i = {i}: {i} % {by} = {i % by}, x = {x} + {i} = {x + i}")
            x += i
        else:
            working.append(f"i = {i}: {i} % {by} = {i % by}, y = {y} + {add} = {y + add}")
            y += add
    question = f"Execute this program step by step. What does it print?\n\n{program}"
    return Task(question, tuple(working), f"{x} {y}")


def coins(rng: random.Random, steps: int) -> Task:
    """Who holds how many coins, step by step."""
    held = {name: rng.randrange(10, 30) for name in NAMES}
    start = ", ".join(f"{name} has {count}" for name, count in held.items())
    moves, working = [], []
    for i in range(steps):
        name, count = rng.choice(NAMES), rng.randrange(2, 10)
        before = held[name]
        sign = "-" if before > count + 5 and rng.random() < 0.5 else "+"
        held[name] += count if sign == "+" else -count
        moves.append(f"{i + 1}. {name} {'finds' if sign == '+' else 'loses'} {count}.")
        working.append(
            f"{moves[-1]} {name}: {before} {sign} {count} = {held[name]}; "
            + ", ".join(f"{other} {held[other]}" for other in NAMES)
        )
    asked = rng.choice(NAMES)
    listed = "\n".join(moves)
    question = f"Two people have coins: {start}.\n\n{listed}\n\nHow many coins does {asked} have at the end?"
    return Task(question, tuple(working), str(held[asked]))


def total(rng: random.Random, steps: int) -> Task:
    """A long sum with a running total."""
    numbers = [rng.randrange(2, 30) for _ in range(steps)]
    sums = [sum(numbers[: i + 1]) for i in range(steps)]
    working = [f"{i + 1}. {before} + {number} = {before + number}"
               for i, (before, number) in enumerate(zip([0, *sums], numbers, strict=False))]  # fmt: skip
    return Task(
        f"Add these numbers, one after the other: {', '.join(map(str, numbers))}.", tuple(working), str(sums[-1])
    )


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
    "trace": (trace, 20), "coins": (coins, 16), "total": (total, 24), "table": (table, 20), "chain": (chain, 28),
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
