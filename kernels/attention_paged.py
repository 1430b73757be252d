"""Causal attention over a paged key/value cache: decode, chunked prefill, and both in one batch.

Position p of a sequence lies in block block_table[p // BS] at offset p % BS. One program takes some queries of one
sequence with all the heads that share a key/value head, as the rows of one matrix: each key is read once for all of
them, in tiles of its own size whatever BS is. Few programs for a long context? Then its keys are split among several,
whose results a second kernel joins.
"""

import math
from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from isheep_kernels.attention_packed import Tile, attend, matmul
from isheep_kernels.lang import tl, triton
from isheep_kernels.rope import _turn_heads, rope_ref
from isheep_kernels.tiles import LOG2E, capability, find_tile, num_tiles
from isheep_kernels.variant import TYPES, Variant

UNSEEN = tl.constexpr(-1e30)  # finite: where a query sees no key of a split, its softmax is nonsense of weight zero


def write_kv_ref(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put k, v [T, G, D] into the slots [T] (block · block_size + offset) of caches [NB, BS, G, D], in place."""
    k_cache.view(-1, *k.shape[1:])[slots] = k
    v_cache.view(-1, *v.shape[1:])[slots] = v


def write_kv_rope_ref(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Turn q [T, H, D] and k [T, G, D] by cos, sin [T, D/2], write k and v as `write_kv_ref`; -> q turned."""
    write_kv_ref(rope_ref(k, cos, sin), v, slots, k_cache, v_cache)
    return rope_ref(q, cos, sin)


def write_kv_rope(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """`write_kv_rope_ref` in Triton, in one launch.

    q [T, H, D], k and v [T, G, D] and the contiguous caches [NB, BS, G, D] in one of fp32, fp16, bf16; cos and sin
    [T, D/2] fp32; slots [T] int64, no two alike -> q turned, a new tensor. No gradient: it is for sampling.
    """
    (T, H, D), G = q.shape, k.shape[1]
    if k.shape != (T, G, D) or v.shape != k.shape or cos.shape != (T, D // 2) or sin.shape != cos.shape or D % 2:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, cos, sin))
        raise ValueError(f"write_kv_rope: q, k, v, cos, sin are {shapes}")
    _check_cache(q, k_cache, v_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if T:
        inputs = (x.contiguous() for x in (q, k, v, cos, sin))
        grid = (T, triton.cdiv(max(H, G), HEADS))
        _write_kv_rope_kernel[grid](*inputs, slots, out, k_cache, v_cache, H, G, **_write_constants(D))
    return out


def attention_paged_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """q [T, H, D] over caches [NB, BS, G, D] -> [T, H, D].

    Sequence s owns tokens cu_seqlens[s] .. cu_seqlens[s+1] of q, the last ones of its context_lens[s] cached positions;
    position p lies in block block_tables[s, p // BS] at offset p % BS. int32 all.
    """
    out = torch.empty_like(q)
    block_size = k_cache.shape[1]
    starts, lens = cu_seqlens.tolist(), context_lens.tolist()
    for s, length in enumerate(lens):
        start, end = starts[s], starts[s + 1]
        blocks = block_tables[s, : -(-length // block_size)].long()
        k, v = (cache[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (k_cache, v_cache))
        last = torch.arange(length - (end - start), length, device=q.device)  # the last key each query sees
        mask = torch.arange(length, device=q.device) <= last[:, None]
        y = F.scaled_dot_product_attention(q[start:end].transpose(0, 1)[None], k, v, mask, scale=scale, enable_gqa=True)
        out[start:end] = y[0].transpose(0, 1)
    return out


def attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    max_query_len: int,
    max_context_len: int,
    scale: float,
    num_splits: int | None = None,
) -> Tensor:
    """`attention_paged_ref` in Triton, for sampling: no gradient.

    q [T, H, D] and the contiguous caches [NB, BS, G, D] in one of fp32, fp16, bf16, D at most 256, H a multiple of G;
    cu_seqlens [S + 1], context_lens [S] and block_tables [S, max_blocks] int32 on their device; scale > 0
    -> [T, H, D]. The two maxima are what the host knows anyway: a longest query of 1 picks the kernel for decoding, the
    longest context the splits. `num_splits` overrides `choose_splits`. ValueError where shapes or dtypes do not fit.
    """
    (T, H, D), G, S = q.shape, k_cache.shape[2], len(context_lens)
    _check_cache(q, k_cache, v_cache)
    if H % G or D > 256 or len(block_tables) != S or len(cu_seqlens) != S + 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, cu_seqlens, context_lens, block_tables))
        raise ValueError(f"attention_paged: q, k_cache, cu_seqlens, context_lens, block_tables are {shapes}")
    if any(x.dtype != torch.int32 for x in (cu_seqlens, context_lens, block_tables)):
        raise ValueError("attention_paged: cu_seqlens, context_lens and block_tables are int32")
    decode = max_query_len == 1
    tile = paged_tile(D, H // G, q.dtype, decode, capability(q))
    tiles = S if decode else num_tiles(T, cu_seqlens, tile.m // (H // G))
    splits = num_splits or choose_splits(tiles * G, max_context_len, resident_programs(q))
    assert splits <= MAX_SPLITS
    constants = _constants(D, H // G, k_cache.shape[1], decode, splits > 1, tile)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = y if splits == 1 else q.new_empty(splits, T, H, D, dtype=torch.float32)
    lse = None if splits == 1 else q.new_empty(splits, T, H, dtype=torch.float32)
    lengths = (cu_seqlens, context_lens, block_tables.contiguous(), S, block_tables.shape[1], T)
    _attention_paged_kernel[(tiles, G, splits)](
        q.contiguous(), k_cache, v_cache, part, lse, *lengths, scale, **constants
    )
    if splits > 1:
        _attention_paged_join_kernel[(T * H,)](part, lse, y, T * H, splits, **_join_constants(D))
    return y


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != q.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}")
    if q.dtype not in TYPES or k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise ValueError(f"dtypes: q {q.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}")
    assert k_cache.is_contiguous() and v_cache.is_contiguous()


# ---- what a launch fixes ---------------------------------------------------------------------------------------------

HEADS = 16  # heads a program of write_kv_rope takes
MAX_SPLITS = 32
MIN_SPLIT = 256  # keys: a shorter split costs more than it spreads


def choose_splits(programs: int, max_context_len: int, slots: int) -> int:
    """Among how many programs the keys of each one are split, where `slots` of them run at a time.

    1 where the programs nearly fill the chip. Else the fewest that fill its waves to 85 % of the best that can be done.
    """
    most = min(MAX_SPLITS, triton.cdiv(max_context_len, MIN_SPLIT))
    if most <= 1 or programs >= 0.8 * slots:
        return 1
    waves = [programs * n / slots for n in range(1, most + 1)]
    filled = [wave / math.ceil(wave) for wave in waves]
    return 1 + next(i for i, share in enumerate(filled) if share >= 0.85 * max(filled))


def resident_programs(x: Tensor) -> int:
    """Programs that run at a time: two a multiprocessor. In the interpreter, one."""
    return _gpu_programs(x.device) if x.is_cuda else 1


@cache
def _gpu_programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def paged_tile(head_dim: int, group: int, dtype: torch.dtype, decode: bool, capability: int) -> Tile:
    """Rows are queries times the heads of a group. A lone row, of a decoding head without a group, needs no padding."""
    heads = triton.next_power_of_2(group)
    m = max(64, heads) if not decode else 1 if group == 1 else max(16, heads)
    if dtype == torch.float32:  # without tensor cores, for checks
        return Tile(max(heads, min(m, 32)), 64, 4, 1)
    if decode:
        wide = head_dim > 64 and m == 1  # no tensor core: keys and values in registers, of twice as many threads
        return Tile(m, 128 if head_dim <= 128 else 64, 8 if wide else 4, 2)
    if head_dim > 128:
        return Tile(m, 32, 8, 2)
    return Tile(m, 64, 4, 2) if head_dim <= 64 or capability >= 90 else Tile(m, 32, 4, 3)


def _constants(head_dim: int, group: int, block_size: int, decode: bool, split: bool, tile: Tile) -> dict[str, int]:
    sizes = {"GROUP": group, "D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_SIZE": block_size}
    sizes |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "DECODE": decode, "SPLIT": split}
    return sizes | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _join_constants(head_dim: int) -> dict[str, int]:
    sizes = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_S": MAX_SPLITS}
    return sizes | {"num_warps": 4, "num_stages": 1}


def _write_constants(head_dim: int) -> dict[str, int]:
    sizes = {"HALF": head_dim // 2, "BLOCK_D": triton.next_power_of_2(head_dim // 2), "HEADS": HEADS}
    return sizes | {"num_warps": 4, "num_stages": 1}


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads"])
def _write_kv_rope_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, out_ptr, k_cache_ptr, v_cache_ptr, num_heads, num_kv_heads,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of q, k and v of one token. Grid: T, blocks of HEADS."""
    D: tl.constexpr = 2 * HALF
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    cos, sin = cos_ptr + token * HALF, sin_ptr + token * HALF
    q_row, k_row, cache_row = (
        token * num_heads * D, token * num_kv_heads * D, tl.load(slots_ptr + token) * num_kv_heads * D,
    )  # fmt: skip
    _turn_heads(q_ptr + q_row, out_ptr + q_row, cos, sin, first, num_heads, HALF, BLOCK_D, HEADS, False)
    _turn_heads(k_ptr + k_row, k_cache_ptr + cache_row, cos, sin, first, num_kv_heads, HALF, BLOCK_D, HEADS, False)
    heads, dims = first + tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * BLOCK_D)[None, :]
    at, inside = heads * D + dims, (heads < num_kv_heads) & (dims < D)
    tl.store(v_cache_ptr + cache_row + at, tl.load(v_ptr + k_row + at, inside), inside)


@triton.jit
def _slots_of(table_ptr, n, end, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where positions n .. n + BLOCK_N lie: slots [BLOCK_N] int64, and which of them come before `end`."""
    position = n + tl.arange(0, BLOCK_N)
    block = tl.load(table_ptr + position // BLOCK_SIZE, position < end, 0)
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE, position < end


@triton.jit
def _gather(cache_ptr, slots, inside, kv_heads, kv, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Head kv of slots [N] of a cache: [N, BLOCK_D], zeros where not inside."""
    rows, dims = cache_ptr + (slots * kv_heads + kv) * D, tl.arange(0, BLOCK_D)
    return tl.load(rows[:, None] + dims[None, :], inside[:, None] & (dims < D)[None, :], 0.0)


@triton.jit(do_not_specialize=["num_seqs", "table_width", "num_tokens"])
def _attention_paged_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, y_ptr, lse_ptr, cu_ptr, lens_ptr, tables_ptr,
    num_seqs, table_width, num_tokens, scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """QUERIES tokens of a sequence and the GROUP heads of one key/value head, over one split of the keys they see.

    y [T, H, D]; with SPLIT, y [splits, T, H, D] fp32 and lse [splits, T, H]. Grid: tiles, G, splits.
    """
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    kv, kv_heads = tl.program_id(1), tl.num_programs(1)
    if DECODE:
        seq, first = tl.program_id(0), 0
        start = tl.load(cu_ptr + seq)
        queries = tl.load(cu_ptr + seq + 1) - start
    else:
        seq, start, queries, tile = find_tile(cu_ptr, num_seqs, tl.program_id(0), QUERIES)
        first = tile * QUERIES
    if first >= queries:
        return
    i, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query = first + i // GROUP
    mine = (i < QUERIES * GROUP) & (query < queries)
    rows = (start + query).to(tl.int64) * (kv_heads * GROUP) + kv * GROUP + i % GROUP
    inside = mine[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], inside, 0.0)

    cached = tl.load(lens_ptr + seq) - queries  # positions before this batch
    begin, end = 0, cached + tl.minimum(first + QUERIES, queries)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(end, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        begin = tl.program_id(2) * share
        end = tl.minimum(begin + share, end)
        rows += num_tokens.to(tl.int64) * (kv_heads * GROUP) * tl.program_id(2)  # where the result goes
        if begin >= end:
            tl.store(lse_ptr + rows, float("-inf"), mine)
            return
    scale *= LOG2E
    tables_ptr += tl.cast(seq, tl.int64) * table_width  # seq may be a plain 0 in the interpreter
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    y = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(begin, end, BLOCK_N):
        slots, valid = _slots_of(tables_ptr, n, end, BLOCK_SIZE, BLOCK_N)
        k = _gather(k_cache_ptr, slots, valid, kv_heads, kv, D, BLOCK_D)
        v = _gather(v_cache_ptr, slots, valid, kv_heads, kv, D, BLOCK_D)
        seen = cached + query[:, None] >= n + tl.arange(0, BLOCK_N)[None, :]
        y, total, peak = attend(tl.where(seen, matmul(q, k.T), UNSEEN), v, y, total, peak, scale)
    if SPLIT:
        tl.store(lse_ptr + rows, peak + tl.log2(total), mine)
    y /= total[:, None]
    tl.store(y_ptr + rows[:, None] * D + dims[None, :], y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _attention_paged_join_kernel(
    part_ptr, lse_ptr, y_ptr, num_rows, num_splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """y [T · H, D] = Σ_s w_s part_s / Σ_s w_s, w_s = 2 ** lse_s. Grid: T · H."""
    row, split, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = split * num_rows.to(tl.int64) + row
    lse = tl.load(lse_ptr + at, split < num_splits, float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    inside = (weight > 0)[:, None] & (dims < D)[None, :]  # an empty split has written no part
    part = tl.load(part_ptr + at[:, None] * D + dims[None, :], inside, 0.0)
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(y_ptr + row * D + dims, y.to(y_ptr.dtype.element_ty), dims < D)


# ---- compiled ahead of time ------------------------------------------------------------------------------------------


def variants(capability: int) -> Iterator[Variant]:
    """What sampling launches in bf16 on blocks of 16: decoding and prefill, whole and split, groups of 1 and 4."""
    half = "*" + TYPES[torch.bfloat16]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_cache_ptr", "v_cache_ptr", "y_ptr"), half)
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "lse_ptr", "part_ptr"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("cu_ptr", "lens_ptr", "tables_ptr"), "*i32") | {"slots_ptr": "*i64"}
    types |= dict.fromkeys(("num_heads", "num_kv_heads", "num_seqs", "table_width", "num_tokens"), "i32")
    types |= dict.fromkeys(("num_rows", "num_splits"), "i32")
    for head_dim in (128, 64, 80, 96, 256):
        yield Variant.of(f"write_kv_rope bf16 D{head_dim}", _write_kv_rope_kernel, types, _write_constants(head_dim))
        yield Variant.of(
            f"attention_paged join D{head_dim}", _attention_paged_join_kernel, types, _join_constants(head_dim)
        )
        for group, decode, split in product((1, 4), (True, False), (True, False)):
            tile = paged_tile(head_dim, group, torch.bfloat16, decode, capability)
            launch = _constants(head_dim, group, 16, decode, split, tile)
            out = {"y_ptr": "*fp32"} if split else {}
            whole = {} if split else {"lse_ptr": None}
            what = f"{'decode' if decode else 'prefill'}{' split' if split else ''}"
            name = f"attention_paged {what} bf16 D{head_dim} group {group}"
            yield Variant.of(name, _attention_paged_kernel, types | out, launch | whole)
