"""A frozen linear with a low-rank addition: y = x wᵀ + scale · (drop(x) aᵀ) bᵀ."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dropout(NamedTuple):
    """Element (t, k) is dropped with probability p: a draw named (key, tokens[t], k), wherever that token stands."""

    p: float
    key: int  # 0 … 2^63 - 1
    tokens: Tensor  # [T] int64, on the device of what is dropped


def lora_matmul_ref(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """x [T, K], w [N, K], bias [N], a [R, K], b [N, R] -> [T, N] in x.dtype; a and b are taken in x.dtype.

    Dropout acts on what `a` sees alone; survivors are scaled up by 1 / (1 - p).
    """
    p, seen = (0.0, x) if dropout is None else (dropout.p, x * dropout_mask(x, *dropout))
    return F.linear(x, w, bias).addmm_(F.linear(seen, a.to(x.dtype)), b.to(x.dtype).t(), alpha=scale / (1 - p))


def dropout_mask(like: Tensor, p: float, key: int, tokens: Tensor) -> Tensor:
    """Bool [T, K] as `like`, False with probability p: a function of (key, token, column), so never stored.

    The same numbers as `Dropout` in cpu_train.cpp: three rounds of a 32-bit mix for the key and the halves of
    tokens [T] int64, one for the column.
    """
    columns = torch.arange(like.shape[1], device=like.device)
    high, low = tokens >> 32, tokens & 0xFFFFFFFF
    token_keys = _mix(low ^ _mix((key >> 32) ^ _mix((key + high * 0x9E3779B9) & 0xFFFFFFFF)))
    return _mix(token_keys[:, None] ^ columns) >= round(p * 2**32)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in which every bit of x reaches every bit of the result."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF  # what overflows int64 lies above these bits
    return x ^ (x >> 16)
