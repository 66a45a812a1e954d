"""Attention over caches of eight-bit floats, in PyTorch, because vLLM's own for CPUs needs AVX-512.

What is replaced is what vLLM calls: its choice of instructions, and three operations. Rows lie in a block as they would
in any cache, so they are found as on a GPU.
"""

import torch
from vllm import _custom_ops
from vllm.v1.attention.backends import cpu_attn

DTYPES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def install(patch):
    """Replaces vLLM's operations through a pytest.MonkeyPatch."""
    choose, plan = cpu_attn._get_attn_isa, _custom_ops.cpu_attn_get_scheduler_metadata
    patch.setattr(cpu_attn, "_get_attn_isa", lambda *shape: choose(*shape[:3]))
    patch.setattr(
        _custom_ops, "cpu_attn_get_scheduler_metadata", lambda **given: plan(**given | {"kv_cache_dtype": "auto"})
    )
    patch.setattr(_custom_ops, "cpu_attn_reshape_and_cache", _write)
    patch.setattr(_custom_ops, "cpu_attention_with_kv_cache", _attend)


def rounded(rows, scale, dtype):
    """Rows as they are stored, in eight bits."""
    most = torch.finfo(dtype).max
    return (rows / scale).clamp(-most, most).to(dtype)


def stored(dtype, scales):
    """What a cache makes of a layer's rows, see :func:`dense.dense_logits`; ``scales``: two of each layer."""

    def of_layer(layer, *rows):
        return tuple(
            rounded(x.float(), scale, dtype).float() * scale for x, scale in zip(rows, scales[layer], strict=True)
        )

    return of_layer


def _write(key, value, key_cache, value_cache, slots, isa, k_scale, v_scale, kv_cache_dtype):
    page = key_cache.shape[2]
    for rows, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        codes = rounded(rows, scale, DTYPES[kv_cache_dtype]).view(torch.uint8)
        used = slots >= 0
        cache[slots[used] // page, :, slots[used] % page] = codes[: len(slots)][used]


def _attend(
    query, key_cache, value_cache, output, query_start_loc, seq_lens, scale, causal, block_table, k_scale, v_scale,
    kv_cache_dtype, **_,
):  # fmt: skip
    dtype, heads = DTYPES[kv_cache_dtype], key_cache.shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        tokens = slice(*query_start_loc[i : i + 2].tolist())
        blocks = block_table[i, : -(-length // key_cache.shape[2])].long()
        k, v = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].contiguous().view(dtype).float() * factor
            for cache, factor in ((key_cache, k_scale), (value_cache, v_scale))
        )
        q = query[tokens].float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, n, D]
        logits = q @ k[:, None].mT * scale
        n = logits.shape[2]
        later = torch.ones(n, length, dtype=torch.bool).triu(length - n + 1)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        output[tokens] = (weights @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)
