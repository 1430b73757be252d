"""SwiGLU: silu(gate) · up.

One pass over memory each way. Backward computes the sigmoid again, so nothing but the two inputs is kept:

    dgate = dy · up · σ (1 + gate (1 − σ)),    dup = dy · gate σ,    σ = sigmoid(gate)
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels.lang import tl, triton
from isheep_kernels.variant import TYPES, Variant

BLOCK = 2048  # elements a program: sixteen a thread


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., I] -> [..., I]."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_ref` in Triton, with both gradients. gate and up [..., I] in fp32, fp16 or bf16."""
    if up.shape != gate.shape or gate.dtype not in TYPES or up.dtype != gate.dtype:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}")
    return _SwiGLU.apply(gate.contiguous(), up.contiguous())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        if n := gate.numel():
            _swiglu_kernel[(triton.cdiv(n, BLOCK),)](gate, up, y, n, BLOCK, num_warps=4)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        if n := gate.numel():
            dy = grads[0].contiguous()
            _swiglu_backward_kernel[(triton.cdiv(n, BLOCK),)](dy, gate, up, dgate, dup, n, BLOCK, num_warps=4)
        return dgate, dup


@triton.jit
def _swiglu_kernel(gate, up, y, n, BLOCK: tl.constexpr):
    """y = silu(gate) · up over n elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, at < n, other=0.0).to(tl.float32)
    tl.store(y + at, g * tl.sigmoid(g) * u, at < n)


@triton.jit
def _swiglu_backward_kernel(dy, gate, up, dgate, dup, n, BLOCK: tl.constexpr):
    """dgate and dup from dy, n elements each."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dy + at, at < n, other=0.0).to(tl.float32)
    g = tl.load(gate + at, at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, at < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + at, d * g * s, at < n)
    tl.store(dgate + at, d * u * s * (1 + g * (1 - s)), at < n)


def variants(capability: int) -> Iterator[Variant]:
    """Forward and backward in bf16."""
    for kernel, way in ((_swiglu_kernel, "forward"), (_swiglu_backward_kernel, "backward")):
        pointers = tuple(kernel.arg_names[:-2])
        signature = dict.fromkeys(pointers, f"*{TYPES[torch.bfloat16]}") | {"n": "i32"}
        yield Variant(f"swiglu {way} bf16", kernel, signature, {"BLOCK": BLOCK}, 4, 1, (*pointers, "n"))
