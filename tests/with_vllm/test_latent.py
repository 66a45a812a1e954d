"""Multi-head latent attention (DeepSeek): one latent row of a token for all heads, and so one keep list for a layer."""

from types import SimpleNamespace

import pytest
import torch
from dense import _seen, replay
from harness import KARA, ON_GPU, Dense, asking, configure, engine, greedy, make_model, prompts, short_of_best
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from kara_kernels import LookAhead
from kara_kernels.integrations.vllm.latent import latent_query
from kara_kernels.integrations.vllm.unsupported import UNSUPPORTED_LAYERS, found_in
from kara_kernels.integrations.vllm.windows.configure import query_ring_bytes

# All that vLLM's kernel for CPUs takes. Where a processor has AMX, another one would be chosen.
BLOCK = {"block_size": 16} if ON_GPU else {"block_size": 16, "attention_config": {"backend": "CPU_MLA"}}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """A random DeepSeek V2 without experts, of 4 heads. vLLM's kernel for CPUs takes rows of 512 + 64 numbers only."""
    # As all of DeepSeek's models have it. vLLM 0.32 computes other rotary embeddings of this kind wrongly on a CPU.
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}  # fmt: skip
    shape = {"rope_parameters": rope, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32,
             "v_head_dim": 32, "q_lora_rank": None, "first_k_dense_replace": 3, "num_key_value_heads": 4,
             "head_dim": 64}  # fmt: skip
    return make_model(tmp_path_factory.mktemp("deepseek"), DeepseekV2ForCausalLM, DeepseekV2Config, **shape)


@pytest.fixture(scope="module")
def dense(deepseek):
    return Dense(deepseek)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"pool": "model"}, {"mode": "asynchronous"}),
        ({"scorer": "snapkv", "query_stride": 1}, {}),
    ],
    ids=["defaults", "one list, asynchronous", "SnapKV"],
)
def test_every_token_is_the_dense_models(deepseek, dense, trace, changes, options):
    with engine(deepseek, {**KARA, **changes}, trace=trace, **BLOCK, **options) as kara:
        served = kara.generate(prompts(5, 40, 77, 64), [asking(own) for own in (..., ..., {"keep": 8}, False)])
        dense.assert_equal(kara, served[:3], compressions=3)
        dense.assert_equal(kara, served[3:], compressions=0)
        assert [len(event["keep_indices"][0]) for event in kara.events_of(served[0].request_id)] == [1] * 4
        assert kara.runner.kara_ring.nbytes == query_ring_bytes(kara.llm.llm_engine.vllm_config)
        kara.assert_nothing_leaks()


def test_preemption_in_a_tiny_pool(deepseek, dense, trace):
    """vLLM computes a text of such a model at once on a CPU, never in chunks."""
    tiny = {"max_model_len": 416, "num_gpu_blocks_override": 36}
    whole = {"pressure_window": 64, "pressure_keep": 32}
    with engine(deepseek, {**KARA, **whole}, trace=trace, mode="asynchronous", **BLOCK, **tiny) as kara:
        served = kara.generate(prompts(5, 40, 77, 30, 51), greedy(300))
        assert sum(len(request.recomputed) for request in served) >= 2
        dense.assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


def test_each_tensor_parallel_rank_has_its_own_lists(deepseek, dense, trace):
    """Each has all latent rows, and keeps those that its own heads look at."""
    with engine(deepseek, KARA, trace=trace, tensor_parallel_size=2, **BLOCK) as kara:
        served = kara.generate(prompts(5, 40, 77), greedy(330))
        dense.assert_equal(kara, served, compressions=3)
        assert all(ranks[0] != ranks[1] for event in kara.events() for ranks in event["keep_indices"])


def scores_by(dense, served, event, earlier):
    """``[L, 1, W]``: mean attention from the queries of all heads, a window ahead of their positions."""
    text = torch.ones(1, event.logical_len, dtype=torch.bool)
    held = replay(dense.model, text, earlier).held
    newest = range(event.logical_len - event.window - KARA["tail"], event.logical_len)
    judges = [t for t in newest if t >= len(served.prompt) and t % KARA["query_stride"] == 0]
    rotary = dense.model.model.rotary_emb.inv_freq.double()
    turns = torch.polar(torch.ones_like(rotary), KARA["window"] * rotary)
    found = []
    for layer, (query, key, _) in sorted(_seen.items()):
        window = held[layer][0][0][event.window_start : event.window_start + event.window]
        plain, pairs = query[0, :, judges].double().split([32, 64], -1)
        ahead = torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)
        logits = torch.cat((plain, ahead), -1) @ key[0][:, window].double().mT
        scale = dense.model.model.layers[layer].self_attn.scaling
        found.append((logits * scale).softmax(-1).mean((0, 1)))
    return torch.stack(found)[:, None]


def test_traced_lists_are_the_best_by_queries_of_all_heads(deepseek, dense, trace):
    policy = {**KARA, "query_dtype": "auto", "chunk_fraction": 0.0, "reduction": "mean"}
    with engine(deepseek, policy, trace=trace, **BLOCK) as kara:
        for served in kara.generate(prompts(5, 77), greedy(320)):
            raw = kara.events_of(served.request_id)
            assert len(raw) >= 3
            dense.logits(served, raw)
            events = [dense._event(event) for event in raw]
            for i, event in enumerate(events):
                assert short_of_best(raw[i], scores_by(dense, served, event, events[:i])) < 1e-5


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_rotary_part_of_a_query_is_rotated_ahead(interleaved):
    """Both orders of pairs, with a map of keys that does nothing."""
    layer = SimpleNamespace(qk_nope_head_dim=2, qk_rope_head_dim=6, W_UK_T=torch.eye(2).expand(4, 2, 2))
    query, angle = torch.randn(5, 4, 8, dtype=torch.float64), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    layer.W_UK_T = layer.W_UK_T.double()
    found = latent_query(layer, query, LookAhead(angle.cos(), angle.sin(), interleaved))
    assert torch.equal(found[..., :2], query[..., :2])
    order = [0, 2, 4, 1, 3, 5] if interleaved else range(6)  # first numbers of all pairs, then their second ones
    x, y = query[..., 2:][..., list(order)].chunk(2, -1)
    turned = torch.complex(x, y) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(torch.complex(*found[..., 2:][..., list(order)].chunk(2, -1)), turned)
    assert torch.equal(latent_query(layer, query, None), query)


def test_weights_that_were_packed_are_refused():
    layer = SimpleNamespace(kv_lora_rank=512, impl=SimpleNamespace(), kv_cache_dtype="auto", head_size=576)
    assert found_in(layer, UNSUPPORTED_LAYERS) == ["latent attention with packed weights (AMX, ROCm)"]
    layer.W_UK_T = torch.zeros(1)
    assert found_in(layer, UNSUPPORTED_LAYERS) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"additional_config": {"kara": KARA, "contexts": {}}}, "multi-head latent attention with contexts, or"),
        ({"kv_cache_dtype": "fp8"}, "multi-head latent attention with contexts, or with a quantised KV cache"),
        ({"hf_overrides": {"index_topk": 64}}, r"sparse attention \(index_topk\): 64"),
    ],
    ids=["contexts", "fp8", "sparse"],
)
def test_what_cannot_be_compressed_is_refused(deepseek, options, words):
    with pytest.raises(ValueError, match=f"expected only supported features, got {words}"):
        configure(deepseek, KARA, **options)
