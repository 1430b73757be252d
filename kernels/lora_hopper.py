"""The product of `lora_matmul` on Hopper, y = x wᵀ + low bᵀ + bias, by a producer and two consumers (hopper.py).

[x, low] times [w, b]: the adapter is one step more of the sum over columns, R columns that TMA pads with zeros to a
whole step, so it costs BLOCK_K / K of the product, no pass over y and no copy of w. Programs stay, one a
multiprocessor, and take tiles in turn; the producer brings the next tile's columns while this one is stored.
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
    await_full,
    claim,
    descriptor,
    descriptor_type,
    expect,
    new_ring,
    num_programs,
    release,
)
from isheep_kernels.lang import copy_in, gl, gluon, in_gluon, triton, warpgroup_mma, warpgroup_mma_wait
from isheep_kernels.tiles import tile_place
from isheep_kernels.variant import TYPES, Variant

BLOCK_M = gl.constexpr(128)  # rows of a tile: ROWS for each consumer
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)  # columns at a time
SLOTS = gl.constexpr(4)

tile_place = in_gluon(tile_place)


def serves(x: Tensor, w: Tensor, rank: int) -> bool:
    """Whether `product` is asked for and takes x [T, K], w [N, K] and such a rank: TMA wants rows of whole 16 bytes."""
    (T, K), rows_of_x, rows_of_w = x.shape, x.stride(0), max(w.stride())
    whole = not any(n % 8 for n in (rows_of_x, rows_of_w, len(w), rank)) and min(w.stride()) == 1
    return hopper.serves(x, w) and whole and T > 0 and rank > 0 and rows_of_x >= K


def product(
    x: Tensor, w: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, scale: float, y: Tensor | None = None
) -> Tensor:
    """x wᵀ + bias + scale · low bᵀ, added to y where there is one: [T, N] in x.dtype.

    x [T, K]; w [N, K] by rows or by columns; low [S, T, R] fp32, to be summed over S; b [N, R].
    """
    (T, K), (N, R), by_columns = x.shape, b.shape, w.stride(0) == 1
    low = (low.sum(0) * scale).to(x.dtype)
    if by_columns:
        w, b = w.t(), b.t()
    b = b.to(x.dtype).contiguous()
    add, y = y is not None, torch.empty(T, N, dtype=x.dtype, device=x.device) if y is None else y
    tiles = triton.cdiv(T, BLOCK_M.value) * triton.cdiv(N, BLOCK_N.value)
    rows, columns = [ROWS.value, BLOCK_K.value], _weight_block(by_columns)
    descs = descriptor(x, rows), descriptor(w, columns), descriptor(low, rows), descriptor(b, columns)
    flags = {"BY_COLUMNS": by_columns, "BIAS": bias is not None, "ADD": add}
    _lora_hopper_kernel[(min(tiles, num_programs(x)),)](*descs, bias, y, T, N, K, R, tiles, **flags, **LAUNCH)
    return y


def _weight_block(by_columns: bool) -> list[int]:
    """What a slot holds of w [N, K], or of w's transpose."""
    return [BLOCK_K.value, BLOCK_N.value] if by_columns else [BLOCK_N.value, BLOCK_K.value]


