"""Engines to test, and the independent reference: a dense model given the traced keep lists."""

import json
import random
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from dense import _seen, dense_logits, replay, turned
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.triton_utils import dispatcher

ON_GPU = current_platform.is_cuda_alike()
VOCABULARY = 512

# On a CPU, an engine that speculates looks for Triton's kernels in the dictionaries of all objects in all modules.
# After the first such engine there are objects of Numba whose `__dict__` is none.
dispatcher.vars = lambda thing: thing.__dict__ if isinstance(thing.__dict__, dict) else {}

MODES = ["synchronous", "asynchronous"]
KARA = {"window": 64, "keep": 32, "tail": 16, "query_stride": 2}


def make_model(folder, kind=LlamaForCausalLM, config=LlamaConfig, embeddings=1.0, **changes):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,  # ten times the usual: the best token stands out, and a wrong row is seen
        "bos_token_id": None,
        "eos_token_id": None,
    }
    made = kind(config(**{**shape, **changes}))
    made.get_input_embeddings().weight.data *= embeddings
    made.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return str(folder)


def prompts(*lengths, seed=1):
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def greedy(tokens, **options):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **options)


def asking(kara, tokens=280):
    """Greedy decoding of a request that asks for `kara`, or for nothing (...)."""
    return greedy(tokens) if kara is ... else greedy(tokens, extra_args={"kara": kara})


def no_block_once(kara):
    """The next request that asks for a block gets none, and is preempted if it is the newest."""
    manager = kara.scheduler.kv_cache_manager
    allocate = manager.allocate_slots

    def refuse(*args, **kwargs):
        manager.allocate_slots = allocate

    manager.allocate_slots = refuse


def configure(model, kara, **options):
    """vLLM's configuration, without an engine."""
    settings = {"block_size": 32, "max_model_len": 512, "additional_config": {"kara": kara}}
    return EngineArgs(model=model, **{**settings, **options}).create_engine_config()


def short_of_best(event, scores):
    """How much less the least of an event's kept tokens scores than the best dropped one, in any list; scores
    ``[L, H, W]``."""
    is_kept = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, torch.tensor(event["keep_indices"]), True)
    least = scores.masked_fill(~is_kept, torch.inf).amin(2)
    return (scores.masked_fill(is_kept, -torch.inf).amax(2) - least).max()


@dataclass
class Served:
    """A request as seen by the client, and where its recomputations started."""

    request_id: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float] | None = None
    cached: int = 0
    recomputed: list[int] = field(default_factory=list)
    rows: dict[int, tuple] = field(default_factory=dict)
    """Keys, values and places of rows out of a packet that it was admitted with, by the tokens that it had then."""


