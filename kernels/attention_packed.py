"""Causal attention over packed sequences: block-diagonal by cu_seqlens, grouped queries."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_packed_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]. Tokens cu_seqlens[i] .. cu_seqlens[i+1] are sequence i."""
    out = []
    for start, end in pairwise(cu_seqlens):
        qs, ks, vs = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, enable_gqa=True)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)
