"""Causal attention over packed sequences on Hopper: `attention_packed` by a producer and two consumers (hopper.py).

Each consumer takes 64 rows of a tile, and does the softmax of one block while the tensor cores multiply others. Which
warpgroup multiplies and which does its softmax is left to the hardware.

There are as many programs as multiprocessors. Each takes its next job, a tile of one head, from a counter in memory
when it is free, the longest of a sequence first: so they end nearly together, whatever the lengths.

Where a tile reaches past its sequence it holds rows of the next one. They weigh zero and are not written, but unlike
the portable kernels' masked loads they must be finite.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from isheep_kernels import hopper
from isheep_kernels.hopper import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LAUNCH,
    ROWS,
    announce,
    await_full,
    claim,
    descriptor,
    descriptor_type,
    expect,
    new_ring,
    next_job,
    num_programs,
    release,
    store_rows,
)
from isheep_kernels.lang import copy_in, gl, gluon, in_gluon, warpgroup_mma, warpgroup_mma_wait
from isheep_kernels.tiles import LOG2E, find_tile, num_tiles
from isheep_kernels.variant import TYPES, Variant

BLOCK_M = gl.constexpr(128)  # queries of a job: ROWS for each consumer
BLOCK_N = gl.constexpr(128)  # keys at a time

find_tile = in_gluon(find_tile)


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `forward` is asked for and takes contiguous q [T, H, D], k and v."""
    return hopper.serves(q, k, v) and q.shape[2] in (64, 128) and len(q) > 0


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [T, H, D] and lse [H, T] fp32 (divided by scale) of contiguous q [T, H, D], k and v [T, G, D]."""
    (T, H, D), G, y = q.shape, k.shape[1], torch.empty_like(q)
    lse, counter = q.new_empty(H, T, dtype=torch.float32), torch.zeros(1, dtype=torch.int32, device=q.device)
    descs = rows_of(q, ROWS.value), rows_of(k, BLOCK_N.value), rows_of(v, BLOCK_N.value)
    jobs = num_tiles(T, cu_seqlens, BLOCK_M.value) * H
    _attention_hopper_kernel[(min(jobs, num_programs(q)),)](
        *descs, y, lse, cu_seqlens, counter, T, len(cu_seqlens) - 1, H, jobs, scale, **constants(D, H // G)
    )
    return y, lse


def rows_of(x: Tensor, rows: int) -> Any:
    """x [T, N, D] as TMA copies it: rows of one head."""
    return descriptor(x.flatten(1), [rows, x.shape[2]])


def constants(head_dim: int, group: int) -> dict[str, int]:
    return {"GROUP": group, "D": head_dim, "SLOTS": 256 // head_dim} | LAUNCH


# ---- kernel ----------------------------------------------------------------------------------------------------------


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
            announce(jobs, job_ring, done, job)
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
    announce(jobs, job_ring, done, job)


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
    job = next_job(jobs, job_ring, done)
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
        store_rows(y_ptr, y, start, first, length, heads, head)
        at = num_tokens.to(gl.int64) * head + start
        gl.store(lse_ptr + at + rows, (peak + gl.log2(total)) / scale, rows < length)
        done += 1
        job = next_job(jobs, job_ring, done)


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


# ---- compiled ahead of time ------------------------------------------------------------------------------------------


def variants(capability: int) -> Iterator[Variant]:
    """Of Hopper alone, in bf16: (head size, group) of Qwen1.5 and Llama-3 70B, and of SmolLM2."""
    if capability != 90:
        return
    half = TYPES[torch.bfloat16]
    types = {"y_ptr": f"*{half}", "lse_ptr": "*fp32", "cu_ptr": "*i32", "counter_ptr": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("num_tokens", "num_seqs", "heads", "num_jobs"), "i32")
    for head_dim, group in ((128, 1), (128, 8), (64, 1), (64, 3)):
        rows, keys = (descriptor_type(half, [n.value, head_dim]) for n in (ROWS, BLOCK_N))
        of, launch = types | {"q_desc": rows, "k_desc": keys, "v_desc": keys}, constants(head_dim, group)
        yield Variant.of(f"attention_hopper bf16 D{head_dim} group {group}", _attention_hopper_kernel, of, launch)
