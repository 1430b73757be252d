"""The backward pass of attention_hopper.py, at D = 128: dk, dv and, by atomics, dq in one sweep over the keys.

A job is a tile of keys of one key/value head; each consumer has 64 of them, and goes through the queries that see them,
64 at a time. Five products a block: scores and dp again, transposed, so that what p and ds are multiplied with is in
memory; dv and dk, which stay in registers; and dq, of which each consumer multiplies half the columns for the keys of
both. So each leaves its ds in shared memory for the other, and dq is added to half as often as if each had its own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from isheep_kernels import attention_hopper, hopper
from isheep_kernels.attention_hopper import constants, rows_of
from isheep_kernels.hopper import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    ROWS,
    announce,
    await_full,
    claim,
    commit,
    descriptor_type,
    expect,
    new_ring,
    next_job,
    num_programs,
    release,
    store_rows,
)
from isheep_kernels.lang import copy_in, fence_async_shared, gl, gluon, in_gluon, warpgroup_mma, warpgroup_mma_wait
from isheep_kernels.tiles import LOG2E, find_tile, num_tiles
from isheep_kernels.variant import TYPES, Variant

BLOCK_N = gl.constexpr(128)  # keys of a job: ROWS for each consumer

find_tile = in_gluon(find_tile)


def serves(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> bool:
    """Whether `backward` is asked for and takes contiguous q, dy [T, H, D], k and v."""
    return attention_hopper.serves(q, k, v) and hopper.serves(dy) and q.shape[2] == 128


def backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, lse: Tensor, delta: Tensor, cu_seqlens: Tensor, scale: float,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv [T, G, D] from y's gradient dy [T, H, D], forward's lse, and delta [H, T] = Σ_d dy y, fp32 both.

    dq [T, H, D] fp32, if any, is added to, by atomics: its last bits change from run to run.
    """
    (T, H, D), G, dk, dv = q.shape, k.shape[1], torch.empty_like(k), torch.empty_like(v)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    jobs = num_tiles(T, cu_seqlens, BLOCK_N.value) * G
    _attention_hopper_backward_kernel[(min(jobs, num_programs(q)),)](
        *(rows_of(x, ROWS.value) for x in (q, k, v, dy)), lse, delta, dq, dk, dv, cu_seqlens, counter,
        T, len(cu_seqlens) - 1, G, jobs, scale, **constants(D, H // G), ADD_DQ=dq is not None,
    )  # fmt: skip
    return dk, dv


# ---- kernel ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _key_tile(cu_ptr, num_seqs, tile):
    """-> a tile's sequence: its first token, its length; and its first key, past the end if there is no such tile."""
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tile, BLOCK_N)
    return start, length, tile * BLOCK_N


