"""Causal attention over packed sequences: block-diagonal by cu_seqlens, grouped queries.

Within a sequence, for query head h and its key/value head h // (H / G):

    y_i = Σ_j≤i p_ij v_j,    p_ij = exp(scale · q_i·k_j − lse_i)

Forward keeps y and lse. Backward computes p again, and with δ_i = dy_i·y_i and ds_ij = p_ij (dy_i·v_j − δ_i)

    dv_j = Σ_i p_ij dy_i,    dk_j = scale · Σ_i ds_ij q_i,    dq_i = scale · Σ_j ds_ij k_j

One program computes a tile: some queries of one head, or for dk and dv some keys. Which sequence a tile belongs to is
found on the device from cu_seqlens: no launch waits for lengths, none is compiled in. Softmax counts in base 2.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels import attention_hopper, attention_hopper_backward
from isheep_kernels.lang import tl, triton
from isheep_kernels.tiles import LOG2E, capability, find_tile, num_tiles
from isheep_kernels.variant import TYPES, Variant


def attention_packed_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float) -> Tensor:
    """q [T, H, D], k and v [T, G, D] -> [T, H, D]. Tokens cu_seqlens[i] .. cu_seqlens[i+1] are sequence i."""
    out = []
    for start, end in pairwise(cu_seqlens):
        qs, ks, vs = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, enable_gqa=True)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def attention_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, deterministic: bool = False
) -> Tensor:
    """`attention_packed_ref` in Triton, with gradients of q, k and v.

    q [T, H, D], k and v [T, G, D] in fp32, fp16 or bf16, D at most 256, H a multiple of G; cu_seqlens [S + 1] int32 on
    their device, from 0 to T; scale > 0 -> y [T, H, D]. Products of the inputs' dtype are summed in fp32.
    On Hopper, where asked for (choice.py), attention_hopper.py computes it and, at D = 128, its backward's.
    Backward adds up dq by atomics in one sweep of five matmuls, so its last bits change from run to run;
    `deterministic` gives dq a sweep of its own, seven matmuls in all. ValueError where shapes or dtypes do not fit.
    """
    (T, H, D), G = q.shape, k.shape[1]
    if k.shape != (T, G, D) or v.shape != k.shape or H % G or D > 256:
        raise ValueError(f"attention_packed: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"attention_packed: dtypes {q.dtype}, {k.dtype}, {v.dtype}, cu_seqlens {cu_seqlens.dtype}")
    return _AttentionPacked.apply(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, scale, deterministic)


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, deterministic: bool) -> Tensor:
        forward = attention_hopper.forward if attention_hopper.serves(q, k, v) else _forward
        y, lse = forward(q, k, v, cu, scale)
        ctx.save_for_backward(q, k, v, y, lse, cu)
        ctx.scale, ctx.deterministic = scale, deterministic
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, cu = ctx.saved_tensors
        (T, H, D), G, dy, delta = q.shape, k.shape[1], grads[0].contiguous(), torch.empty_like(lse)
        _attention_packed_delta_kernel[(triton.cdiv(T, DELTA_ROWS), H)](y, dy, delta, T, **_delta_constants(D))
        inputs = q, k, v, dy, lse, delta
        dq = None if ctx.deterministic else torch.zeros_like(q, dtype=torch.float32)
        on_hopper = attention_hopper_backward.serves(q, k, v, dy)
        backward = attention_hopper_backward.backward if on_hopper else _backward
        dk, dv = backward(*inputs, cu, ctx.scale, dq)
        if dq is None:
            tile, dq = dq_tile(D, q.dtype, capability(q)), torch.empty_like(q)
            _attention_packed_dq_kernel[(num_tiles(T, cu, tile.m), H)](
                *inputs, dq, cu, T, len(cu) - 1, ctx.scale, **_constants(D, H // G, tile)
            )
        return dq.to(q.dtype), dk, dv, None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [T, H, D] and lse [H, T] fp32, divided by scale."""
    (T, H, D), y = q.shape, torch.empty_like(q)
    lse, tile = q.new_empty(H, T, dtype=torch.float32), forward_tile(D, q.dtype, capability(q))
    _attention_packed_kernel[(num_tiles(T, cu, tile.m), H)](
        q, k, v, y, lse, cu, T, len(cu) - 1, scale, **_constants(D, H // k.shape[1], tile)
    )
    return y, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor, cu: Tensor, scale: float, dq: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dk and dv [T, G, D] from dy, forward's lse, and delta [H, T] = Σ_d dy y; dq [T, H, D] fp32, if any, added to."""
    (T, H, D), G, dk, dv = q.shape, k.shape[1], torch.empty_like(k), torch.empty_like(v)
    tile = backward_tile(D, q.dtype, capability(q))
    _attention_packed_dkdv_kernel[(num_tiles(T, cu, tile.n), G)](
        q, k, v, dy, lse, delta, dq, dk, dv, cu, T, len(cu) - 1, scale,
        **_constants(D, H // G, tile), ADD_DQ=dq is not None,
    )  # fmt: skip
    return dk, dv


# ---- what a launch fixes ---------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """m queries by n keys at a time, on num_warps warps, with num_stages tiles of keys (or queries) in flight."""

    m: int
    n: int
    num_warps: int
    num_stages: int


EXACT = Tile(32, 32, 4, 1)  # fp32 products without tensor cores: for checks, not for speed
DELTA_ROWS = 32


def forward_tile(head_dim: int, dtype: torch.dtype, capability: int) -> Tile:
    if dtype == torch.float32:
        return EXACT
    if head_dim > 128:
        return Tile(128, 32, 8, 2) if capability >= 90 else Tile(64, 32, 8, 2)
    if capability >= 90:
        return Tile(128, 64 if 64 < head_dim < 128 else 128, 8, 3 if head_dim <= 64 else 2)
    return Tile(64, 64, 4, 3 if head_dim <= 64 else 2)


def backward_tile(head_dim: int, dtype: torch.dtype, capability: int) -> Tile:
    """Of the sweep over keys."""
    if dtype == torch.float32:
        return EXACT
    if head_dim > 128:
        return Tile(32, 32, 8, 2 if capability >= 90 else 1)
    if capability >= 90:
        return Tile(32 if head_dim > 64 else 64, 128, 8, 3)
    return Tile(64 if head_dim > 64 else 32, 64, 8, 2)


def dq_tile(head_dim: int, dtype: torch.dtype, capability: int) -> Tile:
    if dtype == torch.float32:
        return EXACT
    if head_dim > 128:
        return Tile(128, 32, 8, 1) if capability >= 90 else Tile(64, 32, 8, 1)
    return Tile(128, 64, 8, 2) if capability >= 90 else Tile(64, 64, 8, 2)


def _constants(head_dim: int, group: int, tile: Tile) -> dict[str, int]:
    """Of every kernel but delta's: the group size, the head size, and the tile."""
    sizes = {"GROUP": group, "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    return sizes | {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _delta_constants(head_dim: int) -> dict[str, int]:
    sizes = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_M": DELTA_ROWS}
    return sizes | {"num_warps": 4, "num_stages": 1}


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _addresses(ptr, row, heads, head, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of head `head` in rows row .. row + ROWS of a [*, heads, D] tensor: [ROWS, BLOCK_D]."""
    first = ptr + (row.to(tl.int64) * heads + head) * D
    return first + tl.arange(0, ROWS)[:, None] * (heads * D) + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _within(rows_left, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] true in the first `rows_left` rows and the first D columns."""
    return (tl.arange(0, ROWS)[:, None] < rows_left) & (tl.arange(0, BLOCK_D)[None, :] < D)


@triton.jit
def _load(
    ptr, start, row, length, heads, head, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows row .. row + ROWS of the sequence that begins at token `start`: [ROWS, BLOCK_D], zeros past its length.

    WHOLE: all of them are within it, which saves the registers of a mask.
    """
    within = tl.arange(0, BLOCK_D)[None, :] < D if WHOLE else _within(length - row, D, ROWS, BLOCK_D)
    return tl.load(_addresses(ptr, start + row, heads, head, D, ROWS, BLOCK_D), within, 0.0)


@triton.jit
def _store(ptr, x, start, row, length, heads, head, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The way back of `_load`, in the tensor's own dtype."""
    within = _within(length - row, D, ROWS, BLOCK_D)
    tl.store(_addresses(ptr, start + row, heads, head, D, ROWS, BLOCK_D), x.to(ptr.dtype.element_ty), within)


@triton.jit
def matmul(a, b, c=None):
    """a [M, K] b [K, N] (+ c [M, N]) in fp32, in exact products; a single row takes no tensor core."""
    if a.shape[0] == 1:
        row = tl.sum(a.T.to(tl.float32) * b.to(tl.float32), 0)[None, :]
        return row if c is None else row + c
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def attend(s, v, y, total, peak, scale):
    """One block of keys more: scores s [M, N] (not yet scaled) and v [N, D] into y, total and peak [M]."""
    higher = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(peak - higher)
    y = matmul(p.to(v.dtype), v, y * shrink[:, None])
    return y, total * shrink + tl.sum(p, 1), higher


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _attention_packed_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, cu_ptr, num_tokens, num_seqs, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [T, H, D] of BLOCK_M queries of one head, and lse [H, T] / scale. Grid: tiles, H; a sequence's last first."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    kv, kv_heads = head // GROUP, heads // GROUP
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tl.program_id(0), BLOCK_M)
    m = (tl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M
    if m < 0:
        return
    rows, scale = m + tl.arange(0, BLOCK_M), scale * LOG2E
    q = _load(q_ptr, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, m, BLOCK_N):  # keys that all these queries see
        k = _load(k_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D, WHOLE=True)
        v = _load(v_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D, WHOLE=True)
        y, total, peak = attend(matmul(q, k.T), v, y, total, peak, scale)
    for n in range(m, tl.minimum(m + BLOCK_M, length), BLOCK_N):  # the diagonal
        k = _load(k_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)
        seen = rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :]
        s = tl.where(seen, matmul(q, k.T), float("-inf"))
        y, total, peak = attend(s, v, y, total, peak, scale)
    _store(y_ptr, y / total[:, None], start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
    lse_ptr += num_tokens.to(tl.int64) * head + start
    tl.store(lse_ptr + rows, (peak + tl.log2(total)) / scale, rows < length)


@triton.jit(do_not_specialize=["num_tokens"])
def _attention_packed_delta_kernel(
    y_ptr, dy_ptr, delta_ptr, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta [H, T] = Σ_d dy y. Grid: blocks of BLOCK_M tokens, H."""
    head, heads, m = tl.program_id(1), tl.num_programs(1), tl.program_id(0) * BLOCK_M
    y = _load(y_ptr, 0, m, num_tokens, heads, head, D, BLOCK_M, BLOCK_D).to(tl.float32)
    dy = _load(dy_ptr, 0, m, num_tokens, heads, head, D, BLOCK_M, BLOCK_D).to(tl.float32)
    rows = m + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + num_tokens.to(tl.int64) * head + rows, tl.sum(y * dy, 1), rows < num_tokens)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _attention_packed_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, cu_ptr, num_tokens, num_seqs, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ADD_DQ: tl.constexpr,
):  # fmt: skip
    """dk, dv [T, G, D] of BLOCK_N keys of one key/value head; ADD_DQ: dq [T, H, D] fp32 += theirs. Grid: tiles, G."""
    kv, kv_heads = tl.program_id(1), tl.num_programs(1)
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tl.program_id(0), BLOCK_N)
    n, heads = tile * BLOCK_N, kv_heads * GROUP
    if n >= length:
        return
    keys = n + tl.arange(0, BLOCK_N)
    k = _load(k_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)
    v = _load(v_ptr, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for head in range(kv * GROUP, (kv + 1) * GROUP):
        for m in range(n, length, BLOCK_M):  # queries that see some of these keys
            rows = m + tl.arange(0, BLOCK_M)
            q = _load(q_ptr, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
            dy = _load(dy_ptr, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
            first = num_tokens.to(tl.int64) * head + start
            lse = tl.load(lse_ptr + first + rows, rows < length, 0.0)  # rows past the end: dy = 0, so they add nothing
            delta = tl.load(delta_ptr + first + rows, rows < length, 0.0)
            # Products that start from -delta and -lse leave those in no registers of their own.
            dp = matmul(v, dy.T, tl.broadcast_to(-delta[None, :], [BLOCK_N, BLOCK_M]))
            s = matmul(k, q.T, tl.broadcast_to(-lse[None, :], [BLOCK_N, BLOCK_M]))
            p = tl.exp2(s * (scale * LOG2E))
            if m < n + BLOCK_N:  # the diagonal; a branch, since a loop of its own would spill registers
                p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
            dv = matmul(p.to(q.dtype), dy, dv)
            ds = (p * dp).to(q.dtype)
            dk = matmul(ds, q, dk)
            if ADD_DQ:  # the way round in which Hopper's tensor cores get their 64 rows
                dq = matmul(ds.T, k) if BLOCK_M >= BLOCK_N else matmul(k.T, ds).T
                addresses = _addresses(dq_ptr, start + m, heads, head, D, BLOCK_M, BLOCK_D)
                tl.atomic_add(addresses, dq * scale, _within(length - m, D, BLOCK_M, BLOCK_D), sem="relaxed")
    _store(dk_ptr, dk * scale, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)
    _store(dv_ptr, dv, start, n, length, kv_heads, kv, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"])
def _attention_packed_dq_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, lse_ptr, delta_ptr, dq_ptr, cu_ptr, num_tokens, num_seqs, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D] of BLOCK_M queries of one head. Grid: tiles, H."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tl.program_id(0), BLOCK_M)
    m = (tl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M
    if m < 0:
        return
    rows = m + tl.arange(0, BLOCK_M)
    q = _load(q_ptr, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
    dy = _load(dy_ptr, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)
    first = num_tokens.to(tl.int64) * head + start
    lse = tl.load(lse_ptr + first + rows, rows < length, 0.0)
    delta = tl.load(delta_ptr + first + rows, rows < length, 0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, tl.minimum(m + BLOCK_M, length), BLOCK_N):
        k = _load(k_ptr, start, n, length, heads // GROUP, head // GROUP, D, BLOCK_N, BLOCK_D)
        v = _load(v_ptr, start, n, length, heads // GROUP, head // GROUP, D, BLOCK_N, BLOCK_D)
        p = tl.exp2((matmul(q, k.T) - lse[:, None]) * (scale * LOG2E))
        if n >= m:  # the diagonal
            p = tl.where(rows[:, None] >= n + tl.arange(0, BLOCK_N)[None, :], p, 0.0)
        ds = p * (matmul(dy, v.T) - delta[:, None])
        dq = matmul(ds.to(k.dtype), k, dq)
    _store(dq_ptr, dq * scale, start, m, length, heads, head, D, BLOCK_M, BLOCK_D)


# ---- compiled ahead of time ------------------------------------------------------------------------------------------


def variants(capability: int) -> Iterator[Variant]:
    """What runs launch in bf16: (head size, group) of Qwen1.5 and Llama, small and large, and of other head sizes."""
    half = "*" + TYPES[torch.bfloat16]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr", "dy_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), half)
    types |= {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "cu_ptr": "*i32", "scale": "fp32"}
    types |= {"num_tokens": "i32", "num_seqs": "i32"}
    one_sweep = types | {"dq_ptr": "*fp32"}
    for head_dim, group in ((128, 1), (128, 8), (64, 1), (64, 3), (80, 1), (96, 1), (256, 1)):
        forward, backward, dq = (
            _constants(head_dim, group, tile(head_dim, torch.bfloat16, capability))
            for tile in (forward_tile, backward_tile, dq_tile)
        )
        for what, kernel, of, launch in (
            ("forward", _attention_packed_kernel, types, forward),
            ("delta", _attention_packed_delta_kernel, types, _delta_constants(head_dim)),
            ("dkdv + dq", _attention_packed_dkdv_kernel, one_sweep, backward | {"ADD_DQ": True}),
            ("dkdv", _attention_packed_dkdv_kernel, types, backward | {"ADD_DQ": False, "dq_ptr": None}),
            ("dq", _attention_packed_dq_kernel, types, dq),
        ):
            yield Variant.of(f"attention_packed {what} bf16 D{head_dim} group {group}", kernel, of, launch)
