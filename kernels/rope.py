"""Rotary position embedding over halves: dimension d turns with d + D/2.

    out[d] = x[d] cos[d] − x[d + D/2] sin[d],    out[d + D/2] = x[d + D/2] cos[d] + x[d] sin[d],    d < D/2

One launch turns queries and keys. The gradient of a rotation is the rotation back, so backward needs the angles alone.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isheep_kernels.lang import tl, triton
from isheep_kernels.variant import TYPES, Variant

HEADS = 8  # heads a program turns by the angles it has loaded


def rope_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] turned by cos, sin [T, D/2] (fp32) -> [T, H, D] in x.dtype."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope_ref` of q [T, H, D] and k [T, G, D] in Triton, in new tensors, with gradients of both.

    cos, sin [T, D/2] fp32; q and k in fp32, fp16 or bf16, their tokens any number of elements apart.
    """
    _check(q, k, cos, sin)
    return _Rope.apply(q, k, cos, sin)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`rope` in place, for passes that need no gradient."""
    _check(q, k, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("rope_ writes over q and k: where they need a gradient, take rope")
    _turn(q, k, q, k, cos, sin, back=False)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    (T, _, D), angles = q.shape, (q.shape[0], q.shape[2] // 2)
    if k.shape[::2] != (T, D) or D % 2 or cos.shape != angles or sin.shape != angles:
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if q.dtype not in TYPES or k.dtype != q.dtype or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(f"rope: q {q.dtype}, k {k.dtype} (one of fp32, fp16, bf16), cos {cos.dtype} (fp32)")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_turned(dq, dk, *ctx.saved_tensors, back=True), None, None


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _turn(_rows(q), _rows(k), *out, cos, sin, back)
    return out


def _rows(x: Tensor) -> Tensor:
    """x [T, H, D] with each token's heads side by side, as the kernel reads them; a copy only where they are not."""
    return x if x[0:1].is_contiguous() else x.contiguous()


def _turn(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Write q and k turned by the angles, or back, to q_out and k_out, which may be q and k."""
    (T, H, D), G = q.shape, k.shape[1]
    assert all(x[0:1].is_contiguous() for x in (q, k, q_out, k_out)), "a token's heads lie side by side"
    if T:
        grid = (T, triton.cdiv(H, HEADS) + triton.cdiv(G, HEADS))
        strides = q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0)
        half = {"HALF": D // 2, "BLOCK_D": triton.next_power_of_2(D // 2), "HEADS": HEADS, "BACK": back}
        _rope_kernel[grid](q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), H, G, *strides, **half, num_warps=4)


@triton.jit
def _rope_kernel(
    q, k, q_out, k_out, cos, sin, H, G, q_stride, k_stride, q_out_stride, k_out_stride,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Program (t, block): HEADS heads of token t, of q in the first ceil(H / HEADS) blocks, of k in the others.

    Strides are elements from token to token; cos and sin [T, HALF] are contiguous.
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks_of_q = tl.cdiv(H, HEADS)
    if block < blocks_of_q:
        _turn_heads(
            q + token * q_stride, q_out + token * q_out_stride, cos + token * HALF, sin + token * HALF,
            block * HEADS, H, HALF, BLOCK_D, HEADS, BACK,
        )  # fmt: skip
    else:
        _turn_heads(
            k + token * k_stride, k_out + token * k_out_stride, cos + token * HALF, sin + token * HALF,
            (block - blocks_of_q) * HEADS, G, HALF, BLOCK_D, HEADS, BACK,
        )  # fmt: skip


@triton.jit
def _turn_heads(
    x, y, cos, sin, first, num_heads,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One token's heads first … first + HEADS - 1 of x [num_heads, 2 HALF] to y, by its cos and sin [HALF]."""
    heads, d = first + tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
    c, s = tl.load(cos + d, d < HALF, other=0.0), tl.load(sin + d, d < HALF, other=0.0)
    if BACK:
        s = -s
    at = heads[:, None] * (2 * HALF) + d[None, :]
    inside = (heads < num_heads)[:, None] & (d < HALF)[None, :]
    a = tl.load(x + at, inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, inside, other=0.0).to(tl.float32)
    tl.store(y + at, a * c[None, :] - b * s[None, :], inside)
    tl.store(y + at + HALF, b * c[None, :] + a * s[None, :], inside)


def variants(capability: int) -> Iterator[Variant]:
    """Both directions in bf16, for the head sizes of the models."""
    pointers, strides = ("q", "k", "q_out", "k_out"), ("q_stride", "k_stride", "q_out_stride", "k_out_stride")
    signature = dict.fromkeys(pointers, f"*{TYPES[torch.bfloat16]}") | {"cos": "*fp32", "sin": "*fp32"}
    signature |= dict.fromkeys(("H", "G", *strides), "i32")
    for D in (64, 80, 128):
        for back in (False, True):
            constants = {"HALF": D // 2, "BLOCK_D": triton.next_power_of_2(D // 2), "HEADS": HEADS, "BACK": back}
            divisible = (*pointers, "cos", "sin", *strides)
            name = f"rope {'backward' if back else 'forward'} bf16 D{D}"
            yield Variant(name, _rope_kernel, signature, constants, 4, 1, divisible)
