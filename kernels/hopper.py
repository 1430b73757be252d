"""What kernels share that give Hopper's warpgroups each a thing to do: a producer, and consumers that multiply.

The producer brings tiles into shared memory by TMA, ahead of their use. They pass through rings of slots. A ring is
(full, empty), a barrier each for every slot; a slot's turn, how often it was used before, says their phase.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from isheep_kernels.choice import asked_for
from isheep_kernels.lang import TensorDescriptor, fence_async_shared, gl, gluon, mbarrier
from isheep_kernels.tiles import capability

ROWS = gl.constexpr(64)  # of a warpgroup's product, so of a consumer
CONSUMERS = gl.constexpr(2)
# Registers of a thread: 168 when three warpgroups begin, all that there are; then 240, and 24 are the producer's.
LAUNCH = {"num_warps": 4, "maxnreg": 168}
CONSUMER_REGISTERS = gl.constexpr(240)


def serves(*inputs: Tensor) -> bool:
    """Whether kernels like these are asked for and take such inputs: on Hopper, of 16 bits, begun at 16 bytes."""
    if not asked_for("hopper") or capability(inputs[0]) != 90:
        return False
    return all(x.dtype in (torch.float16, torch.bfloat16) and x.data_ptr() % 16 == 0 for x in inputs)


def descriptor(x: Tensor, block: list[int]) -> Any:
    """x [M, N] of 16-bit numbers, of which TMA copies a block at a time."""
    return TensorDescriptor.from_tensor(x, block, layout(block))


def descriptor_type(dtype: str, block: list[int]) -> str:
    """How the compiler calls `descriptor`."""
    return f"tensordesc<{dtype}{block},{layout(block)!r}>"


def layout(block: list[int]) -> Any:
    """Of a block of 16-bit numbers in shared memory: swizzled as products read it."""
    return gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)


def num_programs(x: Tensor) -> int:
    """One a multiprocessor. In an interpreter, two."""
    return _multiprocessors(x.device) if x.is_cuda else 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def new_ring(SLOTS: gl.constexpr, READERS: gl.constexpr, WRITERS: gl.constexpr = 1):
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=WRITERS)
        mbarrier.init(empty.index(slot), count=READERS)
    fence_async_shared()  # TMA, too, sees them as they are now
    return full, empty


@gluon.jit
def claim(ring, slot, turn):
    """Wait until all have read what was in the slot."""
    _, empty = ring
    mbarrier.wait(empty.index(slot), turn & 1 ^ 1)


@gluon.jit
def expect(ring, slot, num_bytes: gl.constexpr):
    """Say what will have come when the slot is full. -> the barrier that copies are to tell."""
    full, _ = ring
    mbarrier.expect(full.index(slot), num_bytes)
    return full.index(slot)


@gluon.jit
def commit(ring, slot):
    """Say that a slot is full that was written by stores."""
    full, _ = ring
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def await_full(ring, slot, turn):
    """Wait until the slot is full."""
    full, _ = ring
    mbarrier.wait(full.index(slot), turn & 1)


@gluon.jit
def release(ring, slot):
    """Say that this consumer has read the slot."""
    _, empty = ring
    mbarrier.arrive(empty.index(slot), count=1)


# A job's number, from the producer to both consumers, through a ring of two slots.


@gluon.jit
def announce(jobs, ring, count, job):
    """Say which job comes next, or one past the last. `count` were announced before."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    claim(ring, count % 2, count // 2)
    jobs.index(count % 2).store(gl.full([1], job, gl.int32, layout))
    commit(ring, count % 2)


@gluon.jit
def next_job(jobs, ring, count):
    """The job that was announced."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    await_full(ring, count % 2, count // 2)
    job = gl.max(jobs.index(count % 2).load(layout), 0)
    release(ring, count % 2)
    return job


@gluon.jit
def store_rows(ptr, x, start, first, length, heads, head):
    """x [ROWS, D] to rows first .. of the sequence at token `start`, as far as it goes, of a [*, heads, D] tensor."""
    D: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a thread
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at = ((start + rows).to(gl.int64) * heads + head) * D
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    gl.store(ptr + at[:, None] + dims[None, :], gl.convert_layout(x, layout), (rows < length)[:, None])