@gluon.jit
def _produce(x_desc, w_desc, low_desc, b_desc, sizes, x, w, ring, BY_COLUMNS: gl.constexpr):
    T, N, K, R, tiles = sizes
    steps = gl.cdiv(K, BLOCK_K)
    filled = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = tile_place(tile, T, N, BLOCK_M, BLOCK_N)
        row, column = i.to(gl.int32) * BLOCK_M, j.to(gl.int32) * BLOCK_N
        for step in range(steps):
            slot = filled % SLOTS
            _fill(x_desc, w_desc, row, column, step * BLOCK_K, x, w, ring, slot, filled // SLOTS, BY_COLUMNS)
            filled += 1
        for step in range(gl.cdiv(R, BLOCK_K)):
            slot = filled % SLOTS
            _fill(low_desc, b_desc, row, column, step * BLOCK_K, x, w, ring, slot, filled // SLOTS, BY_COLUMNS)
            filled += 1


@gluon.jit
def _fill(x_desc, w_desc, row, column, k, x, w, ring, slot, turn, BY_COLUMNS: gl.constexpr):
    """Columns k .. k + BLOCK_K of a tile's rows of x and of its rows of w into a slot."""
    claim(ring, slot, turn)
    barrier = expect(ring, slot, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
    for part in gl.static_range(CONSUMERS):
        copy_in(x_desc, [row + part * ROWS, k], barrier, x.index(slot * CONSUMERS + part))
    if BY_COLUMNS:
        copy_in(w_desc, [k, column], barrier, w.index(slot))
    else:
        copy_in(w_desc, [column, k], barrier, w.index(slot))


@gluon.jit
def _consume(
    bias_ptr, y_ptr, sizes, x, w, ring,
    PART: gl.constexpr, BY_COLUMNS: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """ROWS rows of each tile. A product is waited for when the next one has begun."""
    T, N, K, R, tiles = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    steps = gl.cdiv(K, BLOCK_K) + gl.cdiv(R, BLOCK_K)
    read = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = tile_place(tile, T, N, BLOCK_M, BLOCK_N)
        first, column = i * BLOCK_M + PART * ROWS, j * BLOCK_N
        total = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
        if BIAS:
            columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
            total += gl.load(bias_ptr + columns, columns < N, 0.0).to(gl.float32)[None, :]
        if ADD:
            total += gl.load(*_place(y_ptr, first, column, T, N, layout), 0.0).to(gl.float32)
        for step in range(steps):
            slot = read % SLOTS
            await_full(ring, slot, read // SLOTS)
            columns_of_w = w.index(slot) if BY_COLUMNS else w.index(slot).permute((1, 0))
            total = warpgroup_mma(x.index(slot * CONSUMERS + PART), columns_of_w, total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            if step > 0:
                release(ring, (read + SLOTS - 1) % SLOTS)
            read += 1
        total = warpgroup_mma_wait(0, deps=[total])
        release(ring, (read + SLOTS - 1) % SLOTS)
        at, inside = _place(y_ptr, first, column, T, N, out_layout)
        gl.store(at, gl.convert_layout(total.to(y_ptr.dtype.element_ty), out_layout), inside)


@gluon.jit
def _place(y_ptr, first, column, T, N, layout: gl.constexpr):
    """-> pointers to ROWS rows and BLOCK_N columns of y [T, N], and which of them there are."""
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    return y_ptr + rows[:, None] * N + columns[None, :], (rows < T)[:, None] & (columns < N)[None, :]


@gluon.jit(do_not_specialize=["T", "tiles"])
def _lora_hopper_kernel(
    x_desc, w_desc, low_desc, b_desc, bias_ptr, y_ptr, T, N, K, R, tiles,
    BY_COLUMNS: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Tiles of y [T, N]. Grid: programs."""
    x = gl.allocate_shared_memory(x_desc.dtype, [SLOTS * CONSUMERS, ROWS, BLOCK_K], x_desc.layout)
    W_BLOCK: gl.constexpr = [SLOTS, BLOCK_K, BLOCK_N] if BY_COLUMNS else [SLOTS, BLOCK_N, BLOCK_K]
    w = gl.allocate_shared_memory(x_desc.dtype, W_BLOCK, w_desc.layout)
    ring, sizes = new_ring(SLOTS, CONSUMERS), (T, N, K, R, tiles)
    gl.warp_specialize(
        [
            (_produce, (x_desc, w_desc, low_desc, b_desc, sizes, x, w, ring, BY_COLUMNS)),
            (_consume, (bias_ptr, y_ptr, sizes, x, w, ring, 0, BY_COLUMNS, BIAS, ADD)),
            (_consume, (bias_ptr, y_ptr, sizes, x, w, ring, 1, BY_COLUMNS, BIAS, ADD)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )


def variants(capability: int) -> Iterator[Variant]:
    """Of Hopper alone, in bf16: forward with and without bias, backward of the first and of further projections."""
    if capability != 90:
        return
    half = TYPES[torch.bfloat16]
    types = {"bias_ptr": f"*{half}", "y_ptr": f"*{half}"} | dict.fromkeys(("T", "N", "K", "R", "tiles"), "i32")
    types |= dict.fromkeys(("x_desc", "low_desc"), descriptor_type(half, [ROWS.value, BLOCK_K.value]))
    for name, by_columns, bias, add in (
        ("forward", False, False, False),
        ("forward bias", False, True, False),
        ("backward", True, False, False),
        ("backward added", True, False, True),
    ):
        of = types | dict.fromkeys(("w_desc", "b_desc"), descriptor_type(half, _weight_block(by_columns)))
        launch: dict[str, Any] = {"BY_COLUMNS": by_columns, "BIAS": bias, "ADD": add} | LAUNCH
        made = Variant.of(
            f"lora_hopper {name} bf16", _lora_hopper_kernel, of, launch | ({} if bias else {"bias_ptr": None})
        )
        yield made._replace(divisible_by_16=(*made.divisible_by_16, "N", "K", "R"))