@gluon.jit
def _produce(inputs, work, tiles, rings, GROUP: gl.constexpr, D: gl.constexpr):
    q_desc, k_desc, v_desc, dy_desc, lse_ptr, delta_ptr, num_tokens, counter_ptr = inputs
    cu_ptr, num_seqs, kv_heads, num_jobs = work
    q, dy, lse_delta, k, v, _, jobs = tiles
    query_ring, key_ring, _, job_ring = rings
    SLOTS: gl.constexpr = q.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    job, done, filled = gl.program_id(0), 0, 0
    while job < num_jobs:
        start, length, n = _key_tile(cu_ptr, num_seqs, job // kv_heads)
        if n < length:
            announce(jobs, job_ring, done, job)
            kv = job % kv_heads
            claim(key_ring, 0, done)
            barrier = expect(key_ring, 0, 2 * BLOCK_N * D * 2)
            for part in gl.static_range(CONSUMERS):
                copy_in(k_desc, [start + n + part * ROWS, kv * D], barrier, k.index(part))
                copy_in(v_desc, [start + n + part * ROWS, kv * D], barrier, v.index(part))
            for head in range(kv * GROUP, (kv + 1) * GROUP):
                for m in range(n, length, ROWS):
                    slot = filled % SLOTS
                    rows = m + gl.arange(0, ROWS, layout=layout)
                    at = num_tokens.to(gl.int64) * head + start
                    lse = gl.load(lse_ptr + at + rows, rows < length, 0.0)
                    delta = gl.load(delta_ptr + at + rows, rows < length, 0.0)
                    claim(query_ring, slot, filled // SLOTS)
                    lse_delta.index(slot).store(lse)
                    lse_delta.index(SLOTS + slot).store(delta)
                    barrier = expect(query_ring, slot, 2 * ROWS * D * 2)
                    copy_in(q_desc, [start + m, head * D], barrier, q.index(slot))
                    copy_in(dy_desc, [start + m, head * D], barrier, dy.index(slot))
                    filled += 1
            done += 1
        job = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    announce(jobs, job_ring, done, job)


@gluon.jit
def _consume(
    dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings,
    GROUP: gl.constexpr, PART: gl.constexpr, D: gl.constexpr, ADD_DQ: gl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of each job, over blocks of ROWS queries that see them, and half the columns of their dq.

    What both consumers' keys add to dq is summed before it goes to memory: each leaves its ds where both multiply.
    """
    cu_ptr, num_seqs, kv_heads, num_jobs = work
    q, dy, lse_delta, k, v, ds, jobs = tiles
    query_ring, key_ring, ds_ring, job_ring = rings
    SLOTS: gl.constexpr = q.shape[0]
    HALF: gl.constexpr = D // CONSUMERS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # [keys, queries]
    s_queries: gl.constexpr = gl.SliceLayout(0, s_layout)
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 2)
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    zeros = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    done, i = 0, 0  # jobs, and blocks of queries of all jobs
    job = next_job(jobs, job_ring, done)
    while job < num_jobs:
        start, length, n = _key_tile(cu_ptr, num_seqs, job // kv_heads)
        kv, first = job % kv_heads, n + PART * ROWS
        keys = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        dk, dv = gl.zeros([ROWS, D], gl.float32, y_layout), gl.zeros([ROWS, D], gl.float32, y_layout)
        await_full(key_ring, 0, done)
        for head in range(kv * GROUP, (kv + 1) * GROUP):
            for m in range(n, length, ROWS):
                slot = i % SLOTS
                mine = PART + (i >> 30)  # PART: that the compiler cannot know it keeps 48 addresses out of registers
                await_full(query_ring, slot, i // SLOTS)
                # Products that start from -lse and -delta leave those in no registers of their own.
                s = zeros - lse_delta.index(slot).load(s_queries)[None, :]
                dp = zeros - lse_delta.index(SLOTS + slot).load(s_queries)[None, :]
                dp = warpgroup_mma_wait(0, deps=[dp])  # there before either product begins, so that none waits for it
                s_later = warpgroup_mma(k.index(mine), q.index(slot).permute((1, 0)), s, is_async=True)
                dp_later = warpgroup_mma(v.index(mine), dy.index(slot).permute((1, 0)), dp, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_later])
                rows = m + gl.arange(0, ROWS, layout=s_queries)
                seen = (keys[:, None] <= rows[None, :]) & (rows < length)[None, :]
                p = gl.where(seen, gl.exp2(s * (scale * LOG2E)), 0.0)
                if ADD_DQ:  # early, as in the forward kernel: the compiler does not move the next wait before this one
                    claim(ds_ring, i % 2, i // 2)
                dp = warpgroup_mma_wait(0, deps=[dp_later])
                ds_half = (p * dp).to(v.dtype)
                p_half = gl.convert_layout(p.to(v.dtype), p_layout)
                dv_later = warpgroup_mma(p_half, dy.index(slot), dv, is_async=True)
                ds_mine = gl.convert_layout(ds_half, p_layout)
                dk_later = warpgroup_mma(ds_mine, q.index(slot), dk, is_async=True)
                if ADD_DQ:
                    ds.index(i % 2 * CONSUMERS + PART).store(ds_half)
                    fence_async_shared()
                    commit(ds_ring, i % 2)
                    await_full(ds_ring, i % 2, i // 2)
                    dq = gl.zeros([ROWS, HALF], gl.float32, dq_layout)
                    for part in gl.static_range(CONSUMERS):
                        columns = k.index(mine - PART + part).slice(PART * HALF, HALF, dim=1)
                        ds_part = ds.index(i % 2 * CONSUMERS + part).permute((1, 0))
                        dq = warpgroup_mma(ds_part, columns, dq, is_async=True)
                    dq, dk, dv, _, _ = warpgroup_mma_wait(0, deps=[dq, dk_later, dv_later, ds_mine, p_half])
                    release(ds_ring, i % 2)
                else:
                    dk, dv, _, _ = warpgroup_mma_wait(0, deps=[dk_later, dv_later, ds_mine, p_half])
                release(query_ring, slot)
                if ADD_DQ:
                    _add_rows(dq_ptr + PART * HALF, dq * scale, start, m, length, kv_heads * GROUP, head, D, dq_layout)
                i += 1
        release(key_ring, 0)
        store_rows(dk_ptr, (dk * scale).to(v.dtype), start, first, length, kv_heads, kv)
        store_rows(dv_ptr, dv.to(v.dtype), start, first, length, kv_heads, kv)
        done += 1
        job = next_job(jobs, job_ring, done)


@gluon.jit
def _add_rows(ptr, x, start, first, length, heads, head, D: gl.constexpr, layout: gl.constexpr):
    """x [ROWS, *], part of a head, added to where `_store_rows` would put it."""
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at = ((start + rows).to(gl.int64) * heads + head) * D
    dims = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    gl.atomic_add(ptr + at[:, None] + dims[None, :], x, (rows < length)[:, None], sem="relaxed")


@gluon.jit(do_not_specialize=["num_tokens", "num_seqs", "num_jobs"])
def _attention_hopper_backward_kernel(
    q_desc, k_desc, v_desc, dy_desc, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, cu_ptr, counter_ptr,
    num_tokens, num_seqs, kv_heads, num_jobs, scale,
    GROUP: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, ADD_DQ: gl.constexpr,
):  # fmt: skip
    """dk, dv [T, G, D]; ADD_DQ: dq [T, H, D] fp32 += theirs. Grid: programs; job i is key tile i // G of head i % G."""
    dtype: gl.constexpr = q_desc.dtype
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], gl.bfloat16)
    q = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, D], q_desc.layout)
    dy = gl.allocate_shared_memory(dtype, [SLOTS, ROWS, D], q_desc.layout)
    lse_delta = gl.allocate_shared_memory(gl.float32, [2 * SLOTS, ROWS], flat)
    k = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    v = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    ds = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, ROWS], square)
    jobs = gl.allocate_shared_memory(gl.int32, [2, 1], flat)
    query_ring, key_ring = new_ring(SLOTS, CONSUMERS), new_ring(1, CONSUMERS)
    rings = (query_ring, key_ring, new_ring(2, CONSUMERS, CONSUMERS), new_ring(2, CONSUMERS))
    work, tiles = (cu_ptr, num_seqs, kv_heads, num_jobs), (q, dy, lse_delta, k, v, ds, jobs)
    inputs = (q_desc, k_desc, v_desc, dy_desc, lse_ptr, delta_ptr, num_tokens, counter_ptr)
    gl.warp_specialize(
        [
            (_produce, (inputs, work, tiles, rings, GROUP, D)),
            (_consume, (dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings, GROUP, 0, D, ADD_DQ)),
            (_consume, (dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings, GROUP, 1, D, ADD_DQ)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


def variants(capability: int) -> Iterator[Variant]:
    """Of Hopper alone, in bf16: the groups of Qwen1.5 and of Llama-3 70B, with dq and without."""
    if capability != 90:
        return
    half = TYPES[torch.bfloat16]
    types = dict.fromkeys(("num_tokens", "num_seqs", "kv_heads", "num_jobs"), "i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "dq_ptr"), "*fp32") | dict.fromkeys(
        ("dk_ptr", "dv_ptr"), f"*{half}"
    )
    types |= {"cu_ptr": "*i32", "counter_ptr": "*i32"}
    types |= dict.fromkeys(("q_desc", "k_desc", "v_desc", "dy_desc"), descriptor_type(half, [ROWS.value, 128]))
    for group in (1, 8):
        for what, more in (("dkdv + dq", {"ADD_DQ": True}), ("dkdv", {"ADD_DQ": False, "dq_ptr": None})):
            name = f"attention_hopper_backward {what} bf16 group {group}"
            yield Variant.of(name, _attention_hopper_backward_kernel, types, constants(128, group) | more)