class Engine:
    """vLLM with Kara in this process, so that tests can reach its scheduler."""

    def __init__(self, llm, trace):
        self.llm, self.trace = llm, trace
        core = getattr(llm.llm_engine.engine_core, "engine_core", None)  # None: the engine core is another process
        self.scheduler = core and core.scheduler
        self.recomputed = defaultdict(list)
        self.peak = 0
        if self.scheduler is not None:
            self._watch()

    def _watch(self):
        preempt, schedule = self.scheduler._preempt_request, self.scheduler.schedule

        def preempted(request, *args, **kwargs):
            # Tokens of steps in flight will still be delivered.
            said = request.num_tokens + request.num_output_placeholders
            self.recomputed[request.request_id.rsplit("-", 1)[0]].append(said)
            return preempt(request, *args, **kwargs)

        def scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.peak = max(self.peak, self.held_blocks)
            return output

        self.scheduler._preempt_request, self.scheduler.schedule = preempted, scheduled

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def held_blocks(self):
        return self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks()  # vLLM's null block is never free

    @property
    def runner(self):
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    def generate(self, given, sampling):
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in given], sampling, use_tqdm=False)
        served = []
        for prompt, output in zip(given, outputs, strict=True):
            best = output.outputs[0]
            tokens = list(best.token_ids)
            logprobs = best.logprobs and [step[t].logprob for t, step in zip(tokens, best.logprobs, strict=True)]
            served.append(
                Served(
                    output.request_id,
                    list(prompt),
                    tokens,
                    logprobs,
                    output.num_cached_tokens or 0,
                    self.recomputed[output.request_id],
                )
            )
        return served

    def drive(self, events):
        """Steps the engine until nothing runs; ``events[step]`` is called before that step with this engine."""
        core, said, step = self.llm.llm_engine, {}, 0
        self.said, self.prompts = said, {}
        while step <= max(events) or core.has_unfinished_requests():
            if step in events:
                events[step](self)
            for output in core.step():
                said[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        return {
            name: Served(name, prompt, said[name], recomputed=self.recomputed[name])
            for name, prompt in self.prompts.items()
            if name in said
        }

    def add(self, name, prompt, tokens, own=...):
        self.prompts[name] = prompt
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, asking(own, tokens))

    def abort(self, name):
        self.llm.llm_engine.abort_request([name])

    def events(self):
        if self.trace is None or not self.trace.exists():
            return []
        return [json.loads(line) for line in self.trace.read_text().splitlines()]

    def events_of(self, request_id):
        return [event for event in self.events() if event["request_id"] == request_id]

    def assert_nothing_leaks(self):
        """Checks that every block is free and no state of any request is left."""
        assert self.held_blocks == 0
        assert all(block.ref_cnt == 0 for block in self.pool.blocks[1:])
        assert not self.scheduler._ledger._states
        assert not self.scheduler._ledger._admitted
        assert not any(
            manager.req_to_blocks for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers
        )


def placed(mode):
    """Options that only a GPU needs. Test processes share it, so none measures memory that another takes or frees."""
    if not ON_GPU:
        return {}
    return {
        "gpu_memory_utilization": 0.02,
        "kv_cache_memory_bytes": 1 << 28,
        "async_scheduling": mode == "asynchronous",  # vLLM's default there
    }


class _Done:
    """An event or a stream of a device that is never behind."""

    def __init__(self, *args, **kwargs):
        pass

    record = synchronize = wait_stream = lambda self, *args: None


@contextmanager
def asynchronous():
    """Makes vLLM schedule asynchronously on a CPU, which it does only on GPUs: it schedules a step before it sees the
    tokens of the one before, keeps two in its queue, and feeds tokens from one step to the next in the worker."""
    if ON_GPU:
        yield
        return
    update = CpuPlatform.check_and_update_config.__func__

    def keep_asynchronous(cls, config):
        update(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep_asynchronous))
        patch.setattr(torch.cuda, "Event", _Done)
        patch.setattr(torch.cuda, "Stream", _Done)
        patch.setattr(torch.cuda, "current_stream", _Done)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        yield


@contextmanager
def engine(model, kara=KARA, *, trace=None, mode="synchronous", **options):
    settings = {
        "dtype": "float32",
        "block_size": 32,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 200,
        "enforce_eager": True,
        **placed(mode),
    }
    if kara is not None:
        traced = {} if trace is None else {"trace": str(trace)}
        settings["additional_config"] = {"kara": {**kara, **traced}}
    with asynchronous() if mode == "asynchronous" else nullcontext():
        llm = LLM(model=model, **{**settings, **options})
        try:
            yield Engine(llm, trace)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


