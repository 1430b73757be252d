"""The Hopper kernels, in an interpreter of our own: Triton has none for Gluon."""

from itertools import accumulate

import pytest
import torch

from isheep_kernels import attention_hopper
from isheep_kernels.attention_packed import attention_packed_ref
from tests.kernels.fence import fenced
from tests.kernels.gluon_interpreter import Interpreted
from tests.kernels.yardstick import assert_as_good_as, randn

LENS = (1, 129, 0, 300, 64, 128, 0)  # around the tile of 128, one token, nothing, nothing at the end
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@pytest.fixture
def interpreted(monkeypatch):
    kernels = {}

    def use(seed):
        for name in ("_attention_hopper_kernel",):
            kernels[name] = Interpreted(getattr(attention_hopper, name), seed)
            monkeypatch.setattr(attention_hopper, name, kernels[name])
        return kernels

    return use


def inputs(heads, kv_heads, head_dim, dtype, lens=LENS):
    q, k, v = (randn(sum(lens), h, head_dim, seed=i, dtype=dtype) for i, h in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v, [0, *accumulate(lens)]


def lse_ref(q, k, ends, scale):
    """[H, T], divided by scale; as many key heads as query heads."""
    s = torch.einsum("thd,jhd->htj", q.double(), k.double()) * scale
    owner = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.tensor(ends).diff())
    sees = (owner[:, None] == owner) & torch.ones(len(q), len(q)).tril().bool()
    return s.masked_fill(~sees, -torch.inf).logsumexp(-1) / scale


@HALVES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(2, 1, 64), (2, 2, 128)])
def test_forward(interpreted, heads, kv_heads, head_dim, dtype):
    q, k, v, ends = inputs(heads, kv_heads, head_dim, dtype)
    scale = head_dim**-0.5
    kernels = interpreted(seed=heads)
    y, lse = attention_hopper.forward(*map(fenced, (q, k, v)), fenced(torch.tensor(ends, dtype=torch.int32)), scale)
    truth = attention_packed_ref(q.double(), k.double(), v.double(), ends, scale)
    assert_as_good_as(y, attention_packed_ref(q, k, v, ends, scale), truth)
    assert kernels["_attention_hopper_kernel"].launches == 1


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(interpreted, seed):
    """Few, long jobs and many short ones, at whatever pace the partitions go."""
    q, k, v, ends = inputs(2, 2, 64, torch.float16, (520, 3, 5, 2, 140))
    interpreted(seed)
    y, lse = attention_hopper.forward(q, k, v, torch.tensor(ends, dtype=torch.int32), 0.125)
    truth = attention_packed_ref(q.double(), k.double(), v.double(), ends, 0.125)
    assert_as_good_as(y, attention_packed_ref(q, k, v, ends, 0.125), truth)
    torch.testing.assert_close(lse.double(), lse_ref(q, k, ends, 0.125), rtol=1e-5, atol=1e-5)
