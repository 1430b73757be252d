"""Causal attention over packed sequences on Hopper: `attention_packed` by warpgroups that do one thing each.

A program has one producer warp and CONSUMERS warpgroups. The producer brings tiles into shared memory by TMA, ahead of
their use. Each consumer takes 64 rows of a tile, the height of Hopper's products, and does the softmax of one block
while the tensor cores multiply the next. Tiles pass through rings of slots, of which each has a barrier that says that
it is full, and one that says that all have read it.

There are as many programs as multiprocessors. Each takes its next job, a tile of one head, from a counter in memory when
it is free, the longest of a sequence first: so all end together, whatever the lengths.

Where a tile reaches past its sequence it holds rows of the next one. They weigh zero and are not written, but unlike
the portable kernels' masked loads they must be finite.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from isheep_kernels.attention_packed import LOG2E, capability, find_tile, num_tiles
from isheep_kernels.lang import TensorDescriptor, copy_in, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from isheep_kernels.variant import TYPES, Variant

ROWS = gl.constexpr(64)  # of a warpgroup's product
CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # queries of a job: ROWS for each consumer
BLOCK_N = gl.constexpr(128)  # keys at a time
REGISTERS = 168  # a thread, when twelve warps begin: all that there are; then the producer gives to the consumers
PRODUCER_REGISTERS, CONSUMER_REGISTERS = gl.constexpr(24), gl.constexpr(240)


def serves(q: Tensor) -> bool:
    """Whether these kernels take q [T, H, D]."""
    return capability(q) == 90 and q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] in (64, 128)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y [T, H, D] and lse [H, T] fp32 (divided by scale) of contiguous q [T, H, D], k and v [T, G, D]."""
    (T, H, D), G, y = q.shape, k.shape[1], torch.empty_like(q)
    lse, counter = q.new_empty(H, T, dtype=torch.float32), torch.zeros(1, dtype=torch.int32, device=q.device)
    descs = _desc(q, ROWS.value), _desc(k, BLOCK_N.value), _desc(v, BLOCK_N.value)
    jobs = num_tiles(T, cu_seqlens, BLOCK_M.value) * H
    if T:
        _attention_hopper_kernel[(min(jobs, _programs(q)),)](
            *descs, y, lse, cu_seqlens, counter, T, len(cu_seqlens) - 1, H, jobs, scale, **_constants(D, H // G)
        )
    return y, lse


def _desc(x: Tensor, rows: int) -> Any:
    """x [T, N, D] as [T, N · D], of which TMA copies [rows, D] at a time."""
    block = [rows, x.shape[2]]
    return TensorDescriptor.from_tensor(x.flatten(1), block, _layout(block))


def _layout(block: list[int]) -> Any:
    """Of a block of 16-bit numbers in shared memory: swizzled as products read it."""
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)


def _programs(x: Tensor) -> int:
    """One a multiprocessor. In an interpreter, two."""
    return _multiprocessors(x.device) if x.is_cuda else 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _constants(head_dim: int, group: int) -> dict[str, int]:
    return {"GROUP": group, "D": head_dim, "SLOTS": 256 // head_dim, "num_warps": 4, "maxnreg": REGISTERS}


# ---- rings -----------------------------------------------------------------------------------------------------------
# A ring is (slots, full, empty). A slot's turn counts how often it was used before: it gives the phase of its barriers.


@gluon.jit
def _ring(slots, READERS: gl.constexpr):
    SLOTS: gl.constexpr = slots.shape[0]
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=READERS)
    return slots, full, empty


@gluon.jit
def _fill(ring, slot, turn, desc, row, column):
    """Begin to copy a block of `desc` into a slot, once all have read what was there."""
    slots, full, empty = ring
    tile = slots.index(slot)
    SIZE: gl.constexpr = tile.shape[0] * tile.shape[1] * 2  # bytes
    mbarrier.wait(empty.index(slot), turn & 1 ^ 1)
    mbarrier.expect(full.index(slot), SIZE)
    copy_in(desc, [row, column], full.index(slot), tile)


