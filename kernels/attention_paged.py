"""Causal attention over a paged key/value cache: decode, chunked prefill, and both in one batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def write_kv_ref(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put k, v [T, G, D] into the slots [T] (block · block_size + offset) of caches [NB, BS, G, D], in place."""
    k_cache.view(-1, *k.shape[1:])[slots] = k
    v_cache.view(-1, *v.shape[1:])[slots] = v


def attention_paged_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """q [T, H, D] over caches [NB, BS, G, D] -> [T, H, D].

    Sequence s owns tokens cu_seqlens[s] .. cu_seqlens[s+1] of q, the last ones of its context_lens[s] cached positions;
    position p lies in block block_tables[s, p // BS] at offset p % BS. int32 all.
    """
    out = torch.empty_like(q)
    block_size = k_cache.shape[1]
    starts, lens = cu_seqlens.tolist(), context_lens.tolist()
    for s, length in enumerate(lens):
        start, end = starts[s], starts[s + 1]
        blocks = block_tables[s, : -(-length // block_size)].long()
        k, v = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        last = torch.arange(length - (end - start), length, device=q.device)  # the last key each query sees
        mask = torch.arange(length, device=q.device) <= last[:, None]
        y = F.scaled_dot_product_attention(q[start:end].transpose(0, 1)[None], k, v, mask, scale=scale, enable_gqa=True)
        out[start:end] = y[0].transpose(0, 1)
    return out
