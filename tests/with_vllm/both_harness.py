"""An engine with windows and contexts: what its requests were admitted with, and which of its plans met a store."""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from contexts_harness import ON, Server
from dense import _seen
from harness import KARA, engine, greedy

from kara_kernels.contexts.profile import Measured, Profile, ProfiledContext, keys_of
from kara_kernels.integrations.vllm.contexts.catalogue import steps_of
from kara_kernels.integrations.vllm.contexts.jobs import Store
from kara_kernels.integrations.vllm.contexts.manager import Place

TAILED = {**KARA, "tail": 32}
"""The last window then always ends before the last whole block."""
TALKING = {**ON, "conversations": True}


class Left(NamedTuple):
    """Rows ``[L, H, R, D]`` of a conversation, and the request that left them."""

    keys: torch.Tensor
    values: torch.Tensor
    tokens: int
    by: str
    events: int
    """In its trace, when the rows were loaded."""
    preempted: int
    """How often it was, by then."""


def slowly(transfer, seconds):
    return lambda job: (time.sleep(seconds), transfer(job))


def left_by_itself(left, served):
    """Whether a request was preempted, and went on with its own rows."""
    return left.by == served.request_id


def client_of(name):
    return name.rsplit("-", 1)[0]


class Both:
    """vLLM with both in this process. Every request that it starts is judged by the dense model."""

    def __init__(self, some, model):
        self.engine, self.server = some, Server(some.llm, model)
        self.scheduler, self.manager = some.scheduler, self.server.manager
        self.half = self.server.connector.contexts
        self.met = 0
        """Plans that were made while a store ran of the same request."""
        self.dense = None
        """Says which tokens the rows of conversations stand for."""
        self.served = {}
        self.left_by = {}
        """The request that left a conversation, by its key."""
        self._packets = {}
        self._rows = defaultdict(dict)
        self._watch_stores()
        self._watch_loads()
        self._watch_steps()
        self._watch_plans()

    def _watch_stores(self):
        start = self.manager.transfers.start

        def started(transfer, job=None, *args):
            if isinstance(job, Store):
                self.left_by[job.context] = client_of(job.request_id)
            start(transfer, job, *args)

        self.manager.transfers.start = started

    def _watch_loads(self):
        load = self.manager.load

        def loaded(request_id, admission, blocks):
            copy, place = self.manager.keeper.get(admission.place.key), admission.place
            rows = self.server.rows_of_copy(copy, place.most_rows, admission.way.step.sections)
            if place.rows is not None:
                by = self.left_by[place.key]
                happened = len(self.engine.events_of(by)), len(self.engine.recomputed[by])
                rows = Left(*rows[:2], place.tokens, by, *happened)
            self._packets[admission.packet] = rows
            load(request_id, admission, blocks)

        self.manager.load = loaded

    def _watch_steps(self):
        schedule = self.scheduler.schedule

        def scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            new = [request.req_id for request in output.scheduled_new_reqs]
            for name in [*new, *output.scheduled_cached_reqs.resumed_req_ids]:
                admission, client = self.half._admitted.get(name), client_of(name)
                start = (self.engine.recomputed[client] or [0])[-1]
                self._rows[client][start] = admission and self._packets[admission.packet]
            return output

        self.scheduler.schedule = scheduled

    def _watch_plans(self):
        shrink = self.scheduler._manager.shrink

        def watched(plan):
            for running in self.manager.transfers._running.values():
                if running.phases[:1] == ["encode"]:
                    assert not set(running.job.blocks) & set(plan.touched), plan
                    self.met += running.job.request_id == plan.request_id
            shrink(plan)

        self.scheduler._manager.shrink = watched

    def add(self, name, prompt, tokens, own=..., *, salt=None, **params):
        extra = {"kv_transfer_params": params} | ({} if own is ... else {"kara": own})
        self.engine.prompts[name] = prompt
        core = self.engine.llm.llm_engine
        given = {"prompt_token_ids": prompt} | ({} if salt is None else {"cache_salt": salt})
        core.add_request(name, given, greedy(tokens, extra_args=extra))

    def drive(self, events):
        """See :meth:`harness.Engine.drive`; events are called with this object."""
        calls = {step: lambda _, event=event: event(self) for step, event in events.items()}
        served = self.engine.drive(calls)
        self.served |= served
        return {name: self._known(x) for name, x in served.items()}

    def ask(self, name, prompt, tokens=12, own=..., **params):
        return self.drive({0: lambda both: both.add(name, prompt, tokens, own, **params)})[name]

    def _known(self, served):
        rows = self._rows[served.request_id]
        served.rows = {}
        for start, x in rows.items():
            if isinstance(x, Left):
                x = self._placed(x, left_by_itself(x, served))
            served.rows[start] = x
        return served

    def _placed(self, left, by_itself):
        """Rows that windows left at the places of their tokens, as the trace of the request says that left them. They
        are those of the dense model. ``by_itself``: it goes on with them after a preemption."""
        events, count = self.engine.events_of(left.by), left.keys.shape[2]
        if by_itself:
            whole, events = self.served[left.by], events[: left.events]
            served = replace(whole, recomputed=whole.recomputed[: left.preempted - 1])
        else:
            served = self._known(self.served[left.by])
        held = self.dense.held(served, events)
        places = held[:, :, :count]
        assert (places < left.tokens).all()
        assert (held[:, :, count:] >= left.tokens).all()
        at = places[..., None].expand_as(left.keys)
        self.dense.logits(served, events)
        for layer, (_, *expected) in _seen.items():
            for rows, of_dense in zip((left.keys[layer], left.values[layer]), expected, strict=True):
                torch.testing.assert_close(rows, of_dense[0].gather(1, at[layer]), atol=1e-4, rtol=1e-4)
        empty = left.keys.new_zeros(*left.keys.shape[:2], left.tokens, left.keys.shape[3])
        return empty.scatter(2, at, left.keys), empty.scatter(2, at, left.values), places

    def went_on(self, name):
        """Whether a request was ever admitted with a conversation."""
        return any(isinstance(rows, Left) for rows in self._rows[name].values())

    def store(self, name, prompt, count):
        """A context to admit requests with: asks, and forgets the exact rows."""
        served = self.ask(name, prompt, context_tokens=count)
        self.server.forget()
        return served

    def preempt(self):
        """Nobody gets a block until a request is preempted, which finds none of its rows again."""
        manager, preempt = self.scheduler.kv_cache_manager, self.scheduler._preempt_request
        allocate = manager.allocate_slots

        def preempted(*args, **kwargs):
            manager.allocate_slots, self.scheduler._preempt_request = allocate, preempt
            preempt(*args, **kwargs)
            assert manager.reset_prefix_cache()

        manager.allocate_slots = lambda *args, **kwargs: None
        self.scheduler._preempt_request = preempted

    def lose_rows(self, monkeypatch):
        """What windows left of preempted requests finds no room, so that their texts are computed again."""
        monkeypatch.setattr(self.half, "_preempted", None)

    def abort_some(self, draw):
        """A request whose rows are loaded, if there is one, else one that runs."""
        names = [x.request_id for x in self.scheduler.kv_holding_waiting or self.scheduler.running]
        if names:
            self.engine.abort(client_of(draw.choice(names)))

    def take_longer(self, monkeypatch, **seconds):
        """Lets ``store`` and ``load`` of the worker take so many seconds more."""
        for job, more in seconds.items():
            monkeypatch.setattr(self.server.worker, f"_{job}", slowly(getattr(self.server.worker, f"_{job}"), more))

    def assert_nothing_leaks(self):
        self.server.assert_nothing_leaks()
        self.engine.assert_nothing_leaks()