@gluon.jit
def _filled(ring, slot, turn):
    """A slot's tile, once it is there."""
    slots, full, _ = ring
    mbarrier.wait(full.index(slot), turn & 1)
    return slots.index(slot)


@gluon.jit
def _release(ring, slot):
    _, _, empty = ring
    mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def _announce(jobs, count, job):
    """The producer's next job, or one past the last, to all consumers."""
    slots, full, empty = jobs
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(empty.index(count % 2), count // 2 & 1 ^ 1)
    slots.index(count % 2).store(gl.full([1], job, gl.int32, layout))
    mbarrier.arrive(full.index(count % 2), count=1)


@gluon.jit
def _next(jobs, count):
    """The job that was announced."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    job = gl.max(_filled(jobs, count % 2, count // 2).load(layout), 0)
    _release(jobs, count % 2)
    return job


# ---- forward ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _query_tile(cu_ptr, num_seqs, tile):
    """-> a tile's sequence: its first token, its length; and its first query, negative where there is no such tile."""
    _, start, length, tile = find_tile(cu_ptr, num_seqs, tile, BLOCK_M)
    return start, length, (gl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M


@gluon.jit
def _produce(q_desc, k_desc, v_desc, counter_ptr, work, rings, GROUP: gl.constexpr):
    cu_ptr, num_seqs, heads, num_jobs = work
    q, k, v, jobs = rings
    D: gl.constexpr = q_desc.block_shape[1]
    SLOTS: gl.constexpr = k[0].shape[0]
    job, done, filled = gl.program_id(0), 0, 0
    while job < num_jobs:
        start, _, m = _query_tile(cu_ptr, num_seqs, job // heads)
        if m >= 0:
            _announce(jobs, done, job)
            head = job % heads
            for part in gl.static_range(CONSUMERS):
                _fill(q, part, done, q_desc, start + m + part * ROWS, head * D)
            for n in range(m, -1, -BLOCK_N):
                _fill(k, filled % SLOTS, filled // SLOTS, k_desc, start + n, head // GROUP * D)
                _fill(v, filled % SLOTS, filled // SLOTS, v_desc, start + n, head // GROUP * D)
                filled += 1
            done += 1
        job = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
    _announce(jobs, done, job)


@gluon.jit
def _soften(s, peak, total, scale):
    """A block of scores more -> its weights, by how much what was summed before shrinks, the sum, the peak."""
    higher = gl.maximum(peak, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - higher[:, None])
    shrink = gl.exp2(peak - higher)
    return p, shrink, total * shrink + gl.sum(p, 1), higher


@gluon.jit
def _consume(y_ptr, lse_ptr, num_tokens, scale, work, rings, PART: gl.constexpr, D: gl.constexpr):
    """y and lse of ROWS queries of each job, over blocks of keys from the diagonal, which alone has a mask, to the first.

    The scores of a block are multiplied first, so that its softmax runs beside the product of the block before with v.
    """
    cu_ptr, num_seqs, heads, num_jobs = work
    q, k, v, jobs = rings
    SLOTS: gl.constexpr = k[0].shape[0]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    y_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, y_layout, 2)
    y_rows: gl.constexpr = gl.SliceLayout(1, y_layout)
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    scale *= LOG2E
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    done, i = 0, 0  # jobs, and blocks of keys of all jobs
    job = _next(jobs, done)
    while job < num_jobs:
        start, length, m = _query_tile(cu_ptr, num_seqs, job // heads)
        head, first = job % heads, m + PART * ROWS
        rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))
        keys = m + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, s_layout))
        y = gl.zeros([ROWS, D], gl.float32, y_layout)

        mine = _filled(q, PART, done)
        k_tile = _filled(k, i % SLOTS, i // SLOTS)
        s = warpgroup_mma(mine, k_tile.permute((1, 0)), none, use_acc=False)
        _release(k, i % SLOTS)
        s = gl.where(rows[:, None] >= keys[None, :], s, float("-inf"))
        p, _, total, peak = _soften(s, peak, total, scale)
        p = gl.convert_layout(p.to(v[0].dtype), p_layout)
        v_tile = _filled(v, i % SLOTS, i // SLOTS)
        for _ in range(m // BLOCK_N):
            slot, turn = (i + 1) % SLOTS, (i + 1) // SLOTS
            k_tile = _filled(k, slot, turn)
            s_later = warpgroup_mma(mine, k_tile.permute((1, 0)), none, use_acc=False, is_async=True)
            y_later = warpgroup_mma(p, v_tile, y, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_later])
            _release(k, slot)
            p_next, shrink, total, peak = _soften(s, peak, total, scale)
            p_next = gl.convert_layout(p_next.to(v[0].dtype), p_layout)
            # Waiting for v here, before its time, is a fence: else the wait below is moved ahead of the softmax.
            v_tile = _filled(v, slot, turn)
            y, p, _ = warpgroup_mma_wait(0, deps=[y_later, p_next, p])  # p is in use till then
            _release(v, i % SLOTS)
            y *= gl.convert_layout(shrink, y_rows)[:, None]
            i += 1
        _release(q, PART)
        y_later = warpgroup_mma(p, v_tile, y, is_async=True)
        y, _ = warpgroup_mma_wait(0, deps=[y_later, p])
        _release(v, i % SLOTS)
        i += 1

        y = gl.convert_layout((y / gl.convert_layout(total, y_rows)[:, None]).to(v[0].dtype), out_layout)
        _store_rows(y_ptr, y, start, first, length, heads, head, out_layout)
        at = num_tokens.to(gl.int64) * head + start
        gl.store(lse_ptr + at + rows, (peak + gl.log2(total)) / scale, rows < length)
        done += 1
        job = _next(jobs, done)


@gluon.jit
def _store_rows(ptr, x, start, first, length, heads, head, layout: gl.constexpr):
    """x [ROWS, D] to rows first .. of the sequence at token `start`, as far as it goes, of a [*, heads, D] tensor."""
    D: gl.constexpr = x.shape[1]
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at = ((start + rows).to(gl.int64) * heads + head) * D
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + at[:, None] + dims[None, :], x, (rows < length)[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "num_seqs", "num_jobs"])
def _attention_hopper_kernel(
    q_desc, k_desc, v_desc, y_ptr, lse_ptr, cu_ptr, counter_ptr, num_tokens, num_seqs, heads, num_jobs, scale,
    GROUP: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """y [T, H, D] and lse [H, T] / scale. Grid: programs; job i is tile i // H of head i % H."""
    dtype: gl.constexpr = q_desc.dtype
    q = _ring(gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_desc.layout), 1)
    k = _ring(gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, D], k_desc.layout), CONSUMERS)
    v = _ring(gl.allocate_shared_memory(dtype, [SLOTS, BLOCK_N, D], v_desc.layout), CONSUMERS)
    jobs = _ring(gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])), CONSUMERS)
    work, rings = (cu_ptr, num_seqs, heads, num_jobs), (q, k, v, jobs)
    gl.warp_specialize(
        [
            (_consume, (y_ptr, lse_ptr, num_tokens, scale, work, rings, 0, D)),
            (_consume, (y_ptr, lse_ptr, num_tokens, scale, work, rings, 1, D)),
            (_produce, (q_desc, k_desc, v_desc, counter_ptr, work, rings, GROUP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
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
        blocks = {"q_desc": ROWS.value, "k_desc": BLOCK_N.value, "v_desc": BLOCK_N.value}
        descs = {
            arg: f"tensordesc<{half}[{rows}, {head_dim}],{_layout([rows, head_dim])!r}>" for arg, rows in blocks.items()
        }
        launch = _constants(head_dim, group)
        name = f"attention_hopper forward bf16 D{head_dim} group {group}"
        yield Variant.of(name, _attention_hopper_kernel, types | descs, launch)
