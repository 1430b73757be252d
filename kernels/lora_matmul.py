"""A frozen linear with a low-rank addition: y = x wᵀ + scale · (x aᵀ) bᵀ."""

import torch.nn.functional as F
from torch import Tensor


def lora_matmul_ref(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x [T, K], w [N, K], bias [N], a [R, K], b [N, R] -> [T, N] in x.dtype; a and b are taken in x.dtype."""
    return F.linear(x, w, bias).addmm_(F.linear(x, a.to(x.dtype)), b.to(x.dtype).t(), alpha=scale)
