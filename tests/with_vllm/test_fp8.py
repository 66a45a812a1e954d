"""Windows over caches of eight-bit floats: the same tokens as a dense model whose keys and values are rounded alike."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import fp8_attention
import pytest
import torch
from contexts_harness import ON, serving
from harness import KARA, Dense, configure, engine, greedy, prompts, short_of_best
from safetensors.torch import load_file, save_file
from test_refusals import COMPRESSED

from kara_kernels.integrations.vllm import layout
from kara_kernels.integrations.vllm.quantised import by_head, plain

REAL = torch.cpu._is_avx512_supported()
SCALES = [(0.04, 0.01), (0.5, 0.125), (0.011, 0.9)]
CLOSE = 0.01  # a key beside a boundary may be rounded the other way; a wrong row changes whole units


@pytest.fixture(params=["in PyTorch", pytest.param("of vLLM", marks=pytest.mark.skipif(not REAL, reason="AVX-512"))])
def attention(request, monkeypatch):
    if request.param == "in PyTorch":
        fp8_attention.install(monkeypatch)


def judge(model, name, scales=((1.0, 1.0),) * 3):
    return Dense(model, fp8_attention.stored(fp8_attention.DTYPES[name], scales), CLOSE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("fp8", {}),
        ("fp8_e5m2", {}),
        ("fp8_e4m3", {"pool": "model", "query_dtype": "auto"}),
        ("fp8", {"attention": "causal", "query_stride": 1}),
        ("fp8", {"scorer": "compactor", "query_stride": 1}),
        ("fp8", {"scorer": "knorm", "query_stride": 1}),
    ],
    ids=lambda of: of if isinstance(of, str) else " ".join(map(str, of.values())) or "defaults",
)
def test_tokens_are_those_of_a_dense_model(model, trace, attention, name, changes):
    with engine(model, {**KARA, **changes}, trace=trace, kv_cache_dtype=name) as kara:
        served = kara.generate(prompts(5, 40, 77, 64, 1), greedy(280))
        judge(model, name).assert_equal(kara, served, compressions=3)
        kara.assert_nothing_leaks()


@pytest.fixture(scope="module")
def scaled(model, tmp_path_factory):
    """A checkpoint that asks for such a cache and has factors for the keys and values of every layer."""
    folder = tmp_path_factory.mktemp("scaled")
    shutil.copytree(model, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": COMPRESSED}))
    factors = {
        f"model.layers.{layer}.self_attn.{of}_scale": torch.tensor([factor])
        for layer, both in enumerate(SCALES)
        for of, factor in zip("kv", both, strict=True)
    }
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | factors, weights, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "packed"),
    [({}, False), ({"scorer": "compactor", "query_stride": 1}, True)],
    ids=["kara, plain", "compactor, packed"],
)
def test_a_checkpoint_has_scales(model, scaled, trace, attention, monkeypatch, changes, packed):
    if packed:
        monkeypatch.setattr(layout, "_strides", lambda where: None)
    with engine(scaled, {**KARA, **changes}, trace=trace) as kara:
        served = kara.generate(prompts(5, 40, 77), greedy(200))
        keys, values = kara.runner.kara_scales
        assert torch.allclose(torch.stack((keys, values), 2), torch.tensor(SCALES)[:, None].expand(3, 2, 2))
        judge(model, "fp8", SCALES).assert_equal(kara, served, compressions=2)
        kara.assert_nothing_leaks()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_keys_are_scored_with_their_scales(model, scaled, trace, attention, monkeypatch, packed):
    if packed:
        monkeypatch.setattr(layout, "_strides", lambda where: None)
    mean = {"reduction": "mean", "value_norm": False, "chunk_fraction": 0.0, "query_dtype": "auto", "look_ahead": 0}
    dense = judge(model, "fp8", SCALES)
    with engine(scaled, {**KARA, **mean}, trace=trace) as kara:
        for served in kara.generate(prompts(5, 77), greedy(280)):
            events = kara.events_of(served.request_id)
            assert len(events) >= 2
            for event, scores in zip(events, dense.scores(served, events, KARA["query_stride"]), strict=True):
                assert short_of_best(event, scores) < 1e-4


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"pool": "model"}, "got 'model'"), ({"pool": "model", "value_norm": False}, None), ({"pool": "layer"}, None)],
    ids=str,
)
def test_lists_over_layers_compare_no_values_of_other_scales(scaled, attention, changes, words):
    refused = pytest.raises(ValueError, match=f"expected pool='head' or value_norm=False .* {words}")
    with refused if words else nullcontext(), engine(scaled, {**KARA, **changes}):
        pass


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5, 2.0])], ids=["layer", "head"])
def test_queries_in_eight_bits_are_recorded_as_they_were(scale):
    """As backends for GPUs get them."""
    layer = SimpleNamespace(num_kv_heads=2, _q_scale=scale)
    query = torch.arange(24.0).view(3, 4, 2)
    factors = by_head(scale, 2).repeat_interleave(2)[:, None]
    given = (query / factors).to(torch.float8_e4m3fn)
    assert torch.equal(plain(layer, given, torch.float32), given.float() * factors)
    assert plain(layer, query, torch.float32) is query


@pytest.mark.parametrize(
    ("methods", "packed"), [([], False), (["none/int8"], True)], ids=["as it is, plain", "int8, packed"]
)
def test_contexts_answer_as_a_dense_model_with_their_rows(model, attention, monkeypatch, methods, packed):
    """Without methods of its own, a server stores what it holds, which takes no more room."""
    if packed:
        monkeypatch.setattr(layout, "_strides", lambda where: None)
    (document,), questions = prompts(256, seed=3), prompts(9, 5, 31, seed=4)
    stored = fp8_attention.stored(torch.float8_e4m3fn, ((1.0, 1.0),) * 3)
    contexts = {**ON, "methods": methods} if methods else ON
    with serving(model, contexts, stored, kv_cache_dtype="fp8") as some:
        exact = some.ask(document + questions[0], context_tokens=256)
        copy = some.manager.keeper.get(some.place_of(document + questions[0], 256).key)
        assert copy.option.method == (methods or ["none/exact"])[0]
        assert methods or copy.option.ratio < 1.01
        some.forget()
        for question in questions:
            prompt = document + question
            assert some.ask(prompt, context_tokens=256) == [some.judge(prompt, 256)]
        if not methods:
            assert some.ask(document + questions[0]) == exact
        assert some.manager.counts["hits", "ram"] == 1
        some.assert_nothing_leaks()


def test_a_cache_in_eight_bits_is_not_stored_in_eight_bits_again(model):
    refused = pytest.raises(ValueError, match="contexts: expected only supported features, got none/fp8 of a cache")
    twice = {"contexts": {**ON, "methods": ["none/exact", "none/fp8"]}}
    with refused:
        configure(model, None, kv_cache_dtype="fp8", additional_config=twice)
