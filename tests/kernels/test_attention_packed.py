from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl

from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from isheep_kernels.tiles import find_tile, num_tiles
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as
from tests.kernels.yardstick import DTYPES, assert_as_good_as, randn

LENS = (1, 7, 63, 0, 64, 65, 130, 2)  # around the kernels' tiles of 64 keys


def attend(q, k, v):
    return ops.attention_packed(q, k, v, PackedBatch.pack([[0] * n for n in LENS], "cpu"), q.shape[-1] ** -0.5)


def attend_ref(q, k, v):
    ends = torch.tensor((0, *LENS)).cumsum(0).tolist()
    return attention_packed_ref(q, k, v, ends, q.shape[-1] ** -0.5)


def plain(q, k, v):
    """Block-diagonal causal attention with the whole [T, T] mask."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    owner = torch.repeat_interleave(torch.arange(len(LENS)), torch.tensor(LENS))
    sees = (owner[:, None] == owner) & torch.ones(sum(LENS), sum(LENS)).tril().bool()
    scores = torch.einsum("thd,jhd->htj", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("htj,jhd->thd", scores.masked_fill(~sees, -torch.inf).softmax(-1), v)


@DTYPES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 16), (6, 2, 24), (9, 3, 64), (7, 1, 80), (2, 2, 128)]
)
def test_value_and_gradients(heads, kv_heads, head_dim, dtype):
    q, k, v, dy = (
        randn(sum(LENS), h, head_dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads, heads))
    )
    got, ref = (value_and_gradients(f, q, k, v, dy) for f in (attend, attend_ref))
    truth = value_and_gradients(plain, *(x.double() for x in (q, k, v, dy)))
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)


def value_and_gradients(function, q, k, v, dy):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = function(*leaves)
    y.backward(dy)
    return y.detach(), *(x.grad for x in leaves)


# ---- Triton, in its interpreter ------------------------------------------------------------------------------------

UNEVEN = (1, 33, 0, 66, 2, 0)  # no multiple of a tile, one token, nothing, nothing at the end


def kernels(lens, head_dim, deterministic=False):
    """(kernel, reference) as functions of q, k, v and the offsets of these lengths."""
    scale = head_dim**-0.5
    ends = [0, *accumulate(lens)]
    return (
        lambda q, k, v, cu_seqlens: attention_packed(q, k, v, cu_seqlens, scale, deterministic),
        lambda q, k, v, cu_seqlens: attention_packed_ref(q, k, v, ends, scale),
    )


def packed_problem(lens, heads, kv_heads, head_dim, dtype):
    q, k, v, dy = (
        randn(sum(lens), h, head_dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads, heads))
    )
    frozen = {"cu_seqlens": torch.tensor([0, *accumulate(lens)], dtype=torch.int32)}
    return {"q": q, "k": k, "v": v}, frozen, [dy]


@INTERPRETED
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_sweep", "two_sweeps"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 64), (3, 1, 80), (2, 2, 96), (1, 1, 128), (1, 1, 256)]
)
def test_the_triton_kernels(heads, kv_heads, head_dim, deterministic, dtype):
    problem = packed_problem(UNEVEN, heads, kv_heads, head_dim, dtype)
    assert_kernel_is_as_good_as(*kernels(UNEVEN, head_dim, deterministic), *problem)


@INTERPRETED
@pytest.mark.parametrize("deterministic", [False, True], ids=["one_sweep", "two_sweeps"])
@pytest.mark.parametrize("head_dim", [64, 128])  # backward's tiles: fewer queries than keys, as many
def test_whole_tiles_are_not_masked_and_still_right(head_dim, deterministic, dtype):
    lens = (130, 64)  # two whole tiles of keys for the last queries, and none left over
    problem = packed_problem(lens, 2, 1, head_dim, dtype)
    assert_kernel_is_as_good_as(*kernels(lens, head_dim, deterministic), *problem)


@triton.jit
def _tiles_kernel(cu_ptr, out_ptr, num_seqs, BLOCK: tl.constexpr):
    seq, start, length, tile = find_tile(cu_ptr, num_seqs, tl.program_id(0), BLOCK)
    out_ptr += tl.program_id(0) * 4
    tl.store(out_ptr, seq)
    tl.store(out_ptr + 1, start)
    tl.store(out_ptr + 2, length)
    tl.store(out_ptr + 3, tile)


@pytest.mark.parametrize(
    "lens", [(1,), (0, 5), (4, 4, 4), (3, 0, 0, 9, 1), (0, 0), (8, 1, 1, 1, 16, 7, 0), (1,) * 9], ids=str
)
def test_every_tile_of_every_sequence_is_found_once(lens):
    cu = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
    found = torch.full((num_tiles(sum(lens), cu, 4), 4), -1, dtype=torch.int32)
    _tiles_kernel[(len(found),)](cu, found, len(lens), 4)
    used = [row for row in found.tolist() if row[3] * 4 < row[2]]
    assert sorted(used) == [[s, cu[s], n, tile] for s, n in enumerate(lens) for tile in range(-(-n // 4))]


def test_shapes_and_dtypes_that_do_not_fit():
    q, k, cu = torch.zeros(4, 6, 16), torch.zeros(4, 4, 16), torch.tensor([0, 4], dtype=torch.int32)
    for bad in [(q, k, k, cu), (q, k[:, :3], k[:, :2], cu), (q, q.half(), q, cu), (q, q, q, cu.long())]:
        with pytest.raises(ValueError, match="attention_packed"):
            attention_packed(*bad, 0.25)