def allow(both, documents, method, of):
    """Tells the engine of a profile that allows documents some compressions of a method, whose quality is 0.99.
    ``method()``: one for each document. ``of(steps)``: some of them."""
    catalogue, contexts = both.manager.catalogue, {}
    for document in documents:
        key, name = next(keys_of(document, [len(document)])), method()
        steps = of(steps_of(catalogue._header("", len(document), name)))
        measured = tuple(Measured(name, x.sections, x.ratio, x.nbytes, 0.0, x.rows, 0.01, 1.0) for x in steps)
        contexts[key] = ProfiledContext(key, "", len(document), 1.0, 0.1, ("?",), measured)
    catalogue._take(Profile("made", {}, (), contexts))


@contextmanager
def serving_both(model, trace, kara=KARA, contexts=ON, **options):
    additional = {"kara": {**kara, "trace": str(trace)}, "contexts": contexts}
    settings = {"additional_config": additional, "num_gpu_blocks_override": 64, "disable_log_stats": False, **options}
    with engine(model, None, **settings) as some:
        some.trace = trace
        yield Both(some, model)


def stored(both):
    """Places of conversations that are stored."""
    both.server.rest()
    places = [Place.of(copy.key) for copy in both.manager.keeper.directory.copies()]
    return [place for place in places if place.rows is not None]


def resumed(both):
    """How often a preempted request was admitted with its rows."""
    return sum(n for (name, *_), n in both.manager.counts.items() if name == "resumed")


def turn(both, name, text, question, tokens=150, own=..., **params):
    """A request that goes on with a text, and the text behind it. What was exact is gone from the GPU before it."""
    both.server.forget()
    served = both.ask(name, text + question, tokens, own, **params)
    return served, served.prompt + served.tokens
