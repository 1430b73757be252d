"""RMS norm: y = x / sqrt(mean(x²) + eps) · weight, the mean over the last dimension in fp32."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C], weight [C] -> [..., C] in x.dtype. The normalised value is rounded before it meets the weight."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight
