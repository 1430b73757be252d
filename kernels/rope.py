"""Rotary position embedding over halves: dimension d turns with d + D/2."""

import torch
from torch import Tensor


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by cos, sin [T, D/2] (fp32) -> [T, H, D] in x.dtype."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
