"""RMS norm: y = x / sqrt(mean(x²) + eps) · weight, the mean over the last dimension in fp32.

One pass over memory each way: a program holds whole rows, so the mean is taken from registers. `rms_norm_add` adds the
residual stream on the way in. Backward, with r = 1 / sqrt(mean(x²) + eps) and g = dy · weight:

    dx = r g − x · r³ mean(g x)

r is computed again, so the input is all that is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isheep_kernels.lang import tl, triton
from isheep_kernels.variant import TYPES, Variant


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C], weight [C] -> [..., C] in x.dtype. The normalised value is rounded before it meets the weight."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return h.to(x.dtype) * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_ref` in Triton, with the gradient of x. x [..., C] and the frozen weight [C] in fp32, fp16 or bf16."""
    _check(x, x, weight)
    return _RMSNorm.apply(x.contiguous(), None, weight, eps)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [..., C] -> rms_norm(x + residual), and x + residual, the next residual; gradients of both."""
    _check(x, residual, weight)
    return _RMSNorm.apply(x.contiguous(), residual.contiguous(), weight, eps)


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    if residual.shape != x.shape or weight.shape != x.shape[-1:]:
        shapes = (tuple(t.shape) for t in (x, residual, weight))
        raise ValueError("rms_norm: x {}, residual {}, weight {}".format(*shapes))
    if x.dtype not in TYPES or residual.dtype != x.dtype:
        raise ValueError(f"rms_norm: x {x.dtype}, residual {residual.dtype}; both are one of fp32, fp16 and bf16")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Any:
        y = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        _launch(_rms_norm_kernel, x, residual, weight, y, total, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.add = eps, residual is not None
        return (y, total) if ctx.add else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        dx = torch.empty_like(total)
        dtotal = None if dtotal is None else dtotal.contiguous()
        _launch(_rms_norm_backward_kernel, dy.contiguous(), dtotal, weight, dx, total, ctx.eps)
        return dx, dx if ctx.add else None, None, None


def _launch(kernel: Any, x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, total: Tensor, eps: float):
    C = x.shape[-1]
    num_rows = x.numel() // C
    if num_rows:
        constants, num_warps = _tile(C)
        grid = (triton.cdiv(num_rows, constants["ROWS"]),)
        add = residual is not None
        kernel[grid](x, residual, weight, y, total, num_rows, C, eps, ADD=add, **constants, num_warps=num_warps)


def _tile(C: int) -> tuple[dict[str, int], int]:
    """Whole rows, and enough short ones (heads of a query norm) to keep four warps busy. -> constants, warps."""
    block = triton.next_power_of_2(C)
    return {"BLOCK_C": block, "ROWS": max(1, 1024 // block)}, min(max(block // 512, 4), 16)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x, residual, weight, y, total, num_rows, C, eps, ADD: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS rows of x [num_rows, C] -> y; with ADD of x + residual, which is stored in total."""
    columns, at, inside = _place(num_rows, C, BLOCK_C, ROWS)
    h = tl.load(x + at, inside, other=0.0).to(tl.float32)
    if ADD:
        h += tl.load(residual + at, inside, other=0.0).to(tl.float32)
        stored = h.to(x.dtype.element_ty)  # backward sees this one, so the norm does too
        tl.store(total + at, stored, inside)
        h = stored.to(tl.float32)
    w = tl.load(weight + columns, columns < C, other=0.0).to(tl.float32)
    h *= tl.rsqrt(tl.sum(h * h, 1) / C + eps)[:, None]
    tl.store(y + at, h.to(x.dtype.element_ty).to(tl.float32) * w, inside)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    dy, dtotal, weight, dx, total, num_rows, C, eps, ADD: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The gradient dx [num_rows, C] of the norm's input `total`; with ADD, dtotal came to that input past the norm."""
    columns, at, inside = _place(num_rows, C, BLOCK_C, ROWS)
    w = tl.load(weight + columns, columns < C, other=0.0).to(tl.float32)
    g = tl.load(dy + at, inside, other=0.0).to(tl.float32) * w
    h = tl.load(total + at, inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(h * h, 1) / C + eps)
    d = r[:, None] * g - h * (r * r * r * tl.sum(g * h, 1) / C)[:, None]
    if ADD:
        d += tl.load(dtotal + at, inside, other=0.0).to(tl.float32)
    tl.store(dx + at, d, inside)


@triton.jit
def _place(num_rows, C, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """The columns, the offsets of this program's rows in a contiguous [num_rows, C], and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    return columns, rows[:, None] * C + columns[None, :], (rows < num_rows)[:, None] & (columns < C)[None, :]


def variants(capability: int) -> Iterator[Variant]:
    """Every launch for bf16 rows of a head (128), of a 7B (4096) and of a 72B model (8192)."""
    for kernel, way in ((_rms_norm_kernel, "forward"), (_rms_norm_backward_kernel, "backward")):
        pointers = kernel.arg_names[:5]
        for C in (128, 4096, 8192):
            constants, num_warps = _tile(C)
            signature = dict.fromkeys(pointers, f"*{TYPES[torch.bfloat16]}")
            signature |= {"num_rows": "i32", "C": "i32", "eps": "fp32"}
            name = f"{way} bf16 C{C}"
            with_add = Variant(
                f"rms_norm_add {name}", kernel, signature, constants | {"ADD": True}, num_warps, 1, (*pointers, "C")
            )
            yield with_add
            added = pointers[1]  # the residual, or its gradient
            yield with_add._replace(
                name=f"rms_norm {name}",
                signature={k: v for k, v in signature.items() if k != added},
                constants=constants | {"ADD": False, added: None},
                divisible_by_16=tuple(k for k in (*pointers, "C") if k != added),
            )
