import pytest
import torch

from isheep.model import ops
from isheep.model.batch import PackedBatch
from isheep_kernels.attention_packed import attention_packed_ref
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
