"""SwiGLU: silu(gate) · up."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I]."""
    return F.silu(gate) * up
