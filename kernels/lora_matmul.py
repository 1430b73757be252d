"""A frozen linear with a low-rank addition: y = x wᵀ + bias + scale · (drop(x) aᵀ) bᵀ.

With low = drop(x) aᵀ and dlow = dy b, [T, R] both and small, forward and backward are the same three kernels:

    down      low = drop(x) aᵀ           dlow = dy b             once over x (over dy), for all that read the same x
    product   y = x wᵀ + bias + s low bᵀ  dx = dy w + s drop(dlow a)   once over w and once over the output
    outer     da = s dlowᵀ drop(x)       db = s dyᵀ low

The base is frozen, so there is no dw. Masks are drawn again wherever they are needed; nothing is stored. What is summed
by several programs is summed from partial results in a fixed order, so a run repeats itself bit by bit. Adapters that
are stacked are one adapter of the summed rank.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels import lora_hopper
from isheep_kernels.lang import tl, triton
from isheep_kernels.tiles import capability, tile_place
from isheep_kernels.variant import TYPES, Variant

FEW_ROWS = 64  # at most this many: w streams once past them, and low is computed on the way
FILL = 128  # programs that keep a chip busy
# With many rows and an inner size above this, cuBLAS makes x wᵀ and a pass over y adds the rest; below, one kernel does
# both. NOT MEASURED YET: predicted from what reading and writing y once more costs of a product, 2 F / (K · BW) or 8 %
# at K = 4096 on an H200, against the 12 % (sm_90; 7 % on sm_80) by which a plain Triton product may trail cuBLAS.
FUSED_UP_TO = {80: 4096, 90: 2816}


class Dropout(NamedTuple):
    """Element (t, k) is dropped with probability p: a draw named (key, tokens[t], k), wherever that token stands."""

    p: float
    key: int  # 0 … 2^63 - 1
    tokens: Tensor  # [T] int64, on the device of what is dropped


class Projection(NamedTuple):
    """One frozen linear layer and its adapter: w [N, K], bias [N], a [R, K], b [N, R]."""

    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    dropout: Dropout | None = None

    @property
    def survivors_scale(self) -> float:
        """`scale`, and the scaling up of what dropout leaves."""
        return self.scale if self.dropout is None else self.scale / (1 - self.dropout.p)


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


def lora_matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, dropout: Dropout | None = None
) -> Tensor:
    """`lora_matmul_ref` in Triton, with gradients of x, a and b."""
    return lora_matmuls(x, [Projection(w, bias, a, b, scale, dropout)])[0]


def lora_matmuls(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """`lora_matmul` of several projections (q, k and v; gate and up) that share x [T, K] and, undropped, its pass.

    x, w and bias in one of fp32, fp16 and bf16; a and b in that dtype or fp32, gradients in their own. -> [T, N] each.
    """
    for p in projections:
        _check(x, p)
    x = x if x.stride(1) == 1 else x.contiguous()
    adapters = [p.a for p in projections] + [p.b for p in projections]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *adapters)):
        return _Products.apply(x.detach(), projections, *_Lows.apply(x, projections, *adapters))
    if len(x) <= FEW_ROWS and all(p.dropout is None for p in projections):
        return tuple(_product(x, p.w, p.bias, p.a, p.b, p.scale) for p in projections)
    return _products(x, projections, _lows(x, projections))


def _check(x: Tensor, p: Projection) -> None:
    (T, K), (N, R) = x.shape, p.b.shape
    if p.w.shape != (N, K) or p.a.shape != (R, K) or (p.bias is not None and p.bias.shape != (N,)) or R > 256:
        shapes = (tuple(t.shape) for t in (x, p.w, p.a, p.b))
        raise ValueError("lora_matmul: x {}, w {}, a {}, b {}; the rank is at most 256".format(*shapes))
    if x.dtype not in TYPES or p.w.dtype != x.dtype or not {p.a.dtype, p.b.dtype} <= {x.dtype, torch.float32}:
        raise ValueError(f"lora_matmul: x {x.dtype}, w {p.w.dtype}, a {p.a.dtype}, b {p.b.dtype}")
    if p.dropout is not None and (p.dropout.tokens.shape != (T,) or p.dropout.tokens.dtype != torch.int64):
        raise ValueError(f"lora_matmul: {T} rows, tokens {tuple(p.dropout.tokens.shape)} {p.dropout.tokens.dtype}")


class _Lows(torch.autograd.Function):
    """drop(x) aᵀ of each projection, and a stand-in [T, N], without memory, for what is to be made of it.

    All that backward needs is kept here: x and the [T, R] products. The gradients of the stand-ins are those of the
    outputs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *adapters: Tensor) -> tuple[Tensor, ...]:
        lows = _lows(x, projections)
        ctx.projections = projections  # frozen weights, alive anyway
        ctx.save_for_backward(x, *lows, *adapters)
        ctx.mark_non_differentiable(*lows)
        ctx.set_materialize_grads(False)  # of the lows, which have none
        return *lows, *(x.new_empty(1, 1).expand(len(x), len(p.w)) for p in projections)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n = len(ctx.projections)
        x, *kept = ctx.saved_tensors
        dx, das, dbs = None, [], []
        for p, dy, low, a, b in zip(ctx.projections, grads[n:], kept[:n], kept[n : 2 * n], kept[2 * n :], strict=True):
            dy = dy.contiguous()
            dlow = _down(dy, b.t())
            das.append(_outer(dlow, x, p.survivors_scale, p.dropout).to(a.dtype))
            dbs.append(_outer(low, dy, p.survivors_scale).t().to(b.dtype))
            if ctx.needs_input_grad[0]:
                dx = _product(dy, p.w.t(), None, dlow, a.t(), p.survivors_scale, p.dropout, dx)
        return dx, None, *das, *dbs


