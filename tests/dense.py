"""What a compressed cache must compute, without a cache: one forward pass over the whole text. A dropped token is
masked in the attention of its layer and head. Nothing is stored, moved or paged, and positions are logical."""

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# layer of full attention -> post-RoPE queries, keys, and values of the last forward
_seen: dict[int, tuple[Tensor, ...]] = {}


def _dense_attention(
    module, query, key, value, attention_mask, scaling, visible=None, rows=None, stored=None, real=None, **kwargs
):
    """Softmax attention in float64; ``visible[layer] [S, H, T, T]`` says which key each query sees in a layer of full
    attention. The others see what is in their sliding window."""
    layer = full_layers(module.config).get(module.layer_idx)
    if layer is None:
        age = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
        seen = (age >= 0) & (age < module.sliding_window) & real[:, None, None, :]
        return _attend(query, key, value, seen, scaling), None
    if stored is not None:
        key, value = stored(layer, key, value)
    if rows is not None:
        key, value = (
            torch.cat((given[layer][None], own[:, :, given.shape[2] :]), 2)
            for given, own in zip(rows, (key, value), strict=True)
        )
    _seen[layer] = query, key, value
    seen = visible[layer].repeat_interleave(query.shape[1] // visible[layer].shape[1], 1)
    return _attend(query, key, value, seen, scaling), None


def _attend(query, key, value, seen, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    weights = (query.double() @ key.mT * scaling).masked_fill(~seen, -torch.inf)
    output = weights.softmax(-1).nan_to_num() @ value  # a padding token sees nothing: 0 / 0
    return output.transpose(1, 2).to(query.dtype)


def full_layers(config) -> dict[int, int]:
    """The layers of full attention, numbered from 0."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return {layer: i for i, layer in enumerate(i for i, kind in enumerate(kinds) if kind == "full_attention")}


ALL_ATTENTION_FUNCTIONS.register("dense", _dense_attention)


class Ledger:
    """Plain lists of the logical tokens that each (layer, sequence, head) still holds."""

    def __init__(self, layers: int, heads: int, real: Tensor):
        sequences, tokens = real.shape
        self.real, self.now = real, 0
        self.held = [[[[] for _ in range(heads)] for _ in range(sequences)] for _ in range(layers)]
        self.visible = torch.zeros(layers, sequences, heads, tokens, tokens, dtype=torch.bool)

    def read(self, until: int) -> None:
        """Adds tokens up to ``until``. Each sees the held tokens and the new tokens before it."""
        for token in range(self.now, until):
            for layer, sequences in enumerate(self.held):
                for s, heads in enumerate(sequences):
                    for h, tokens in enumerate(heads):
                        if self.real[s, token]:
                            tokens.append(token)
                        self.visible[layer, s, h, token, tokens] = True
        self.now = until

    def drop(self, s: int, start: int, window: int, keep: Tensor) -> None:
        """Sequence ``s`` keeps only ``keep [L, H, K]`` of the ``window`` rows from ``start`` on."""
        for layer, per_head in enumerate(keep.tolist()):
            for h, rows in enumerate(per_head):
                tokens = self.held[layer][s][h]
                kept = [tokens[start + row] for row in rows]
                self.held[layer][s][h] = tokens[:start] + kept + tokens[start + window :]


def replay(model, real: Tensor, events) -> Ledger:
    """The ledger of a text ``real [S, T]`` after ``events``, records of :class:`kara_kernels.engine.Compression`. In a
    batch their ``request_id`` is the sequence's index."""
    config = model.config
    heads = config.num_key_value_heads
    if hasattr(config, "kv_lora_rank"):  # one latent row for all heads, of which each rank has its own
        heads = max((event.keep_indices.shape[1] for event in events), default=1)
    ledger = Ledger(len(full_layers(config)), heads, real)
    happened = [(int(event.request_id) if len(real) > 1 else 0, event) for event in events]
    happened = [(column_of(real[s], event.logical_len), s, event) for s, event in happened]
    for column, s, event in sorted(happened, key=lambda found: found[0]):
        ledger.read(column)
        ledger.drop(s, event.window_start, event.window, event.keep_indices)
    ledger.read(real.shape[1])
    return ledger


def column_of(real: Tensor, tokens: int) -> int:
    """The number of columns of ``real [T]``, including padding, that hold ``tokens`` tokens."""
    return int((real.long().cumsum(0) < tokens).sum()) + 1


@torch.no_grad()
def dense_logits(
    model, ids: Tensor, real: Tensor, visible: Tensor, rows: tuple[Tensor, Tensor] | None = None, stored=None
) -> Tensor:
    """Logits ``[S, T, V]`` of the text ``ids [S, T]`` in one forward pass without a cache. ``rows``: keys and values
    ``[L, H, count, D]`` that stand for those of the first tokens. ``stored(layer, keys, values)``: what a cache
    makes of a layer's."""
    _seen.clear()  # another model may have had more layers
    before = model.config._attn_implementation
    model.set_attn_implementation("dense")
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(
        ids, position_ids=positions, visible=visible, rows=rows, stored=stored, real=real, use_cache=False
    ).logits
    model.set_attn_implementation(before)
    return logits


def best_of_window(layer: int, s: int, tokens: list[int], judges: list[int], keep: int, scale: float) -> Tensor:
    """The ``keep`` tokens with most attention from the queries ``judges`` in the last dense pass: ``[H, K]``."""
    query, key, _ = (x[s].double() for x in _seen[layer])
    heads, dim = key.shape[0], key.shape[2]
    query = query[:, judges].reshape(heads, -1, dim)  # the G query heads of a KV head are adjacent
    score = (query @ key[:, tokens].mT * scale).softmax(-1).mean(1)
    return score.topk(keep).indices.sort(-1).values


def best_of_causal(layer: int, s: int, tokens: list[int], judges: list[int], keep: int, scale: float) -> Tensor:
    """The same, but only the queries of ``tokens`` score, with a causal mask."""
    query, key, _ = (x[s].double() for x in _seen[layer])
    query = query[:, tokens].unflatten(0, (key.shape[0], -1))  # [H, G, W, D]
    ahead = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    logits = (query @ key[:, None, tokens].mT * scale).masked_fill(ahead, -torch.inf)
    return logits.softmax(-1).mean((1, 2)).topk(keep).indices.sort(-1).values


def turned(query: Tensor, ahead: int, theta: float) -> Tensor:
    """Queries ``[..., D]`` rotated ``ahead`` positions, their halves as complex numbers."""
    dim = query.shape[-1]
    turns = torch.polar(torch.ones(dim // 2).double(), ahead * theta ** (-torch.arange(0, dim, 2) / dim).double())
    rotated = torch.complex(query[..., : dim // 2], query[..., dim // 2 :]) * turns
    return torch.cat((rotated.real, rotated.imag), -1)


def best_for_later(
    layer: int, s: int, tokens: list[int], judges: list[int], keep: int, scale: float, ahead: int, theta: float
) -> Tensor:
    """The same with the root mean square over judges and group, times value norms, and with the judges rotated
    ``ahead`` positions."""
    query, key, value = (x[s].double() for x in _seen[layer])
    heads = key.shape[0]
    query = turned(query, ahead, theta)[:, judges].unflatten(0, (heads, -1))  # [H, G, n, D]
    mass = (query @ key[:, None, tokens].mT * scale).softmax(-1)
    score = mass.square().mean((1, 2)).sqrt() * value[:, tokens].norm(dim=-1)
    return score.topk(keep).indices.sort(-1).values
