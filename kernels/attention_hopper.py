"""Causal attention over packed sequences on Hopper: `attention_packed` by a producer and two consumers (hopper.py).

Each consumer takes 64 rows of a tile, and does the softmax of one block while the tensor cores multiply others. Which
warpgroup multiplies and which does its softmax is left to the hardware.

There are as many programs as multiprocessors. Each takes its next job, a tile of one head, from a counter in memory
when it is free, the longest of a sequence first: so all end together, whatever the lengths.

Where a tile reaches past its sequence it holds rows of the next one. They weigh zero and are not written, but unlike
the portable kernels' masked loads they must be finite.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isheep_kernels.choice import asked_for
from isheep_kernels.hopper import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    ROWS,
    WARPS,
    await_full,
    claim,
    commit,
    descriptor,
    descriptor_type,
    expect,
    new_ring,
    num_programs,
    release,
)  # fmt: skip
from isheep_kernels.lang import copy_in, fence_async_shared, gl, gluon, in_gluon, warpgroup_mma, warpgroup_mma_wait
from isheep_kernels.tiles import LOG2E, capability, find_tile, num_tiles
from isheep_kernels.variant import TYPES, Variant

BLOCK_M = gl.constexpr(128)  # queries of a job: ROWS for each consumer
BLOCK_N = gl.constexpr(128)  # keys at a time; in backward, keys of a job

find_tile = in_gluon(find_tile)


def serves(q: Tensor) -> bool:
    """Whether these kernels are asked for and take q [T, H, D]."""
    takes = capability(q) == 90 and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in (64, 128)
    return takes and asked_for("hopper")


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [T, H, D] and lse [H, T] fp32 (divided by scale) of contiguous q [T, H, D], k and v [T, G, D]."""
    (T, H, D), G, y = q.shape, k.shape[1], torch.empty_like(q)
    lse, counter = q.new_empty(H, T, dtype=torch.float32), torch.zeros(1, dtype=torch.int32, device=q.device)
    descs = _rows_of(q, ROWS.value), _rows_of(k, BLOCK_N.value), _rows_of(v, BLOCK_N.value)
    jobs = num_tiles(T, cu_seqlens, BLOCK_M.value) * H
    if T:
        _attention_hopper_kernel[(min(jobs, num_programs(q)),)](
            *descs, y, lse, cu_seqlens, counter, T, len(cu_seqlens) - 1, H, jobs, scale, **_constants(D, H // G)
        )
    return y, lse


def serves_backward(q: Tensor) -> bool:
    """Whether `backward` takes q [T, H, D], too."""
    return serves(q) and q.shape[2] == 128


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
    constants = _constants(D, H // G) | {"ADD_DQ": dq is not None}
    if T:
        _attention_hopper_backward_kernel[(min(jobs, num_programs(q)),)](
            *(_rows_of(x, ROWS.value) for x in (q, k, v, dy)), lse, delta, dq, dk, dv, cu_seqlens, counter,
            T, len(cu_seqlens) - 1, G, jobs, scale, **constants,
        )  # fmt: skip
    return dk, dv


def _rows_of(x: Tensor, rows: int) -> Any:
    """x [T, N, D] as TMA copies it: rows of one head."""
    return descriptor(x.flatten(1), [rows, x.shape[2]])


def _constants(head_dim: int, group: int) -> dict[str, int]:
    return {"GROUP": group, "D": head_dim, "SLOTS": 256 // head_dim} | WARPS


# ---- jobs ------------------------------------------------------------------------------------------------------------


@gluon.jit
def _announce(jobs, ring, count, job):
    """The producer's next job, or one past the last, to all consumers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    claim(ring, count % 2, count // 2)
    jobs.index(count % 2).store(gl.full([1], job, gl.int32, layout))
    commit(ring, count % 2)


@gluon.jit
def _next(jobs, ring, count):
    """The job that was announced."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    await_full(ring, count % 2, count // 2)
    job = gl.max(jobs.index(count % 2).load(layout), 0)
    release(ring, count % 2)
    return job


# ---- forward ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _query_tile(cu_ptr, num_seqs, tile):
    """-> a tile's sequence: its first token, its length; and its first query, negative where there is no such tile."""
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tile, BLOCK_M)
    return start, length, (gl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M


@gluon.jit
def _produce(q_desc, k_desc, v_desc, counter_ptr, work, tiles, rings, GROUP: gl.constexpr, D: gl.constexpr):
    cu_ptr, num_seqs, heads, num_jobs = work
    q, k, v, jobs = tiles
    q_ring, k_ring, v_ring, job_ring = rings
    SLOTS: gl.constexpr = k.shape[0]
    job, done, filled = gl.program_id(0), 0, 0
    while job < num_jobs:
        start, _, m = _query_tile(cu_ptr, num_seqs, job // heads)
        if m >= 0:
            _announce(jobs, job_ring, done, job)
            head = job % heads
            for part in gl.static_range(CONSUMERS):
                claim(q_ring, part, done)
                barrier = expect(q_ring, part, ROWS * D * 2)
                copy_in(q_desc, [start + m + part * ROWS, head * D], barrier, q.index(part))
            for n in range(m, -1, -BLOCK_N):
                slot, turn, place = filled % SLOTS, filled // SLOTS, [start + n, head // GROUP * D]
                claim(k_ring, slot, turn)
                copy_in(k_desc, place, expect(k_ring, slot, BLOCK_N * D * 2), k.index(slot))
                claim(v_ring, slot, turn)
                copy_in(v_desc, place, expect(v_ring, slot, BLOCK_N * D * 2), v.index(slot))
                filled += 1
            done += 1
        job = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    _announce(jobs, job_ring, done, job)


@gluon.jit
def _soften(s, peak, total, scale):
    """A block of scores more -> its weights, by how much what was summed before shrinks, the sum, the peak."""
    higher = gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - higher[:, None])
    shrink = gl.exp2(peak - higher)
    return p, shrink, total * shrink + gl.sum(p, 1), higher


@gluon.jit
def _consume(y_ptr, lse_ptr, num_tokens, scale, work, tiles, rings, PART: gl.constexpr, D: gl.constexpr):
    """y and lse of ROWS queries of each job, over blocks of keys from the diagonal, the masked one, to the first.

    The scores of a block are multiplied first, so that its softmax runs beside the product of the block before with v.
    """
    cu_ptr, num_seqs, heads, num_jobs = work
    q, k, v, jobs = tiles
    q_ring, k_ring, v_ring, job_ring = rings
    SLOTS: gl.constexpr = k.shape[0]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 2)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    scale *= LOG2E
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    mine = q.index(PART)
    done, i = 0, 0  # jobs, and blocks of keys of all jobs
    job = _next(jobs, job_ring, done)
    while job < num_jobs:
        start, length, m = _query_tile(cu_ptr, num_seqs, job // heads)
        head, first = job % heads, m + PART * ROWS
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        keys = m + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
        y = gl.zeros([ROWS, D], gl.float32, y_layout)

        await_full(q_ring, PART, done)
        await_full(k_ring, i % SLOTS, i // SLOTS)
        s = warpgroup_mma(mine, k.index(i % SLOTS).permute((1, 0)), none, use_acc=False)
        release(k_ring, i % SLOTS)
        s = gl.where(rows[:, None] >= keys[None, :], s, float("-inf"))
        p, _, total, peak = _soften(s, peak, total, scale)
        p = gl.convert_layout(p.to(v.dtype), p_layout)
        await_full(v_ring, i % SLOTS, i // SLOTS)
        for _ in range(m // BLOCK_N):
            slot, turn = (i + 1) % SLOTS, (i + 1) // SLOTS
            await_full(k_ring, slot, turn)
            s_later = warpgroup_mma(mine, k.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
            y_later = warpgroup_mma(p, v.index(i % SLOTS), y, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_later])
            release(k_ring, slot)
            p_next, shrink, total, peak = _soften(s, peak, total, scale)
            p_next = gl.convert_layout(p_next.to(v.dtype), p_layout)
            # Not needed yet; but where no other wait is between them, ptxas moves the next one before the softmax.
            await_full(v_ring, slot, turn)
            y, p, _ = warpgroup_mma_wait(0, deps=[y_later, p_next, p])  # p is in use till then
            release(v_ring, i % SLOTS)
            y *= gl.convert_layout(shrink, y_rows)[:, None]
            i += 1
        release(q_ring, PART)
        y_later = warpgroup_mma(p, v.index(i % SLOTS), y, is_async=True)
        y, _ = warpgroup_mma_wait(0, deps=[y_later, p])
        release(v_ring, i % SLOTS)
        i += 1

        y = (y / gl.convert_layout(total, y_rows)[:, None]).to(v.dtype)
        _store_rows(y_ptr, y, start, first, length, heads, head)
        at = num_tokens.to(gl.int64) * head + start
        gl.store(lse_ptr + at + rows, (peak + gl.log2(total)) / scale, rows < length)
        done += 1
        job = _next(jobs, job_ring, done)


@gluon.jit
def _store_rows(ptr, x, start, first, length, heads, head):
    """x [ROWS, D] to rows first .. of the sequence at token `start`, as far as it goes, of a [*, heads, D] tensor."""
    D: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at = ((start + rows).to(gl.int64) * heads + head) * D
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + at[:, None] + dims[None, :], gl.convert_layout(x, layout), (rows < length)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "num_seqs", "num_jobs"])
def _attention_hopper_kernel(
    q_desc, k_desc, v_desc, y_ptr, lse_ptr, cu_ptr, counter_ptr, num_tokens, num_seqs, heads, num_jobs, scale,
    GROUP: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """y [T, H, D] and lse [H, T] / scale. Grid: programs; job i is tile i // H of head i % H."""
    q = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(q_desc.dtype, [SLOTS, BLOCK_N, D], k_desc.layout)
    v = gl.allocate_shared_memory(q_desc.dtype, [SLOTS, BLOCK_N, D], v_desc.layout)
    jobs = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rings = (new_ring(CONSUMERS, 1), new_ring(SLOTS, CONSUMERS), new_ring(SLOTS, CONSUMERS), new_ring(2, CONSUMERS))
    work, tiles = (cu_ptr, num_seqs, heads, num_jobs), (q, k, v, jobs)
    gl.warp_specialize(
        [
            (_produce, (q_desc, k_desc, v_desc, counter_ptr, work, tiles, rings, GROUP, D)),
            (_consume, (y_ptr, lse_ptr, num_tokens, scale, work, tiles, rings, 0, D)),
            (_consume, (y_ptr, lse_ptr, num_tokens, scale, work, tiles, rings, 1, D)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


# ---- backward --------------------------------------------------------------------------------------------------------


@gluon.jit
def _key_tile(cu_ptr, num_seqs, tile):
    """-> a tile's sequence: its first token, its length; and its first key, past the end if there is no such tile."""
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tile, BLOCK_N)
    return start, length, tile * BLOCK_N


@gluon.jit
def _produce_backward(inputs, work, tiles, rings, GROUP: gl.constexpr, D: gl.constexpr):
    q_desc, k_desc, v_desc, dy_desc, lse_ptr, delta_ptr, num_tokens, counter_ptr = inputs
    cu_ptr, num_seqs, kv_heads, num_jobs = work
    q, dy, lse, delta, k, v, _, jobs = tiles
    query_ring, key_ring, _, job_ring = rings
    SLOTS: gl.constexpr = q.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    job, done, filled = gl.program_id(0), 0, 0
    while job < num_jobs:
        start, length, n = _key_tile(cu_ptr, num_seqs, job // kv_heads)
        if n < length:
            _announce(jobs, job_ring, done, job)
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
                    lse_rows = gl.load(lse_ptr + at + rows, rows < length, 0.0)
                    delta_rows = gl.load(delta_ptr + at + rows, rows < length, 0.0)
                    claim(query_ring, slot, filled // SLOTS)
                    lse.index(slot).store(lse_rows)
                    delta.index(slot).store(delta_rows)
                    barrier = expect(query_ring, slot, 2 * ROWS * D * 2)
                    copy_in(q_desc, [start + m, head * D], barrier, q.index(slot))
                    copy_in(dy_desc, [start + m, head * D], barrier, dy.index(slot))
                    filled += 1
            done += 1
        job = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    _announce(jobs, job_ring, done, job)


@gluon.jit
def _consume_backward(
    dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings,
    GROUP: gl.constexpr, PART: gl.constexpr, D: gl.constexpr, ADD_DQ: gl.constexpr,
):  # fmt: skip
    """dk and dv of ROWS keys of each job, over blocks of ROWS queries that see them, and half the columns of their dq.

    What both consumers' keys add to dq is summed before it goes to memory: each leaves its ds where both multiply.
    """
    cu_ptr, num_seqs, kv_heads, num_jobs = work
    q, dy, lse, delta, k, v, ds, jobs = tiles
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
    job = _next(jobs, job_ring, done)
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
                s = zeros - lse.index(slot).load(s_queries)[None, :]
                dp = zeros - delta.index(slot).load(s_queries)[None, :]
                s_later = warpgroup_mma(k.index(mine), q.index(slot).permute((1, 0)), s, is_async=True)
                dp_later = warpgroup_mma(v.index(mine), dy.index(slot).permute((1, 0)), dp, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s_later])
                rows = m + gl.arange(0, ROWS, layout=s_queries)
                seen = (keys[:, None] <= rows[None, :]) & (rows < length)[None, :]
                p = gl.where(seen, gl.exp2(s * (scale * LOG2E)), 0.0)
                if ADD_DQ:  # early, as in `_consume`: the compiler does not move the next wait before this one
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
        _store_rows(dk_ptr, (dk * scale).to(v.dtype), start, first, length, kv_heads, kv)
        _store_rows(dv_ptr, dv.to(v.dtype), start, first, length, kv_heads, kv)
        done += 1
        job = _next(jobs, job_ring, done)


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
    lse = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], flat)
    delta = gl.allocate_shared_memory(gl.float32, [SLOTS, ROWS], flat)
    k = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    v = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout)
    ds = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, ROWS, ROWS], square)
    jobs = gl.allocate_shared_memory(gl.int32, [2, 1], flat)
    query_ring, key_ring = new_ring(SLOTS, CONSUMERS), new_ring(1, CONSUMERS)
    rings = (query_ring, key_ring, new_ring(2, CONSUMERS, CONSUMERS), new_ring(2, CONSUMERS))
    work, tiles = (cu_ptr, num_seqs, kv_heads, num_jobs), (q, dy, lse, delta, k, v, ds, jobs)
    inputs = (q_desc, k_desc, v_desc, dy_desc, lse_ptr, delta_ptr, num_tokens, counter_ptr)
    gl.warp_specialize(
        [
            (_produce_backward, (inputs, work, tiles, rings, GROUP, D)),
            (_consume_backward, (dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings, GROUP, 0, D, ADD_DQ)),
            (_consume_backward, (dq_ptr, dk_ptr, dv_ptr, scale, work, tiles, rings, GROUP, 1, D, ADD_DQ)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


# ---- compiled ahead of time ------------------------------------------------------------------------------------------


def variants(capability: int) -> Iterator[Variant]:
    """Of Hopper alone, in bf16: (head size, group) of Qwen1.5 and Llama-3 70B, and of SmolLM2."""
    if capability != 90:
        return
    half = TYPES[torch.bfloat16]
    types = {"y_ptr": f"*{half}", "lse_ptr": "*fp32", "cu_ptr": "*i32", "counter_ptr": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("num_tokens", "num_seqs", "heads", "num_jobs"), "i32")
    types |= {"delta_ptr": "*fp32", "dq_ptr": "*fp32", "dk_ptr": f"*{half}", "dv_ptr": f"*{half}", "kv_heads": "i32"}
    for head_dim, group in ((128, 1), (128, 8), (64, 1), (64, 3)):
        name, launch = f"bf16 D{head_dim} group {group}", _constants(head_dim, group)
        rows, keys = (descriptor_type(half, [n.value, head_dim]) for n in (ROWS, BLOCK_N))
        descs = {"q_desc": rows, "k_desc": keys, "v_desc": keys}
        yield Variant.of(f"attention_hopper forward {name}", _attention_hopper_kernel, types | descs, launch)
        if head_dim == 128:
            descs = dict.fromkeys(("q_desc", "k_desc", "v_desc", "dy_desc"), rows)
            for what, more in (("dkdv + dq", {"ADD_DQ": True}), ("dkdv", {"ADD_DQ": False, "dq_ptr": None})):
                kernel, of = _attention_hopper_backward_kernel, types | descs
                yield Variant.of(f"attention_hopper {what} {name}", kernel, of, launch | more)
