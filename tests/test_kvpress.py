"""Scores against kvpress, the package of ExpectedAttention's authors, on a small model.

Its press modules run with any transformers. The package itself asks for an older one, so it is fetched without what it
requires, once per user, and only its press modules are imported. Where it differs from the papers, the test says how.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_transformers import make_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

from bench.packages import package_of  # noqa: E402
from kara_kernels import scorers  # noqa: E402
from kara_kernels.integrations.transformers.rotary import find_look_ahead  # noqa: E402
from kara_kernels.scorers import Repetition, Rows, published  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, WINDOW = 512, 32  # two chunks of Compactor


class Layer(NamedTuple):
    """What a layer of the model saw and made of it, as kvpress takes it. ``keys`` are those of the whole cache."""

    module: Any
    hidden: Tensor
    query: Tensor
    keys: Tensor
    values: Tensor
    attentions: Tensor
    rotation: dict[str, tuple[Tensor, Tensor]]

    def score(self, press: Any) -> Tensor:
        given = self.hidden, self.keys, self.values, None, self.rotation
        return press.score(self.module, *given)[0]


def read(model: Any, ids: Tensor, cache: DynamicCache) -> list[Layer]:
    """Runs the model on tokens after those in the cache."""
    seen: list[tuple[Any, dict[str, Any], Tensor]] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, _, given, out: seen.append((module, given, out[1])), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids[None], past_key_values=cache)
    for hook in hooks:
        hook.remove()
    layers = []
    for i, (module, given, attentions) in enumerate(seen):
        hidden, rotation = given["hidden_states"], given["position_embeddings"]
        query, key = (
            part(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for part in (module.q_proj, module.k_proj)
        )
        query, _ = apply_rotary_pos_emb(query, key, *rotation)
        held = cache.layers[i]
        layers.append(Layer(module, hidden, query.detach(), held.keys.clone(), held.values.clone(), attentions,
                            {"position_embeddings": rotation}))  # fmt: skip
    return layers


class Context(NamedTuple):
    model: Any
    ids: Tensor
    cache: DynamicCache
    layers: list[Layer]
    rows: Rows


def queries(layers: list[Layer], heads: int) -> Tensor:
    """``[L, N, H, G, D]``."""
    return torch.stack([layer.query[0] for layer in layers]).unflatten(1, (heads, -1)).permute(0, 3, 1, 2, 4)


@pytest.fixture(scope="module")
def context(one_thread: None) -> Context:
    model = make_model()
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # where kvpress looks for it
    ids = torch.randint(1, 61, (TOKENS,), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    layers = read(model, ids, cache)
    keys, values = (torch.stack([getattr(layer, part)[0] for layer in layers]) for part in ("keys", "values"))
    rows = Rows(queries(layers, keys.shape[1]), keys, values, 0, TOKENS, keys.shape[-1] ** -0.5, 0,
                find_look_ahead(model))  # fmt: skip
    return Context(model, ids, cache, layers, rows)


@pytest.fixture(scope="module")
def presses() -> Iterator[Any]:
    """Press classes by module and name, without the package's ``__init__``, which imports what is not installed."""
    try:
        folder = package_of("kvpress", "0.5.5")
    except SystemExit as error:
        pytest.skip(str(error))
    package = types.ModuleType("kvpress")
    package.__path__ = [str(folder / "kvpress")]
    sys.modules["kvpress"] = package
    yield lambda module, name: getattr(importlib.import_module(f"kvpress.presses.{module}_press"), name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvpress"]:
        del sys.modules[name]


def theirs(context: Context, press: Any) -> Tensor:
    return torch.stack([layer.score(press) for layer in context.layers])


def assert_equal(ours: Tensor, expected: Tensor) -> None:
    assert expected.std(-1).min() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_knorm(context: Context, presses: Any) -> None:
    assert_equal(scorers.knorm(context.rows), theirs(context, presses("knorm", "KnormPress")()))


def test_keydiff(context: Context, presses: Any) -> None:
    assert_equal(scorers.keydiff(context.rows), theirs(context, presses("keydiff", "KeyDiffPress")()))


def test_snapkv_but_for_its_pool(context: Context, presses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes means of 5 where the paper's experiments take maxima of 7, from 64 queries, and scores no row of those
    queries."""
    monkeypatch.setattr(published, "SNAP_POOL", 1)
    press = presses("snapkv", "SnapKVPress")(window_size=WINDOW, kernel_size=1)
    assert_equal(scorers.snapkv(context.rows)[..., :-WINDOW], theirs(context, press)[..., :-WINDOW])


def test_tova(context: Context, presses: Any) -> None:
    """It protects the newest row."""
    assert_equal(scorers.tova(context.rows)[..., :-1], theirs(context, presses("tova", "TOVAPress")())[..., :-1])


def test_h2o_but_for_means_over_the_queries_that_see_a_key(context: Context, presses: Any) -> None:
    press = presses("observed_attention", "ObservedAttentionPress")()
    found = torch.stack([press.score(x.module, x.hidden, x.keys, x.values, x.attentions, {})[0]
                         for x in context.layers])  # fmt: skip
    seen_by = torch.arange(TOKENS, 0, -1) * context.rows.query.shape[3]
    assert_equal(scorers.h2o(context.rows), found * seen_by)


def test_compactors_attention_but_for_its_scale(context: Context, presses: Any) -> None:
    """It omits ``1/sqrt(D)``, counts zeros beyond both ends as neighbours, and standardises each layer. With lengths
    that are no multiple of its chunk it also lets padding take part, at a logit of -1e-9."""
    rows = Rows(context.rows.query, context.rows.keys, context.rows.values, 0, TOKENS, 1.0)
    ours = scorers.compactor(rows)
    ours[..., [0, -1]] *= 2 / 3
    ours = torch.stack([(layer - layer.mean()) / layer.std() for layer in ours])
    assert_equal(ours, theirs(context, presses("non_causal_attention", "NonCausalAttnPress")()))


def test_expected_attention(context: Context, presses: Any) -> None:
    """With the epsilon of its authors' evaluation; the default there is 0. It sets the scores of sinks."""
    press = presses("expected_attention", "ExpectedAttentionPress")(epsilon=published.EPSILON)
    assert_equal(scorers.expected_attention(context.rows)[..., 4:], theirs(context, press)[..., 4:])


def test_kvzip(context: Context, presses: Any) -> None:
    """The context is repeated in two passes, each after an instruction."""
    press = presses("kvzip", "KVzipPress")()
    press.context_length = TOKENS
    press.score_val = torch.zeros(len(context.layers), 1, context.rows.keys.shape[1], TOKENS)
    repetitions = []
    for first, last in ((0, 300), (300, TOKENS)):
        press.start_idx, press.end_idx = first, last
        instruction = torch.randint(1, 61, (5,), generator=torch.Generator().manual_seed(first))
        ids = torch.cat((instruction, context.ids[first:last]))
        layers = read(context.model, ids, copy.deepcopy(context.cache))
        for layer in layers:
            press.score_kvzip(layer.module, layer.hidden, layer.keys, layer.values, None, layer.rotation)
        keys = torch.stack([layer.keys[0, :, TOKENS:] for layer in layers])
        repetitions.append(Repetition(first, last - first, queries(layers, keys.shape[1]), keys))
    rows = Rows(context.rows.query, context.rows.keys, context.rows.values, 0, TOKENS, context.rows.scale,
                repetitions=tuple(repetitions))  # fmt: skip
    assert_equal(scorers.kvzip(rows), press.score_val[:, 0])
