"""A frozen linear with a low-rank addition: y = x wᵀ + scale · (drop(x) aᵀ) bᵀ."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_matmul_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float = 0.0, key: int = 0
) -> Tensor:
    """x [T, K], w [N, K], bias [N], a [R, K], b [N, R] -> [T, N] in x.dtype; a and b are taken in x.dtype.

    Dropout acts on what `a` sees alone; survivors are scaled up by 1 / (1 - p).
    """
    seen = x * dropout_mask(x, p, key) if p else x
    return F.linear(x, w, bias).addmm_(F.linear(seen, a.to(x.dtype)), b.to(x.dtype).t(), alpha=scale / (1 - p))


def dropout_mask(like: Tensor, p: float, key: int) -> Tensor:
    """Bool, shaped as `like` [..., K], False with probability p: a function of (key, row, column), so never stored.

    The same numbers as `Dropout` in cpu_train.cpp: two rounds of a 32-bit mix for the row, one for the column.
    """
    columns = torch.arange(like.shape[-1], device=like.device)
    rows = torch.arange(like.numel() // max(1, len(columns)), device=like.device)
    row_keys = _mix((key >> 32) ^ _mix((key + rows * 0x9E3779B9) & 0xFFFFFFFF))
    return (_mix(row_keys[:, None] ^ columns) >= round(p * 2**32)).view(like.shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every bit of x reaches every bit of the result."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF  # what overflows int64 lies above these bits
    return x ^ (x >> 16)
