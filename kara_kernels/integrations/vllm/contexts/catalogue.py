"""What contexts may be stored as: what a profile has measured of them, and what is safe without.

Packets of the plugin hold all rows in their order, of a form (``"none/int8"``: no scorer, eight bits), and are cut to
fewer bits. Or they hold them in the order of a scorer (``"keydiff/int4"``), and are cut to fewer rows as well. Packets
that take as many grains count as one option: the largest of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kara_kernels.contexts.packet import Header, Step
from kara_kernels.contexts.profile import Profile, ProfiledContext, keys_of
from kara_kernels.contexts.utility import Option

from ..watched import WatchedFile
from .grains import Grains
from .settings import CONVERSATION, METHODS, SAFE, SAFEST, may_drop, needs_queries

logger = logging.getLogger("vllm.kara")  # a child of vLLM's logger: its handlers and levels apply

COVERED = 0.9  # share of a context that its profile was measured with, at least
HEADERS = 256  # of contexts that were described or admitted last
JUDGE = "likelihood"


class Way(NamedTuple):
    """How a context is encoded."""

    method: str
    step: Step

    @property
    def form(self) -> str:
        return self.method.partition("/")[2]

    @property
    def scorer(self) -> str:
        """Empty: rows are in the order of their tokens."""
        return self.method.partition("/")[0] if may_drop(self.method) else ""


class Catalogue:
    """Options of contexts.

    Args:
        header: ``header(key, tokens, method)``: what packets of a context say.
        methods: those that may be used.
        windows: whether requests may begin with fewer rows than tokens.
        left: whether they may begin with rows that windows left.
        profile: a file of ``python -m kara_kernels.contexts profile``, which need not exist yet. It is read again when
            it changes.

    Attributes:
        judges: whether queries of contexts rank their rows.
        version: grows with every profile that is read, from 1.
        refused: how often the file had changed and could not be read.

    Raises:
        OSError, ProfileError: the profile exists and cannot be read.
    """

    def __init__(
        self, header: Callable[[str, int, str], Header], grains: Grains, methods: Sequence[str] = (SAFEST,),
        profile: str | None = None, windows: bool = False, left: bool = False,
    ) -> None:  # fmt: skip
        self._header = functools.lru_cache(HEADERS)(header)  # one takes a quarter of a millisecond, and hits need it
        self._grains, self._methods = grains, tuple(methods)
        self.judges = any(needs_queries(method) for method in self._methods)
        self._known_methods = [method for method in METHODS if windows or not may_drop(method)]
        self._known_methods += [CONVERSATION] * left
        self._file = None if profile is None else WatchedFile(profile)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kara-profile")
        self._reading: Future[Profile] | None = None
        self._contexts: Mapping[str, ProfiledContext] = {}
        self._lengths: list[int] = []  # in tokens, of the contexts in the profile
        self.version, self.refused = 1, 0
        if self._file is not None and self._file.changed():
            self._take(Profile.load(self._file.path))
        elif self._file is not None:
            logger.warning("Kara's profile %s does not exist yet", self._file.path)

    @property
    def profiled(self) -> int:
        """Contexts in the profile."""
        return len(self._contexts)

    @property
    def age(self) -> float:
        """Seconds since the profile was written."""
        return 0.0 if self._file is None else self._file.age

    def changed(self) -> bool:
        """Whether another profile holds from now on. It looks at the file at most once a second, and reads it in a
        thread. A file that cannot be read leaves everything as it is."""
        if self._reading is not None:
            return self._reading.done() and self._read()
        if self._file is not None and self._file.changed():
            if self._file.exists:
                self._reading = self._reader.submit(Profile.load, self._file.path)
            else:
                self._refuse("it is gone")
        return False

    def find(self, ids: Sequence[int], tokens: int) -> str:
        """The key in the profile of a context: the longest one that it begins with and that covers nine tenths of it.
        Empty: none."""
        lengths = [n for n in self._lengths if COVERED * tokens <= n <= tokens]
        found = [key for key in keys_of(ids, lengths) if key in self._contexts]
        return found[-1] if found else ""

    def options(self, key: str, tokens: int, profiled: str, to_load: Callable[[str, int], float]) -> list[Option]:
        """What a context may be stored as.

        Args:
            profiled: its key in the profile, or an empty text.
            to_load: ``to_load(form, rows)``: seconds to load rows.
        """
        found: dict[tuple[str, int], Option] = {}
        for method in self._methods:
            header, form = self._header(key, tokens, method), method.partition("/")[2]
            measured = self._measured(header, method, profiled)
            if method in SAFE:
                measured.setdefault(header.steps[-1].nbytes, SAFE[method])
            for nbytes, quality in sorted(measured.items()):
                taken = self._grains.needed(nbytes)
                step = self._fitting(header, taken)
                size = taken * self._grains.nbytes
                found[method, taken] = Option(method, step.ratio, size, quality, to_load(form, step.rows))
        return list(found.values())

    def as_it_is(self, key: str, rows: int, to_load: Callable[[str, int], float]) -> Option:
        """The only thing that a conversation is stored as. To go on with its rows loses nothing."""
        step = self._header(key, rows, CONVERSATION).steps[-1]
        nbytes = self._grains.needed(step.nbytes) * self._grains.nbytes
        return Option(CONVERSATION, step.ratio, nbytes, 1.0, to_load("exact", rows))

    def way(self, key: str, tokens: int, option: Option) -> Way | None:
        """How an option is encoded. None: the plugin has no such packets."""
        if option.method not in self._known_methods:
            return None
        header, taken = self._header(key, tokens, option.method), self._grains.needed(option.nbytes)
        if not any(self._grains.needed(step.nbytes) == taken for step in steps_of(header)):
            return None
        return Way(option.method, self._fitting(header, taken))

    def cut(self, key: str, tokens: int, way: Way, ratio: float) -> Way:
        """What a packet can be cut to that is nearest to a ratio."""
        held = [step for step in steps_of(self._header(key, tokens, way.method)) if step.nbytes <= way.step.nbytes]
        return Way(way.method, min(held, key=lambda step: abs(step.ratio - ratio)))

    def _measured(self, header: Header, method: str, profiled: str) -> dict[int, float]:
        """Qualities by bytes of packets."""
        context, found = self._contexts.get(profiled), dict[int, float]()
        if context is None:
            return found
        as_measured = {step.sections: step for step in steps_of(self._header("", context.tokens, method))}
        for each in context.measured:
            if each.method == method and each.sections in as_measured:
                step = _least(header, as_measured[each.sections], context.tokens)
                found[step.nbytes] = max(each.quality(JUDGE), found.get(step.nbytes, 0.0))
        return found

    def _fitting(self, header: Header, grains: int) -> Step:
        """The largest packet that takes so many grains at most."""
        return [step for step in header.steps if self._grains.needed(step.nbytes) <= grains][-1]

    def _read(self) -> bool:
        assert self._reading is not None
        reading, self._reading = self._reading, None
        try:
            self._take(reading.result())
        except (OSError, ValueError) as error:
            self._refuse(str(error))
            return False
        return True

    def _take(self, profile: Profile) -> None:
        self._contexts = profile.contexts
        self.version += 1
        self._lengths = sorted({context.tokens for context in self._contexts.values()})
        logger.info("Kara has a profile of %d contexts", len(self._contexts))

    def _refuse(self, why: str) -> None:
        self.refused += 1
        logger.error("Kara's profile stays as it was: %s", why)


def steps_of(header: Header) -> list[Step]:
    """Compressions of a packet. Rows in the order of their tokens are never dropped: these would be the newest."""
    tokens = header.layout.tokens
    return [step for step in header.steps if header.layout.places or step.rows == tokens]


def _least(header: Header, measured: Step, tokens: int) -> Step:
    """The least packet with at least the shares of rows, and of fine rows, that another one of ``tokens`` had. Exact
    rows are as many in both."""
    steps, exact = steps_of(header), header.layout.exact_rows
    own, others = header.layout.tokens - exact, tokens - exact

    def as_good(step: Step) -> bool:
        enough_rows = (step.rows - exact) * others >= (measured.rows - exact) * own
        return enough_rows and (step.finer - exact) * others >= (measured.finer - exact) * own

    return next((step for step in steps if as_good(step)), steps[-1])
