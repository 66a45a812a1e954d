"""KaraCache against a dense model without a cache, and against transformers' own cache."""

import functools
import re

import pytest
import torch

transformers = pytest.importorskip("transformers")

from dense import best_for_later, best_of_causal, best_of_window, column_of, dense_logits, full_layers, replay  # noqa: E402
from transformers import (  # noqa: E402
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

from kara_kernels import reference  # noqa: E402
from kara_kernels.integrations.transformers import KaraCache, kara_attention  # noqa: E402
from kara_kernels.integrations.transformers.rotary import find_look_ahead  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY, LAYERS, HEADS = 61, 3, 2
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"head_dim": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),  # biased projections
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),  # q/k norms, head_dim != hidden / heads
}


SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {
    "num_hidden_layers": 5, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL], "sliding_window": 9, "head_dim": 8,
    "query_pre_attn_scalar": 8,
}  # fmt: skip


def make_gemma(**overrides):
    """Two of five layers have full attention, the others see nine tokens."""
    model = made(Gemma3ForCausalLM, Gemma3TextConfig, **(GEMMA | overrides))
    model.get_input_embeddings().weight.data *= 0.1  # else it repeats its last token, whatever attention says
    return model


def make_model(family="llama", **overrides):
    cls, config_cls, extra = FAMILIES[family]
    return made(cls, config_cls, **(extra | overrides))


def made(cls, config_cls, num_hidden_layers=LAYERS, **shape):
    torch.manual_seed(7)
    config = config_cls(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=num_hidden_layers,
        num_attention_heads=6, num_key_value_heads=HEADS, max_position_embeddings=1024,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
        initializer_range=0.25,  # large, so that attention is peaked and a wrong row changes the text
        **shape,
    )  # fmt: skip
    model = cls(config).eval()
    model.set_attn_implementation("kara")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def llama():
    return make_model()


def prompts(*lengths, seed=0):
    """Random prompts, left-padded: ids and attention mask, ``[S, max(lengths)]``."""
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    real = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return ids * real, real


