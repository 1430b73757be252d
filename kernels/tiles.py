"""Which tile of the work is a program's, and on which chip it is."""

import math
from functools import cache

import torch
from torch import Tensor

from isheep_kernels.lang import tl, triton

LOG2E = tl.constexpr(math.log2(math.e))
GROUP = tl.constexpr(8)  # rows of tiles that are walked side by side, so that their tiles of w come from the cache


def capability(x: Tensor) -> int:
    """80 for sm_80 and so on. Triton's interpreter, which runs on CPU tensors, takes Ampere's tiles."""
    return _capability(x.device) if x.is_cuda else 80


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_tiles(num_tokens: int, cu_seqlens: Tensor, block: int) -> int:
    """As many tiles of `block` tokens as any split into these many sequences needs: see `find_tile`."""
    return num_tokens // block + len(cu_seqlens) - 1


@triton.jit
def find_tile(cu_ptr, num_seqs, tile, BLOCK: tl.constexpr):
    """Whose tile this is: (sequence, its first token, its length, the tile's number within it).

    Sequence s is given tiles cu[s] // BLOCK + s up to where s + 1 begins: always enough, at most one too many.
    """
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        later = tl.load(cu_ptr + middle) // BLOCK + middle <= tile
        low, high = tl.where(later, middle, low), tl.where(later, high, middle)
    start = tl.load(cu_ptr + low)
    return low, start, tl.load(cu_ptr + low + 1) - start, tile - start // BLOCK - low


@triton.jit
def tile_place(tile, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile of this number lies in a [num_rows, num_columns] result: (i, j), int64."""
    across, down = tl.cdiv(num_columns, BLOCK_N), tl.cdiv(num_rows, BLOCK_M)
    group = tile // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    place = tile - group * GROUP * across
    return (group * GROUP + place % height).to(tl.int64), (place // height).to(tl.int64)