class _Products(torch.autograd.Function):
    """The outputs, in place of their stand-ins. It keeps nothing that a checkpoint would have to compute again, so
    where these are a layer's last products, computing the layer again ends before them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projections: Sequence[Projection], *made: Tensor) -> tuple[Tensor, ...]:
        ctx.num_lows = len(projections)
        return _products(x, projections, made[: ctx.num_lows])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[None] * ctx.num_lows, *dys


def _lows(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """drop(x) aᵀ of each. Projections that drop nothing share one pass over x."""
    if all(p.dropout is None for p in projections) and len(projections) > 1:
        return list(_down(x, torch.cat([p.a for p in projections])).split([len(p.a) for p in projections], dim=-1))
    return [_down(x, p.a, p.dropout) for p in projections]


def _products(x: Tensor, projections: Sequence[Projection], lows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    pairs = zip(projections, lows, strict=True)
    return tuple(_product(x, p.w, p.bias, low, p.b, p.survivors_scale) for p, low in pairs)


# ---- launches --------------------------------------------------------------------------------------------------------


def _down(x: Tensor, a: Tensor, dropout: Dropout | None = None) -> Tensor:
    """drop(x) aᵀ of x [T, K], a [R, K] -> [S, T, R] fp32, to be summed over S: few rows are split along K."""
    (T, K), R = x.shape, len(a)
    launch = _down_launch(R)
    blocks = triton.cdiv(T, launch["BLOCK_M"])
    steps = triton.cdiv(K, launch["BLOCK_K"])
    per_split = triton.cdiv(steps, min(16, steps, max(1, FILL // max(1, blocks))))
    splits = triton.cdiv(steps, per_split)
    low = torch.empty(splits, T, R, dtype=torch.float32, device=x.device)
    chunk = per_split * launch["BLOCK_K"]
    _lora_down_kernel[(blocks, splits)](
        x, a, low, T, K, R, chunk, x.stride(0), a.stride(0), a.stride(1), **_draws(dropout), **launch
    )
    return low


def _outer(low: Tensor, x: Tensor, scale: float, dropout: Dropout | None = None) -> Tensor:
    """scale · lowᵀ drop(x) of low [S, T, R], x [T, K] -> [R, K] fp32."""
    (S, T, R), K = low.shape, x.shape[1]
    launch = _outer_launch(R)
    blocks, steps = triton.cdiv(K, launch["BLOCK_K"]), triton.cdiv(T, launch["BLOCK_T"])
    per_split = triton.cdiv(steps, min(16, steps, max(1, 2 * FILL // blocks)))
    splits = triton.cdiv(steps, per_split)
    out = torch.empty(splits, R, K, dtype=torch.float32, device=x.device)
    _lora_outer_kernel[(blocks, splits)](
        low, x, out, T, K, R, S, per_split * launch["BLOCK_T"], scale, *low.stride()[:2], x.stride(0),
        **_draws(dropout), **launch,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def _product(
    x: Tensor, w: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, scale: float,
    dropout: Dropout | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x wᵀ + bias + scale · drop(low bᵀ), added to y where there is one: [T, N].

    x [T, K], w [N, K] of any strides, b [N, R]; low [S, T, R] fp32 partial sums, or a [R, K], by which x is multiplied
    on the way.
    """
    (T, K), (N, R) = x.shape, b.shape
    shrink, add = low.dim() == 2, y is not None
    if shrink and triton.next_power_of_2(R) > 32:  # too wide to ride along
        low, shrink = _down(x, low), False
    if T > FEW_ROWS and dropout is None and lora_hopper.serves(x, w, R):
        return lora_hopper.product(x, w, bias, low, b, scale, y)
    if not _fused(T, K, capability(x)):
        y = F.linear(x, w, bias) if y is None else y.addmm_(x, w.t())
        K, bias, add = 0, None, True  # what is left for the kernel
    if y is None:
        y = torch.empty(T, N, dtype=x.dtype, device=x.device)
    launch = _product_launch(T, K, R, x.dtype, capability(x), masked=dropout is not None)
    grid = (triton.cdiv(T, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"]),)
    strides = x.stride(0), *w.stride(), low.stride(0), low.stride(1), *b.stride()
    flags = {"BIAS": bias is not None, "ADD": add, "SHRINK": shrink}
    splits = 1 if shrink else len(low)
    _lora_product_kernel[grid](
        x, w, bias, low, b, y, T, N, K, R, splits, scale, *strides, **flags, **_draws(dropout), **launch
    )
    return y


def _fused(rows: int, inner: int, chip: int) -> bool:
    return rows <= FEW_ROWS or inner <= FUSED_UP_TO[90 if chip >= 90 else 80]


def _draws(dropout: Dropout | None) -> dict[str, Any]:
    """How the kernels take a dropout: the 32-bit numbers as int32, so that no value of them compiles a kernel again."""
    if dropout is None:
        return {"tokens": None, "key_low": 0, "key_high": 0, "threshold": 0, "MASKED": False}
    signed = (n - (n >> 31 << 32) for n in (dropout.key & 0xFFFFFFFF, dropout.key >> 32, round(dropout.p * 2**32)))
    numbers = dict(zip(("key_low", "key_high", "threshold"), signed, strict=True))
    return {"tokens": dropout.tokens.contiguous(), **numbers, "MASKED": True}


def _padded(R: int) -> int:
    """The smallest power of two that holds R ranks and that tensor cores take."""
    return max(16, triton.next_power_of_2(R))


def _down_launch(R: int) -> dict[str, int]:
    block_r = _padded(R)
    block_k = min(128, 4096 // block_r)
    return {"BLOCK_M": 32, "BLOCK_K": block_k, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 3}


def _outer_launch(R: int) -> dict[str, int]:
    block_r = _padded(R)
    return {"BLOCK_T": 64, "BLOCK_K": 128 if block_r <= 64 else 64, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 3}


def _product_launch(T: int, K: int, R: int, dtype: torch.dtype, chip: int, masked: bool) -> dict[str, Any]:
    if dtype == torch.float32:  # exact products, without tensor cores: for checks, not for speed
        m, n, k, warps, stages = 64, 64, 32, 4, 2
    elif T <= FEW_ROWS:
        m, n, k, warps, stages = max(16, triton.next_power_of_2(T)), 32, 128, 4, 4
    elif chip >= 90 and not masked:  # what is masked is a second tile in registers
        m, n, k, warps, stages = 128, 256, 64, 8, 3
    else:
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": _padded(R), "EVEN_K": K % k == 0}
    return tile | {"num_warps": warps, "num_stages": stages}


# ---- kernels ---------------------------------------------------------------------------------------------------------

DRAWS = "key_low", "key_high", "threshold"  # numbers that no kernel is compiled anew for; nor for how many rows


@triton.jit
def _mix32(x):
    """`_mix` of uint32 numbers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(tokens, rows, num_rows, columns, key_low, key_high, threshold):
    """`dropout_mask` of these rows and columns: the same bits."""
    names = tl.load(tokens + rows, rows < num_rows, other=0)
    high, low = (names >> 32).to(tl.uint32), names.to(tl.uint32)
    keys = _mix32(key_low.to(tl.uint32) + high * 0x9E3779B9)
    keys = _mix32(low ^ _mix32(key_high.to(tl.uint32) ^ keys))
    return _mix32(keys[:, None] ^ columns.to(tl.uint32)[None, :]) >= threshold.to(tl.uint32)


@triton.jit
def _low_tile(low, rows, num_rows, R, splits, split_stride, row_stride, BLOCK_R: tl.constexpr):
    """Rows of low [splits, num_rows, R], summed over the splits: [rows, BLOCK_R] fp32, zeros past its edges."""
    r = tl.arange(0, BLOCK_R)
    at = rows[:, None] * row_stride + r[None, :]
    inside = (rows < num_rows)[:, None] & (r < R)[None, :]
    total = tl.load(low + at, inside, other=0.0)
    for split in range(1, splits):
        total += tl.load(low + split * split_stride + at, inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["T", *DRAWS])
def _lora_down_kernel(
    x, a, low, T, K, R, chunk, x_stride, a_stride_r, a_stride_k, tokens, key_low, key_high, threshold,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (i, s): BLOCK_M rows of low[s] = drop(x) aᵀ over columns s · chunk … of x."""
    rows, r = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, tl.minimum(first + chunk, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        seen = tl.load(x + rows[:, None] * x_stride + k[None, :], (rows < T)[:, None] & (k < K)[None, :], other=0.0)
        if MASKED:
            seen = tl.where(_kept(tokens, rows, T, k, key_low, key_high, threshold), seen, 0.0)
        at = k[:, None] * a_stride_k + r[None, :] * a_stride_r
        down = tl.load(a + at, (k < K)[:, None] & (r < R)[None, :], other=0.0)
        total = tl.dot(seen, down.to(seen.dtype), total, input_precision="ieee")
    inside = (rows < T)[:, None] & (r < R)[None, :]
    tl.store(low + (split * T + rows)[:, None] * R + r[None, :], total, inside)


@triton.jit(do_not_specialize=["T", "low_stride_s", *DRAWS])
def _lora_outer_kernel(
    low, x, out, T, K, R, splits, chunk, scale, low_stride_s, low_stride_t, x_stride,
    tokens, key_low, key_high, threshold,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (j, s): BLOCK_K columns of out[s] = scale · lowᵀ drop(x) over rows s · chunk … of both."""
    k, r = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)
    first = split * chunk
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(first, tl.minimum(first + chunk, T), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        seen = tl.load(x + rows[:, None] * x_stride + k[None, :], (rows < T)[:, None] & (k < K)[None, :], other=0.0)
        if MASKED:
            seen = tl.where(_kept(tokens, rows, T, k, key_low, key_high, threshold), seen, 0.0)
        part = _low_tile(low, rows, T, R, splits, low_stride_s, low_stride_t, BLOCK_R)
        total = tl.dot(tl.trans(part.to(seen.dtype)), seen, total, input_precision="ieee")
    at = (split * R + r)[:, None] * K + k[None, :]
    tl.store(out + at, total * scale, (r < R)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["T", "low_stride_0", *DRAWS])
def _lora_product_kernel(
    x, w, bias, low, b, y, T, N, K, R, splits, scale,
    x_stride, w_stride_n, w_stride_k, low_stride_0, low_stride_1, b_stride_n, b_stride_r,
    tokens, key_low, key_high, threshold,
    BIAS: tl.constexpr, ADD: tl.constexpr, SHRINK: tl.constexpr, MASKED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y [T, N] = x wᵀ + bias + scale · drop(low bᵀ); with ADD, on top of what is there.

    With SHRINK `low` is a [R, K], and its product with x is summed beside that with w.
    """
    i, j = tile_place(tl.program_id(0), T, N, BLOCK_M, BLOCK_N)
    rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    has_row, has_column, has_rank = (rows < T)[:, None], (columns < N)[None, :], (r < R)[None, :]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    shrunk = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        x_at, w_at = rows[:, None] * x_stride + k[None, :], k[:, None] * w_stride_k + columns[None, :] * w_stride_n
        a_at = r[None, :] * low_stride_0 + k[:, None] * low_stride_1
        if EVEN_K:
            seen, weight = tl.load(x + x_at, has_row, other=0.0), tl.load(w + w_at, has_column, other=0.0)
        else:
            seen = tl.load(x + x_at, has_row & (k < K)[None, :], other=0.0)
            weight = tl.load(w + w_at, has_column & (k < K)[:, None], other=0.0)
        total = tl.dot(seen, weight, total, input_precision="ieee")
        if SHRINK:
            a = tl.load(low + a_at, has_rank & (k < K)[:, None], other=0.0)
            shrunk = tl.dot(seen, a.to(seen.dtype), shrunk, input_precision="ieee")
    if not SHRINK:
        shrunk = _low_tile(low, rows, T, R, splits, low_stride_0, low_stride_1, BLOCK_R)

    up = tl.load(b + columns[None, :] * b_stride_n + r[:, None] * b_stride_r, (r < R)[:, None] & has_column, other=0.0)
    dtype = x.dtype.element_ty
    if MASKED:
        delta = tl.dot((shrunk * scale).to(dtype), up.to(dtype), input_precision="ieee")
        total += tl.where(_kept(tokens, rows, T, columns, key_low, key_high, threshold), delta, 0.0)
    else:
        total = tl.dot((shrunk * scale).to(dtype), up.to(dtype), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    y_at = rows[:, None] * N + columns[None, :]
    if ADD:
        total += tl.load(y + y_at, has_row & has_column, other=0.0).to(tl.float32)
    tl.store(y + y_at, total, has_row & has_column)


def variants(capability: int) -> Iterator[Variant]:
    """bf16 layers, rank 16: training fp32 adapters with and without dropout, and a few rows by bf16 copies of them."""
    types = dict.fromkeys(("x", "w", "bias", "y"), f"*{TYPES[torch.bfloat16]}")
    types |= {"low": "*fp32", "out": "*fp32"} | {"scale": "fp32", "tokens": "*i64"}
    multiples = ("K", "N", "R", "chunk", "x_stride", "low_stride_s", "low_stride_t", "low_stride_0", "low_stride_1")
    multiples += ("w_stride_n", "w_stride_k", "b_stride_n", "b_stride_r", "a_stride_r", "a_stride_k")

    def variant(name: str, kernel: Any, launch: dict[str, Any], adapter: str = "*fp32", **constants: Any) -> Variant:
        constants = launch | ({} if constants.get("MASKED") else {"tokens": None, "MASKED": False}) | constants
        kinds = dict.fromkeys(kernel.arg_names, "i32") | types | dict.fromkeys(("a", "b"), adapter)
        if constants.get("SHRINK"):
            kinds["low"] = adapter
        made = Variant.of(f"lora_{name} bf16", kernel, kinds, constants)
        integers = tuple(n for n in multiples if made.signature.get(n) == "i32")
        return made._replace(divisible_by_16=made.divisible_by_16 + integers)

    for masked in (False, True):
        name, flags = "with dropout" if masked else "forward", {"MASKED": masked}
        yield variant(f"down {name}", _lora_down_kernel, _down_launch(16), a_stride_k=1, **flags)
        yield variant(f"outer {name}", _lora_outer_kernel, _outer_launch(16), splits=1, **flags)
    yield variant("down backward", _lora_down_kernel, _down_launch(16), a_stride_r=1)

    tile = partial(_product_launch, K=4096, R=16, dtype=torch.bfloat16, chip=capability)
    forward = {"w_stride_k": 1, "b_stride_r": 1, "ADD": False}
    for T, where in ((8192, "many rows"), (16, "16 rows"), (32, "32 rows"), (64, "64 rows")):
        low = {"SHRINK": False, "splits": 1}
        if T <= FEW_ROWS:
            low = {"SHRINK": True, "low_stride_1": 1, "adapter": types["x"]}
        for bias in ({"BIAS": True}, {"BIAS": False, "bias": None}):
            name = f"product {where}{' bias' if bias['BIAS'] else ''}"
            yield variant(name, _lora_product_kernel, tile(T, masked=False), **forward | low | bias)
    backward = {"w_stride_n": 1, "b_stride_n": 1, "bias": None, "BIAS": False, "SHRINK": False, "splits": 1}
    for masked, add in ((False, False), (True, False), (True, True)):
        name = f"product backward{' with dropout' if masked else ''}{' added' if add else ''}"
        flags = backward | {"MASKED": masked, "ADD": add}
        yield variant(name, _lora_product_kernel, tile(8192, masked=masked), **flags)