def generate(model, ids, real, cache, tokens, **options):
    """Greedy text ``[S, T]`` and its logits ``[S, tokens, V]``."""
    out = model.generate(
        ids, attention_mask=real, past_key_values=cache, max_new_tokens=tokens, return_dict_in_generate=True,
        output_logits=True, **({"do_sample": False} | options),
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


def stock(model, *args, **options):
    model.set_attn_implementation("sdpa")
    try:
        return generate(model, *args[:2], DynamicCache(config=model.config), *args[2:], **options)
    finally:
        model.set_attn_implementation("kara")


@torch.no_grad()
def feed(model, cache, ids, sizes, real=None):
    """Teacher forcing of ``ids`` in forward passes of ``sizes`` tokens. Returns logits ``[S, T, V]``."""
    logits, at = [], 0
    for size in sizes:
        mask = None if real is None else real[:, : at + size]
        where = None if real is None else (real.cumsum(1) - 1).clamp(min=0)[:, at : at + size]
        out = model(ids[:, at : at + size], attention_mask=mask, position_ids=where, past_key_values=cache)
        logits.append(out.logits)
        at += size
    assert at == ids.shape[1]
    return torch.cat(logits, 1)


def with_text(real, text):
    return torch.cat([real, real.new_ones(len(real), text.shape[1] - real.shape[1])], 1).bool()


def assert_dense(model, cache, ids, real, logits):
    """``logits [S, n, V]`` of the newest tokens of the stored text ``ids`` are those of the dense model."""
    ledger = replay(model, real, cache.events)
    newest = slice(ids.shape[1] - logits.shape[1], None)
    expected = dense_logits(model, ids, real, ledger.visible)[:, newest]
    torch.testing.assert_close(logits[real[:, newest]], expected[real[:, newest]], rtol=1e-4, atol=1e-4)
    assert cache.physical_lengths == [len(per_head[0]) for per_head in ledger.held[0]]
    return expected


def assert_generated(model, cache, text, real, logits):
    """The same for the output of ``generate``, whose last token was never fed back."""
    expected = assert_dense(model, cache, text[:, :-1], with_text(real, text[:, :-1]), logits)
    assert torch.equal(text[:, real.shape[1] :], expected.argmax(-1))


def assert_best_kept(model, cache, ids, real, prompt, best=best_of_window):
    """Windows follow each other without gap or overlap. In every layer, sequence and head, the kept tokens have the
    most attention in the dense model from the queries of window and tail. For plain top-k."""
    dense_logits(model, ids, real, replay(model, real, cache.events).visible)
    waiting = [[t for t in range(prompt, ids.shape[1]) if real[s, t]] for s in range(len(ids))]
    for event in cache.events:
        s = int(event.request_id)
        window, judges = waiting[s][: cache.window], waiting[s][: cache.window + cache.tail]
        assert len(judges) == cache.window + cache.tail
        assert judges[-1] < column_of(real[s], event.logical_len)
        waiting[s] = waiting[s][cache.window :]
        modules = [module.self_attn for module in model.model.layers]
        for layer, attention in enumerate(modules[i] for i in full_layers(model.config)):
            kept = best(layer, s, window, judges, cache.keep, attention.scaling)
            assert torch.equal(event.keep_indices[layer].long(), kept), (event.logical_len, layer, s)


def of(cache, s):
    """The records of one sequence."""
    return [event for event in cache.events if event.request_id == str(s)]


def assert_blocks(cache):
    """Every block is free or in exactly one table, and no table is longer than its rows need."""
    blocks = cache._sequences.blocks
    held = [block for table in blocks.tables for block in table]
    assert sorted(held + blocks.allocator.free) == list(range(blocks.allocator.size))
    assert [len(table) for table in blocks.tables] == [-(-n // cache.block_size) for n in cache.physical_lengths]
    assert cache.blocks_in_use == len(held) <= cache.peak_blocks
    assert len(blocks.tables) != 1 or blocks.tables[0] == list(range(len(held)))  # needed for reading without a copy
    assert len({pool.shape[1] for pool in blocks.pools} | {blocks.allocator.size}) == 1


# ------------------------------------------------------------------------------------ nothing compressed


@pytest.mark.parametrize("lengths", [(9,), (9, 9)])
def test_without_compression_it_is_the_stock_cache_to_the_bit(model, lengths):
    ids, real = prompts(*lengths)
    cache = KaraCache(model, window=256)
    text, logits = generate(model, ids, real, cache, 60)
    expected_text, expected = stock(model, ids, real, 60)
    assert torch.equal(text, expected_text)
    assert torch.equal(logits, expected)
    assert not cache.events
    assert cache.retention == 1.0


def test_without_compression_padding_changes_nothing_but_rounding(model):
    ids, real = prompts(5, 12, 9)
    text, logits = generate(model, ids, real, KaraCache(model, block_size=5), 60)
    expected_text, expected = stock(model, ids, real, 60)
    assert torch.equal(text, expected_text)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_several_tokens_in_one_forward_are_the_stock_cache_to_the_bit(llama):
    ids, _ = prompts(40, 40)
    sizes = [8, 1, 5, 1, 20, 5]
    ours = feed(llama, KaraCache(llama), ids, sizes)
    llama.set_attn_implementation("sdpa")
    expected = feed(llama, DynamicCache(), ids, sizes)
    llama.set_attn_implementation("kara")
    assert torch.equal(ours, expected)


def test_sampling_draws_what_the_stock_cache_draws(llama):
    ids, real = prompts(6, 6)
    options = {"do_sample": True, "top_k": 0, "temperature": 0.8}
    torch.manual_seed(3)
    text, _ = generate(llama, ids, real, KaraCache(llama), 40, **options)
    torch.manual_seed(3)
    assert torch.equal(text, stock(llama, ids, real, 40, **options)[0])


def test_without_a_kara_cache_the_attention_is_sdpa(llama):
    ids, real = prompts(6, 9)
    text, logits = generate(llama, ids, real, DynamicCache(), 10)
    expected_text, expected = stock(llama, ids, real, 10)
    assert torch.equal(text, expected_text)
    assert torch.equal(logits, expected)


# -------------------------------------------------------------------------------------------- compressed


@pytest.mark.parametrize("lengths", [(9,), (13, 6)])
def test_generated_text_is_that_of_the_dense_model(model, lengths):
    ids, real = prompts(*lengths)
    cache = KaraCache(model, window=16, keep=6, tail=5, block_size=4)
    text, logits = generate(model, ids, real, cache, 90)
    assert {len(of(cache, s)) for s in range(len(lengths))} == {
        5
    }  # 89 decoded tokens were stored: 16 + 5, then every 16
    assert_generated(model, cache, text, real, logits)
    unlike_full_attention = stock(model, ids, real, 90)[1]
    assert (logits - unlike_full_attention).abs().max() > 0.1  # the oracle had something to tell
    assert_blocks(cache)


@pytest.mark.parametrize(
    ("window", "keep", "tail", "block_size"),
    [
        (16, 8, 0, 4),
        (12, 12, 3, 4),
        (16, 1, 4, 1),
        (15, 7, 2, 16),
        (16, 5, 20, 3),
        (1, 1, 0, 2),
        (40, 9, 6, 64),
    ],
)
def test_any_window_tail_and_block_size(llama, window, keep, tail, block_size):
    ids, real = prompts(5, 11)
    cache = KaraCache(llama, window=window, keep=keep, tail=tail, block_size=block_size)
    text, logits = generate(llama, ids, real, cache, 70)
    assert len(of(cache, 0)) == len(of(cache, 1)) == (69 - tail) // window
    assert_generated(llama, cache, text, real, logits)
    assert_blocks(cache)


PLAIN = {"chunk_fraction": 0.0, "pool": "head", "reduction": "mean", "value_norm": False, "look_ahead": 0}


@pytest.mark.parametrize("tail", [0, 7])
def test_keep_lists_are_what_the_dense_model_would_choose(model, tail):
    ids, real = prompts(9, 4)
    cache = KaraCache(model, window=16, keep=6, tail=tail, **PLAIN)
    text, _ = generate(model, ids, real, cache, 80)
    for s, prompt in enumerate((9, 4)):
        assert [event.logical_len for event in of(cache, s)] == [prompt + tail + 16 * n for n in range(1, 5)]
    assert_best_kept(model, cache, text, with_text(real, text), 9)


@pytest.mark.parametrize("look_ahead", [None, 0, 5])
def test_what_is_kept_by_default_is_for_later_queries(model, look_ahead):
    """Root mean squares, value norms, and queries moved ahead by a window, against the dense model."""
    ids, real = prompts(9, 4)
    cache = KaraCache(model, window=16, keep=6, tail=7, chunk_fraction=0.0, look_ahead=look_ahead)
    assert cache.look_ahead == (16 if look_ahead is None else look_ahead)
    text, _ = generate(model, ids, real, cache, 50)
    best = functools.partial(best_for_later, ahead=cache.look_ahead, theta=model.config.rope_parameters["rope_theta"])
    assert_best_kept(model, cache, text, with_text(real, text), 9, best)


def test_looking_ahead_needs_rotary_embeddings(llama):
    assert KaraCache(llama.config).look_ahead == 0
    assert KaraCache(llama, attention="causal").look_ahead == 0
    with pytest.raises(ValueError, match=r"look_ahead: expected 0 for LlamaConfig, .*, got 8"):
        KaraCache(llama.config, look_ahead=8)
    with pytest.raises(ValueError, match="look_ahead"):
        KaraCache(llama, look_ahead=-1)


@pytest.mark.parametrize("kind", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_looking_ahead_turns_queries_as_the_model_does(kind):
    """A query rotated to position 3 and then 20 ahead equals the query rotated to position 23."""
    rope = {"rope_theta": 100.0, "original_max_position_embeddings": 64, **kind}
    model = make_model(rope_parameters=rope)
    ahead, rotary = find_look_ahead(model), model.model.rotary_emb
    query = torch.randn(2, 1, 4, 2, rotary.inv_freq.numel() * 2)  # [L, S, N, heads, D]

    def at(position):
        cos, sin = rotary(query, torch.full((1, 1), position))
        return apply_rotary_pos_emb(query[:, 0], query[:, 0], cos, sin, unsqueeze_dim=2)[0][:, None]

    cos, sin, interleaved = ahead(20, query.device)
    x, y = at(3).chunk(2, -1)
    assert not interleaved
    torch.testing.assert_close(torch.cat((x * cos - y * sin, y * cos + x * sin), -1), at(23), rtol=1e-4, atol=1e-5)


SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY_MODELS = {
    "whole heads": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "half of each head": (PhiForCausalLM, PhiConfig, {}),
    "interleaved": (CohereForCausalLM, CohereConfig, {"num_key_value_heads": 2}),
    "half of each head, interleaved": (GlmForCausalLM, GlmConfig, {"num_key_value_heads": 2, "head_dim": 8}),
}


@pytest.mark.parametrize("kind", ROTARY_MODELS)
def test_looking_ahead_rotates_as_models_do(kind, monkeypatch):
    """The query of one token at position 3, moved 20 ahead, is its query at position 23."""
    torch.manual_seed(0)
    kind_of_model, kind_of_config, more = ROTARY_MODELS[kind]
    model = kind_of_model(kind_of_config(**SHAPE, **more, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
    taken = []

    def take(module, query, key, value, mask, **kwargs):
        taken.append(query[0, :, 0])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "take", take)
    model.set_attn_implementation("take")
    for position in (3, 23):
        model(torch.tensor([[7]]), position_ids=torch.tensor([[position]]))
    ahead = find_look_ahead(model)(20, taken[0].device)
    before, after = taken[0], taken[model.config.num_hidden_layers]
    assert ahead.interleaved == ("interleaved" in kind)
    assert 2 * len(ahead.cos) == before.shape[-1] // (2 if "half" in kind else 1)
    # A key turned back scores as the query turned ahead.
    key = torch.randn(1, 5, 1, before.shape[-1])
    given = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 5
    moved = reference.score_window(before[None, None], key, *given, look_ahead=ahead)
    torch.testing.assert_close(moved, reference.score_window(after[None, None], key, *given))


def test_no_rotation_is_taken_from_other_models(llama):
    dynamic = {"rope_theta": 100.0, "rope_type": "dynamic", "factor": 2.0}
    assert find_look_ahead(llama) is not None
    assert find_look_ahead(make_model(rope_parameters=dynamic)) is None
    assert find_look_ahead(torch.nn.Linear(1, 1)) is None


def test_forwards_of_many_tokens_equal_forwards_of_one(llama):
    """Except that a window is compressed only after the forward pass that completes it."""
    ids, _ = prompts(73, 73)
    one, many = (KaraCache(llama, window=16, keep=6, tail=4, block_size=4) for _ in range(2))
    single = feed(llama, one, ids, [9] + [1] * 64)
    several = feed(llama, many, ids, [9, 20, 10, 6, 16, 3, 9])
    torch.testing.assert_close(single, several, rtol=1e-4, atol=1e-4)
    assert len(one.events) == len(many.events) == 2 * 3
    for a, b in zip(one.events, many.events, strict=True):
        assert (a.request_id, a.logical_len) == (b.request_id, b.logical_len)
        assert torch.equal(a.keep_indices, b.keep_indices)


@pytest.mark.parametrize(
    ("sizes", "ends"),
    [
        ([9, 1, 11, 48, 1, 1, 19], [69, 69, 69, 90]),
        ([9, 19, 2, 60], [30, 90, 90, 90]),  # one token more than the window and its tail
    ],
)
def test_a_forward_that_completes_several_windows(llama, sizes, ends):
    ids, _ = prompts(90, 90)
    cache = KaraCache(llama, window=16, keep=6, tail=4, block_size=4, **PLAIN)
    logits = feed(llama, cache, ids, sizes)
    for s in range(2):
        assert [event.logical_len for event in of(cache, s)] == ends
    assert_dense(llama, cache, ids, torch.ones_like(ids).bool(), logits)
    assert_best_kept(llama, cache, ids, torch.ones_like(ids).bool(), 9)
    assert_blocks(cache)


def test_sequences_that_are_due_at_different_times(llama):
    """Padding after the prompt takes sequences out of step. Each is compressed when it is due."""
    ids, _ = prompts(80, 80, 80)
    real = torch.ones_like(ids).bool()
    real[0, :6] = False
    real[1, 20:31] = False
    real[2, 40:44] = real[2, 60] = False
    cache = KaraCache(llama, window=12, keep=5, tail=3, block_size=4, **PLAIN)
    logits = feed(llama, cache, ids, [10, 5, 1, 1, 20, 9, 14] + [1] * 20, real)
    times = [[column_of(real[s], event.logical_len) for event in of(cache, s)] for s in range(3)]
    assert len({tuple(of_sequence) for of_sequence in times}) == 3
    assert_dense(llama, cache, ids, real, logits)
    assert_best_kept(llama, cache, ids, real, 10)
    assert cache.get_seq_length() == 80
    assert_blocks(cache)


@pytest.mark.parametrize("protected", [(19, 25), 25])
def test_a_prompt_in_several_forwards(llama, protected):
    lengths = protected if isinstance(protected, tuple) else (protected, protected)
    ids, _ = prompts(25, 25)
    real = torch.stack([torch.arange(25) >= 25 - n for n in lengths])
    ids, real = torch.cat([ids, prompts(45, 45, seed=1)[0]], 1), with_text(real, torch.zeros(2, 70))
    whole = KaraCache(llama, window=12, keep=5, tail=3)
    pieces = KaraCache(llama, window=12, keep=5, tail=3, protected=protected)
    logits = feed(llama, whole, ids, [25] + [1] * 45, real)
    # A piece may also hold the first decoded tokens.
    torch.testing.assert_close(feed(llama, pieces, ids, [8, 8, 3, 10] + [1] * 41, real)[real], logits[real],
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert [e.window_start for e in pieces.events] == [e.window_start for e in whole.events]
    assert tuple(of(pieces, s)[0].window_start for s in range(2)) == lengths
    assert all(torch.equal(a.keep_indices, b.keep_indices) for a, b in zip(pieces.events, whole.events, strict=True))


def test_a_scorer_replaces_the_scores(llama):
    calls = []

    def newest(*, query, k_cache, v_cache, block_tables, window_starts, window):
        calls.append((query.clone(), window_starts.tolist()))
        for s, start in enumerate(window_starts.tolist()):
            block, row = divmod(start, k_cache[0].shape[1])
            assert all((k[block_tables[s, block], row] != 0).all() for k in k_cache)
        assert len(v_cache) == LAYERS
        assert block_tables.dtype == window_starts.dtype == torch.int32
        return torch.arange(window).float().expand(LAYERS, 2, HEADS, window).contiguous()

    ids, real = prompts(9, 4)
    cache = KaraCache(llama, window=16, keep=6, tail=3, scorer=newest, chunk_fraction=0.0)
    text, logits = generate(llama, ids, real, cache, 50)
    assert [starts for _, starts in calls] == [[9, 4], [15, 10]]
    assert calls[0][0].shape == (LAYERS, 2, 19, 6, 8)
    assert all((event.keep_indices == torch.arange(10, 16)).all() for event in cache.events)
    assert_generated(llama, cache, text, real, logits)


@pytest.mark.parametrize("name", ["newest", "knorm", "tova", "compactor"])
def test_a_method_has_a_name(llama, name):
    """Two sequences of different lengths, and a prompt in two parts, after which the room for queries grows."""
    ids, real = prompts(9, 4)
    cache = KaraCache(llama, window=16, keep=6, tail=3, scorer=name)
    text, logits = generate(llama, ids, real, cache, 50)
    assert len(cache.events) >= 4
    assert_generated(llama, cache, text, real, logits)
    if name == "newest":
        assert all((event.keep_indices == torch.arange(10, 16)).all() for event in cache.events)
    row = LAYERS * 6 * 8 * 4
    assert (cache.query_bytes // row <= 3) == (name in ("newest", "knorm"))  # a row for each, and one for prompts


def test_the_selection_options_reach_the_library(llama):
    ids, real = prompts(9, 9)
    cache = KaraCache(llama, window=16, keep=6, tail=3, pool="model")
    generate(llama, ids, real, cache, 40)
    lists = cache.events[0].keep_indices
    assert (lists == lists[:1, :1]).all()


def test_causal_queries_are_those_of_the_window_in_order(llama):
    ids, real = prompts(9, 4)
    cache = KaraCache(llama, window=16, keep=6, tail=3, attention="causal", **PLAIN)
    text, _ = generate(llama, ids, real, cache, 60)
    assert len(of(cache, 0)) == len(of(cache, 1)) == 3
    assert_best_kept(llama, cache, text, with_text(real, text), 9, best_of_causal)


def test_bfloat16_runs():
    model = make_model().to(torch.bfloat16)
    ids, real = prompts(9, 4)
    cache = KaraCache(model, window=16, keep=6, tail=3)
    _, logits = generate(model, ids, real, cache, 60)
    assert logits.isfinite().all()
    assert len(of(cache, 0)) == len(of(cache, 1)) == 3
    assert cache._sequences.blocks.k[0].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------ blocks and records


def test_blocks_are_accounted_for_after_every_token(llama):
    ids, real = prompts(7, 12)
    cache = KaraCache(llama, window=16, keep=5, tail=6, block_size=4)
    text, _ = generate(llama, ids, real, KaraCache(llama), 80)
    real = with_text(real, text)
    for at, size in [(0, 12)] + [(n, 1) for n in range(12, 92)]:
        with torch.no_grad():
            llama(text[:, at : at + size], attention_mask=real[:, : at + size], past_key_values=cache)
        assert_blocks(cache)
    pairs = zip(of(cache, 0), of(cache, 1), strict=True)  # both are due at once
    highest = [sum(-(-event.physical_len_before // 4) for event in pair) for pair in pairs]
    assert cache.peak_blocks == max(highest) > cache.blocks_in_use  # here each window ends on a peak
    assert cache.peak_blocks < -(-87 // 4) + -(-92 // 4)
    assert all(event.freed_blocks for event in cache.events)
    first = cache.physical_lengths, cache.peak_blocks, len(cache.events)

    cache.reset()
    assert cache.blocks_in_use == cache.get_seq_length() == 0
    assert cache.physical_lengths == []
    assert not cache.events
    assert_blocks(cache)
    size = cache.pool_bytes
    feed(llama, cache, text[:, :92], [12] + [1] * 80, real[:, :92])
    assert (cache.physical_lengths, cache.peak_blocks, len(cache.events)) == first
    assert cache.pool_bytes == size  # freed ids are used again


def test_a_forward_that_fails_leaves_the_cache_as_it_was(llama):
    ids, _ = prompts(60, 60)
    clean = feed(llama, KaraCache(llama, window=12, keep=5, tail=3), ids, [9] + [1] * 51)
    cache = KaraCache(llama, window=12, keep=5, tail=3)

    def fail(*_):
        raise KeyboardInterrupt

    logits, at = [], 0
    for size in [9] + [1] * 51:
        for batch in (1, 2) if at == 0 else (2,):
            hook = llama.model.layers[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                llama(ids[:batch, at : at + size + 3], past_key_values=cache)
            hook.remove()
        logits.append(feed(llama, cache, ids[:, at : at + size], [size]))
        at += size
    assert len(of(cache, 0)) == len(of(cache, 1)) == 4
    assert torch.equal(torch.cat(logits, 1), clean)
    assert_blocks(cache)


def test_in_and_out_of_inference_mode(llama):
    ids, _ = prompts(60, 60)
    settings = {"window": 12, "keep": 5, "tail": 3}
    clean = feed(llama, KaraCache(llama, **settings), ids, [9] + [1] * 51)
    cache = KaraCache(llama, **settings)
    logits = []
    for at, size in [(0, 9)] + [(n, 1) for n in range(9, 60)]:
        with torch.inference_mode(at % 3 == 0), torch.enable_grad():
            logits.append(llama(ids[:, at : at + size], past_key_values=cache).logits)
    assert torch.equal(torch.cat([step.detach().clone() for step in logits], 1), clean)


def test_another_batch_after_reset(llama):
    cache = KaraCache(llama, window=16, keep=5, tail=6, block_size=4)
    for lengths in [(9, 4), (7,), (3, 8, 5)]:
        cache.reset()
        ids, real = prompts(*lengths)
        text, logits = generate(llama, ids, real, cache, 50)
        assert_generated(llama, cache, text, real, logits)
        assert_blocks(cache)


@pytest.mark.parametrize("lengths", [(9,), (13, 6)])
def test_free_blocks_may_hold_anything(llama, lengths):
    ids, real = prompts(*lengths)
    settings = {"window": 16, "keep": 5, "tail": 6, "block_size": 4}
    text, _ = generate(llama, ids, real, KaraCache(llama, **settings), 80)
    real = with_text(real, text)
    clean = feed(llama, KaraCache(llama, **settings), text, [ids.shape[1]] + [1] * 80, real)
    cache = KaraCache(llama, **settings)
    poisoned, at = [], 0
    for size in [ids.shape[1]] + [1] * 80:
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, at : at + size]
        with torch.no_grad():
            out = llama(text[:, at : at + size], attention_mask=real[:, : at + size], position_ids=positions,
                        past_key_values=cache)  # fmt: skip
        at += size
        poisoned.append(out.logits)
        for pool in cache._sequences.blocks.pools:
            pool[:, cache._sequences.blocks.allocator.free] = torch.nan
    assert len(of(cache, 0)) > 3
    assert torch.equal(torch.cat(poisoned, 1)[real], clean[real])


def test_a_fixed_pool_that_only_compression_makes_large_enough(llama):
    ids, real = prompts(8, 8)
    settings = {"window": 16, "keep": 4, "tail": 4, "block_size": 4}
    free = KaraCache(llama, **settings)
    expected, _ = generate(llama, ids, real, free, 80)
    assert free.peak_blocks < 2 * -(-87 // 4)
    cache = KaraCache(llama, **settings, num_blocks=free.peak_blocks)
    assert torch.equal(generate(llama, ids, real, cache, 80)[0], expected)
    assert cache.pool_bytes == free.peak_blocks * 4 * 2 * LAYERS * HEADS * 8 * 4

    short = KaraCache(llama, **settings, num_blocks=free.peak_blocks - 1)
    needed = re.escape(f"num_blocks={free.peak_blocks - 1}") + f".*num_blocks >= {free.peak_blocks}"
    with pytest.raises(RuntimeError, match=needed):
        generate(llama, ids, real, short, 80)
    short.reset()
    assert short.blocks_in_use == 0
    assert torch.equal(generate(llama, ids[:1], real[:1], short, 80)[0], expected[:1])


def test_records(llama):
    ids, real = prompts(9, 4)
    cache = KaraCache(llama, window=16, keep=6, tail=3, block_size=4)
    generate(llama, ids, real, cache, 60)
    events = of(cache, 0)[1], of(cache, 1)[1]
    assert cache.events[2:4] == list(events)
    assert [event.window_start for event in events] == [15, 10]
    assert [event.logical_len for event in events] == [44, 39]
    assert [event.physical_len_before for event in events] == [34, 29]
    assert [event.physical_len_after for event in events] == [24, 19]
    assert [event.freed_blocks for event in events] == [9 - 6, 8 - 5]
    for event in events:
        assert (event.window, event.keep, event.recomputed_len) == (16, 6, 0)
        assert event.seconds > 0
        assert event.keep_indices.shape == (LAYERS, HEADS, 6)
        assert event.keep_indices.dtype == torch.int32
    assert cache.physical_lengths == [38, 33]
    assert cache.retention == 71 / (68 + 63)
    assert cache.kv_bytes == cache.blocks_in_use * 4 * 2 * LAYERS * HEADS * 8 * 4 <= cache.pool_bytes
    # Bounded: window + tail, no matter how long, and a row for queries of prompts.
    assert cache.query_bytes == LAYERS * (2 * (16 + 3) + 1) * 6 * 8 * 4
    assert cache.get_seq_length() == 9 + 59
    assert cache.batch_size == 2
    assert len(cache) == LAYERS


# --------------------------------------------------------------------------------------- what is refused


def test_beam_search_assisted_generation_and_batch_surgery_are_refused(llama):
    ids, real = prompts(6)
    with pytest.raises(NotImplementedError, match="beam search"):
        generate(llama, ids, real, KaraCache(llama), 4, num_beams=2)
    cache = KaraCache(llama)
    assert not cache.is_croppable
    assert not cache.is_compileable
    for name in (
        "crop",
        "batch_repeat_interleave",
        "batch_select_indices",
        "offload",
        "early_initialization",
    ):
        with pytest.raises(NotImplementedError, match="KaraCache does not support"):
            getattr(cache, name)(1)


# ----------------------------------------------------------------------------------------- sliding layers


@pytest.mark.parametrize("last", [FULL, SLIDING])
def test_layers_that_slide_are_left_alone(last):
    """Beside compressed ones, in a padded batch."""
    model = make_gemma(layer_types=[*GEMMA["layer_types"][:4], last])
    ids, real = prompts(7, 21, 12)
    cache = KaraCache(model, window=24, keep=9, tail=8)
    text, logits = generate(model, ids, real, cache, 90)
    assert len(cache.events) == 3 * 3
    assert cache.events[0].keep_indices.shape[0] == (2 if last == FULL else 1)
    assert_generated(model, cache, text, real, logits)
    assert len({tuple(row.tolist()) for row in text[:, 21:].unfold(1, 8, 8).flatten(0, 1)}) > 20  # it does not repeat


def test_any_passes_give_the_tokens_that_transformers_own_cache_gives():
    """Without a compression: as long prompts, in pieces longer and shorter than the sliding window."""
    model = make_gemma()
    ids = torch.randint(1, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(3))
    sizes = [13, 1, 1, 20, 4, 1, 20]
    ours = feed(model, KaraCache(model, window=64, keep=64), ids, sizes)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours, feed(model, DynamicCache(config=model.config), ids, sizes), rtol=1e-4, atol=1e-4)


def test_sliding_layers_of_a_failed_pass_are_as_before():
    model, fails = make_gemma(), KaraCache(make_gemma(), window=16, keep=8, tail=4, num_blocks=5)
    ids = torch.randint(1, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(3))
    feed(model, fails, ids[:, :50], [50])
    with pytest.raises(RuntimeError, match="blocks"):
        model(ids[:, :40], past_key_values=fails)
    good = KaraCache(model, window=16, keep=8, tail=4)
    feed(model, good, ids[:, :50], [50])
    assert torch.equal(
        model(ids[:, 50:53], past_key_values=fails).logits, model(ids[:, 50:53], past_key_values=good).logits
    )
    fails.reset()
    again = feed(model, fails, ids[:, :30], [30])
    assert torch.equal(again, feed(model, KaraCache(model), ids[:, :30], [30]))


def test_full_attention_looks_ahead_by_its_own_angles():
    model = make_gemma(rope_parameters={
        SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: {"rope_type": "default", "rope_theta": 5000.0},
    })  # fmt: skip
    ids, real = prompts(6, 11)
    cache = KaraCache(model, window=16, keep=6, tail=8, look_ahead=16, chunk_fraction=0.0)
    text, _ = generate(model, ids, real, cache, 60)
    best = functools.partial(best_for_later, ahead=16, theta=5000.0)
    assert_best_kept(model, cache, text[:, :-1], with_text(real, text[:, :-1]), ids.shape[1], best)


def test_another_attention_implementation_is_refused():
    model = make_model()
    ids, _ = prompts(6)
    cache = KaraCache(model)
    for other in ("sdpa", "eager"):
        model.set_attn_implementation(other)
        with pytest.raises(ValueError, match=f"got '{other}'.*set_attn_implementation"):
            KaraCache(model)
        with pytest.raises(RuntimeError, match=r'layer 0.*attn_implementation="kara"'):
            model(ids, past_key_values=cache)
        cache.reset()
    model.set_attn_implementation("kara")
    model(ids, past_key_values=cache)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(num_hidden_layers=2, sliding_window=64), "sliding_attention"),
        (Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=0), "sliding_attention"),
        (T5Config(), "encoder-decoder"),
        (LlamaConfig(is_causal=False), "not causal"),
    ],
)
def test_unsupported_models_are_refused(config, reason):
    with pytest.raises(NotImplementedError, match=reason):
        KaraCache(config)


def test_a_config_is_enough():
    assert len(KaraCache(MistralConfig(num_hidden_layers=2, sliding_window=None))) == 2


@pytest.mark.parametrize(
    "extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(6)}, {"sliding_window": 8}, {"is_causal": False}]
)
def test_attention_that_is_not_plain_is_refused(llama, extra):
    query, (key, value) = torch.zeros(1, 6, 3, 8), torch.zeros(2, 1, 2, 3, 8)
    key, value = KaraCache(llama).update(key, value, 0)
    with pytest.raises(NotImplementedError, match=f"{next(iter(extra))}.*LlamaAttention"):
        kara_attention(llama.model.layers[0].self_attn, query, key, value, None, scaling=1.0, **extra)


def test_custom_masks_are_refused(llama):
    ids, _ = prompts(6)
    with pytest.raises(NotImplementedError, match="a custom mask"):
        llama(ids, attention_mask=torch.ones(1, 1, 6, 6).tril().bool(), past_key_values=KaraCache(llama))


def test_another_batch_without_reset_is_refused(llama):
    cache = KaraCache(llama)
    llama(prompts(6, 6)[0], past_key_values=cache)
    with pytest.raises(ValueError, match="batch size: expected 2 as in the first forward, got 3"):
        llama(prompts(1, 1, 1)[0], past_key_values=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"window: expected 1\.\.4096, got 0"),
        ({"window": 8, "keep": 9}, r"keep: expected 1\.\.8, got 9"),
        ({"keep": 0}, r"keep: expected 1\.\.256, got 0"),
        ({"keep": 2.0}, "keep: expected an int, got float"),
        ({"tail": -1}, r"tail: expected 0\.\..*, got -1"),
        ({"block_size": 0}, r"block_size: expected 1\.\..*, got 0"),
        ({"num_blocks": 0}, r"num_blocks: expected 1\.\..*, got 0"),
        ({"protected": [3, -1]}, r"protected: expected 0\.\..*, got -1"),
        ({"backend": "cuda"}, "backend: expected"),
        ({"scorer": 3}, "scorer: expected a name, a callable or None"),
        ({"pool": "none"}, "pool"),
        ({"chunk_fraction": 1.5}, "chunk_fraction"),
        ({"windows": 3}, "windows: expected options among attention, .*max_chunk"),
        ({"window": 5000, "keep": 1}, "4096"),
    ],
)
def test_arguments_are_checked_before_the_model_runs(llama, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KaraCache(llama, **arguments)


def test_protected_needs_one_length_per_sequence(llama):
    with pytest.raises(ValueError, match="protected: expected 2 lengths, one per sequence, got 3"):
        llama(prompts(6, 6)[0], past_key_values=KaraCache(llama, protected=[1, 2, 3]))
