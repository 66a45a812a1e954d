"""Other methods by name in vLLM: they keep what they would of the dense model's rows, and the rest is as ever."""

import pytest
import torch
from dense import _seen, replay
from harness import MODES, engine, greedy, prompts

from kara_kernels.scorers import REGISTRY, Rows, registered

METHODS = [name for name, entry in REGISTRY.items() if entry.needs != "context" and name != "kara"]
SMALL = {"window": 64, "keep": 32, "tail": 16, "query_dtype": "auto"}


def scores_of(name, dense, served, events):
    """Those of every event ``[L, H, W]``, by rows and queries of the dense model."""
    dense.logits(served, events)
    heads = dense.model.config.num_key_value_heads
    for i, event in enumerate(events):
        real = torch.ones(1, event["logical_len"], dtype=torch.bool)
        held = replay(dense.model, real, [dense._event(earlier) for earlier in events[:i]]).held
        count = min(80, event["logical_len"] - len(served.prompt))  # window and tail
        judges = slice(event["logical_len"] - count, event["logical_len"])
        found = []
        for layer, (query, key, value) in sorted(_seen.items()):
            keys, values = (
                torch.stack([of[0, h, held[layer][0][h]] for h in range(heads)])[None].float() for of in (key, value)
            )
            queries = query[:, :, judges].unflatten(1, (heads, -1)).permute(0, 3, 1, 2, 4).float()
            start, dropped = event["window_start"], event["logical_len"] - event["physical_len_before"]
            seed = len(_seen) * (start + dropped) + layer
            rows = Rows(queries, keys, values, start, event["window"], key.shape[-1] ** -0.5, seed)
            found.append(registered(name).scorer(rows)[0])
        yield torch.stack(found)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_what_it_would_of_the_dense_model(model, dense, trace, name):
    with engine(model, {**SMALL, "scorer": name}, trace=trace) as kara:
        served = kara.generate(prompts(5, 40, 77), greedy(200))
        dense.assert_equal(kara, served, compressions=2)
        kara.assert_nothing_leaks()
        ring = kara.runner.kara_ring
        assert ring.rows == (0 if registered(name).needs == "rows" else 80)
        for request in served:
            events = kara.events_of(request.request_id)
            for event, scores in zip(events, scores_of(name, dense, request, events), strict=True):
                kept = torch.tensor(event["keep_indices"])
                dropped = torch.ones(scores.shape).scatter(2, kept, 0.0).bool()
                least = scores.gather(2, kept).amin(2)
                most = scores.masked_fill(~dropped, -torch.inf).amax(2)
                assert (most <= least + 1e-4 * scores.abs().amax()).all(), (name, event["window_start"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["compactor", "keydiff"])
def test_a_method_survives_preemption(model, dense, trace, mode, name):
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 15}
    with engine(model, {**SMALL, "scorer": name}, trace=trace, mode=mode, **tiny) as kara:
        served = kara.generate(prompts(5, 40, 77, 30, 51), greedy(300))
        assert sum(len(request.recomputed) for request in served) >= 1
        dense.assert_equal(kara, served, compressions=2)
        kara.assert_nothing_leaks()


def test_two_tensor_parallel_ranks_share_a_list(model, dense, trace):
    with engine(model, {**SMALL, "scorer": "snapkv", "pool": "model"}, trace=trace, tensor_parallel_size=2) as kara:
        served = kara.generate(prompts(5, 40), greedy(200))
        dense.assert_equal(kara, served, compressions=2)
        assert len({tuple(row) for heads in kara.events()[0]["keep_indices"] for row in heads}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "snap"}, r"scorer: expected .*'newest'.*, got 'snap'"),
        ({"scorer": "kvzip"}, "scorer: expected one that can score a window, got 'kvzip'"),
        ({"scorer": "h2o", "query_stride": 2}, "query_stride: expected 1 with scorer='h2o', got 2"),
        ({"scorer": "h2o", "max_query_gib": 1e-6}, "max_query_gib: expected a query ring of at most"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_the_start(model, changes, message):
    with pytest.raises(ValueError, match=message), engine(model, {**SMALL, **changes}):
        pass