class Dense:
    """The expected output of the engine: one forward pass over the whole text, with dropped tokens masked in their
    layer and head. Shares only the trace with the plugin.

    Args:
        stored: see :func:`dense.dense_logits`.
        close: how far from the best token's logit that of the engine's may be."""

    def __init__(self, model, stored=None, close=5e-5):
        torch.set_num_threads(1)
        self.stored, self.close = stored, close
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logits(self, served, events):
        """Logits ``[T - 1, V]`` before every token except the first. After preemption a text is recomputed without
        drops up to where it was, and compressed again from there. Each part is compared with its own run."""
        text = served.prompt + served.tokens
        ids = torch.tensor([text])
        starts = sorted(runs := self._runs(served, events))
        parts = []
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            ledger, rows = self._replay(served, start, runs[start])
            real = torch.ones_like(ids, dtype=torch.bool)
            logits = dense_logits(self.model, ids, real, ledger.visible, rows, self.stored)[0]
            parts.append(logits[max(start - 1, 0) : end - 1])
        return torch.cat(parts)

    def held(self, served, events):
        """The tokens ``[L, H, rows]`` that a request held when it ended, in the order of their rows."""
        start = max(runs := self._runs(served, events))
        ledger, _ = self._replay(served, start, runs[start])
        return torch.tensor([heads for (heads,) in ledger.held])

    def _runs(self, served, events):
        """Events by the length of the text that was recomputed before them."""
        runs = {start: [] for start in [0, *served.recomputed]}
        for event in events:
            if event["physical_len_before"] == event["logical_len"]:
                runs[event["recomputed_len"]] = []
            runs[event["recomputed_len"]].append(self._event(event))
        return runs

    def _replay(self, served, start, events):
        *rows, places = served.rows.get(start) or (None,)
        real = torch.ones(1, len(served.prompt) + len(served.tokens), dtype=torch.bool)
        return replay(self.model, real, [*self._admission(rows, places), *events]), rows or None

    def scores(self, served, events, stride, attention="bidirectional", ahead=0, moved=True):
        """For each event ``[L, H, W]``: mean attention of each key of its window from the recorded queries. These are
        every ``stride``-th of the newest window + tail decoded tokens, moved ``ahead``, or, if causal, those of the
        window's tokens. If nothing ``moved``, the events dropped nothing."""
        self.logits(served, events if moved else [])
        heads = self.model.config.num_key_value_heads
        found = []
        for i, event in enumerate(events):
            earlier = [self._event(e) for e in events[:i]] if moved else []
            text = torch.ones(1, event["logical_len"], dtype=torch.bool)
            held = replay(self.model, text, earlier).held
            window = slice(event["window_start"], event["window_start"] + event["window"])
            newest = range(event["logical_len"] - event["window"] - KARA["tail"], event["logical_len"])
            if attention == "causal":
                dropped = event["logical_len"] - event["physical_len_before"]
                newest = range(window.start + dropped, window.stop + dropped)
            judges = [t for t in newest if t >= len(served.prompt) and t % stride == 0]
            layers = []
            for layer, (query, key, _) in sorted(_seen.items()):
                query, key = query[0].double(), key[0].double()
                rope = self.model.config.rope_parameters
                judge = turned(query[:, judges], ahead, rope.get("full_attention", rope)["rope_theta"])
                judge = judge.unflatten(0, (heads, -1))  # [H, G, N, D]
                keys = torch.stack([key[h, held[layer][0][h][window]] for h in range(heads)])
                logits = judge @ keys.mT[:, None] * key.shape[-1] ** -0.5
                if attention == "causal":
                    logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
                layers.append(logits.softmax(-1).mean((1, 2)))
            found.append(torch.stack(layers))
        return found

    @staticmethod
    def _admission(rows, places):
        """A packet without all rows, as if a window had been all of its context."""
        count = rows[0].shape[2] if rows else 0
        if places is not None and places.shape[2] < count:
            yield SimpleNamespace(logical_len=count, window_start=0, window=count, keep_indices=places)

    @staticmethod
    def _event(event):
        return SimpleNamespace(**event | {"keep_indices": torch.tensor(event["keep_indices"])})

    def mismatches(self, served, events):
        """Tokens that are not the dense model's best. Both add in float32, in another order: logits of a few units then
        differ by some 1e-6, which decides when two tokens are as close. A single wrong row changes whole units."""
        logits = self.logits(served, events)[len(served.prompt) - 1 :]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(served.tokens)[:, None])[:, 0]
        return (behind > self.close).nonzero()[:, 0].tolist()

    def assert_equal(self, engine, all_served, *, compressions):
        """Checks that every token is the dense model's, and that every request was compressed at least that often."""
        for served in all_served:
            events = engine.events_of(served.request_id)
            assert len(events) >= compressions, f"request {served.request_id}: {len(events)} compressions"
            assert self.mismatches(served, events) == [], f"request {served.request_id}"
