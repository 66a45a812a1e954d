"""An engine with contexts to test, and the dense model that judges it."""

import time
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import engine, greedy
from transformers import AutoModelForCausalLM, DynamicCache
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.v1.request import Request

from kara_kernels import PagedCache
from kara_kernels.contexts.codec import decode
from kara_kernels.contexts.packet import read_packet
from kara_kernels.integrations.vllm.contexts.manager import Rates
from kara_kernels.payload import FORMS

BLOCK = 32
ON = {"alpha": 1e-3, "min_tokens": 64, "ram_gib": 0.01, "grain_kib": 16}


class SlowModel(Rates):
    """A tiny model computes faster than anything loads. Here computing takes a second a token, whatever is measured."""

    def __init__(self):
        super().__init__(prefill=1.0, load={"int8": 1e-12})

    def see_prefill(self, value):
        assert value > 0

    def see_load(self, form, value):
        assert form in FORMS
        assert value > 0


class Rounded(DynamicCache):
    """A cache that stores what ``stored(layer, keys, values)`` makes of its rows."""

    def __init__(self, stored):
        super().__init__()
        self.stored = stored

    def update(self, keys, values, layer, *args, **kwargs):
        return super().update(*self.stored(layer, keys, values), layer, *args, **kwargs)


class Server:
    """vLLM with contexts in this process, of which there can be one at a time, and the dense model that judges it.
    ``stored``: what the engine's cache makes of rows, see :func:`dense.dense_logits`."""

    def __init__(self, llm, model, stored=None):
        self.llm, self.core = llm, llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.connector = self.scheduler.connector
        if has_kv_transfer_group():  # a process has one, which would store and load the rows of an older engine
            assert get_kv_transfer_group()._config is llm.llm_engine.vllm_config, "an older engine is still there"
        self.manager = self.connector.contexts.manager
        self.manager.rates = self.manager._known._rates = self.manager.admissions._rates = SlowModel()
        self._yield_between_steps()
        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.stored = stored
        self.shape = self.dense.config.num_hidden_layers, self.dense.config.num_key_value_heads, 32

    def _yield_between_steps(self):
        """As vLLM's own loop does, but not LLM.generate, when only transfers run. Else their thread is starved."""
        step = self.core.step_fn

        def step_fn():
            outputs, executed = step()
            if not executed:
                time.sleep(0.001)
            return outputs, executed

        self.core.step_fn = step_fn

    def ask(self, *prompts, tokens=12, **params):
        return [said for said, _ in self.ask_and_hear(*prompts, tokens=tokens, **params)]

    def ask_and_hear(self, *prompts, tokens=12, **params):
        """Answers, and what their clients are told about contexts."""
        sampling = greedy(tokens, logprobs=1, extra_args={"kv_transfer_params": params})
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
        return [(list(output.outputs[0].token_ids), output.kv_transfer_params) for output in outputs]

    def rest(self):
        """Steps until no transfer runs."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if not self.scheduler.connector.has_pending_push_work():
                return
            self.core.step_fn()  # asynchronous steps may lie in a queue
            time.sleep(0.001)
        raise AssertionError("a transfer never ended")

    def salts(self):
        """A list that gets the salt of each request that ends."""
        half, found = self.connector.contexts, []
        finished = half.finished
        half.finished = lambda request: (found.append(request.cache_salt), finished(request))[1]
        return found

    def forget(self):
        """Empties the engine's own cache."""
        self.rest()
        assert self.llm.reset_prefix_cache()

    @property
    def worker(self):
        return get_kv_transfer_group()._worker.worker

    def place_of(self, prompt, count):
        """The context that is the first ``count`` tokens of a prompt."""
        request = Request("x", prompt, greedy(1), None, block_hasher=self.core.request_block_hasher)
        return self.manager.place(request.block_hashes, len(prompt), count)

    def rows_of(self, prompt, count, sections=None):
        """Decoded keys and values of the stored context that is the first ``count`` tokens, perhaps of its first
        sections only: ``[L, H, R, D]`` each, in the order of their tokens."""
        keys, values, places = self.rows_of_copy(
            self.manager.keeper.get(self.place_of(prompt, count).key), count, sections
        )
        places = places[..., None].expand(*places.shape, keys.shape[-1])
        return [keys.gather(2, places), values.gather(2, places)]

    def rows_of_copy(self, copy, count, sections=None):
        """Keys and values ``[L, H, count, D]``, zero where there is no row, and the places of rows ``[L, H, R]``.
        ``count``: rows of a conversation, tokens of any other context."""
        step = self.manager.catalogue.way(copy.key, count, copy.option).step
        held = self.manager.transfers._held[copy.number]
        if copy.tier == "ram":
            data = self.worker._read(held, step.nbytes)
        elif copy.tier == "remote":
            remote = self.connector._remote
            get = remote._store._client.mget if hasattr(remote._store, "_client") else remote._store.get
            values = get(remote._grains(remote._copies[copy.number])[: len(held)])
            data = b"".join(values)[: step.nbytes]
        else:
            files = [Path(self.connector._store.disk.path(copy.number, i)) for i in held]
            data = b"".join(file.read_bytes() for file in files)[: step.nbytes]
        packet = read_packet(data, sections=sections)
        layers, heads, dim = self.shape
        blocks = -(-count // BLOCK)
        empty = torch.full((blocks, BLOCK, heads, dim), torch.nan).to(packet.header.layout.dtype)
        pools = [[empty.clone() for _ in range(layers)] for _ in range(2)]
        cache = PagedCache(*pools)
        decode(packet, cache.k, cache.v, torch.arange(blocks, dtype=torch.int32))
        keys, values = (
            torch.stack([x.float().flatten(0, 1).transpose(0, 1) for x in pool]) for pool in (cache.k, cache.v)
        )
        keys, values = keys[:, :, :count], values[:, :, :count]
        places = (~keys[..., 0].isnan()).nonzero()[:, 2].view(layers, heads, packet.step.rows)
        return keys.nan_to_num(), values.nan_to_num(), places

    def judge(self, prompt, count, tokens=12, sections=None):
        """What a dense model says whose first ``count`` rows are those of the packet."""
        cache = DynamicCache() if self.stored is None else Rounded(self.stored)
        for layer, (k, v) in enumerate(zip(*self.rows_of(prompt, count, sections), strict=True)):
            DynamicCache.update(cache, k[None].clone(), v[None].clone(), layer)
        said, ids, position = [], torch.tensor(prompt[count:]), count
        with torch.no_grad():
            while len(said) < tokens:
                places = torch.arange(position, position + len(ids))
                out = self.dense(input_ids=ids[None], position_ids=places[None], past_key_values=cache)
                position += len(ids)
                said.append(int(out.logits[0, -1].argmax()))
                ids = torch.tensor(said[-1:])
        return said

    def assert_nothing_leaks(self):
        self.rest()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.num_gpu_blocks - 1 == pool.get_num_free_blocks()
        copies = [copy for copy in self.manager.keeper.directory.copies() if copy.tier == "ram"]
        held = sum(len(self.manager.transfers._held[copy.number]) for copy in copies)
        assert held == self.manager.grains.count - self.manager.grains.free
        half = self.connector.contexts
        assert not any((half._asked, half._places, half._admitted, half._ended, half._silent, self.manager.rows))
        assert not (half._conversations and half._conversations._names)


@contextmanager
def serving(model, contexts=ON, stored=None, **options):
    settings = {"additional_config": {"contexts": contexts}, "num_gpu_blocks_override": 64, **options}
    with engine(model, None, **settings) as some:
        yield Server(some.llm, model, stored)
