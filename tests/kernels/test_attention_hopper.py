"""The Hopper kernels, in an interpreter of our own: Triton has none for Gluon."""

from itertools import accumulate

import pytest
import torch

from isheep_kernels import attention_hopper, attention_hopper_backward, hopper
from isheep_kernels.attention_packed import attention_packed, attention_packed_ref
from tests.kernels.fence import fenced
from tests.kernels.gluon_interpreter import interpret
from tests.kernels.yardstick import assert_as_good_as, randn

LENS = (1, 129, 0, 300, 64, 128, 0)  # around the tile of 128, one token, nothing, nothing at the end
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


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
def test_forward(monkeypatch, heads, kv_heads, head_dim, dtype):
    q, k, v, ends = inputs(heads, kv_heads, head_dim, dtype)
    scale = head_dim**-0.5
    kernels = interpret(monkeypatch, attention_hopper, seed=heads)
    y, _ = attention_hopper.forward(*map(fenced, (q, k, v)), fenced(torch.tensor(ends, dtype=torch.int32)), scale)
    truth = attention_packed_ref(q.double(), k.double(), v.double(), ends, scale)
    assert_as_good_as(y, attention_packed_ref(q, k, v, ends, scale), truth)
    assert kernels["_attention_hopper_kernel"].launches == 1


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_events(monkeypatch, seed):
    """Few, long jobs and many short ones, at whatever pace the partitions go."""
    q, k, v, ends = inputs(2, 2, 64, torch.float16, (520, 3, 5, 2, 140))
    interpret(monkeypatch, attention_hopper, seed)
    y, lse = attention_hopper.forward(q, k, v, torch.tensor(ends, dtype=torch.int32), 0.125)
    truth = attention_packed_ref(q.double(), k.double(), v.double(), ends, 0.125)
    assert_as_good_as(y, attention_packed_ref(q, k, v, ends, 0.125), truth)
    torch.testing.assert_close(lse.double(), lse_ref(q, k, ends, 0.125), rtol=1e-5, atol=1e-5)


def gradients(q, k, v, dy, ends, scale):
    """Of q, k, v, by autograd through the definition; then what the kernel is given: y, lse, delta."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention_packed_ref(*leaves, ends, scale)
    return torch.autograd.grad(y, leaves, dy), (dy.double() * y.detach().double()).sum(-1).T.float().contiguous()


@HALVES
@pytest.mark.parametrize("add_dq", [True, False], ids=["dq", "no dq"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_backward(monkeypatch, heads, kv_heads, add_dq, dtype):
    q, k, v, ends = inputs(heads, kv_heads, 128, dtype)
    dy, scale, group = randn(*q.shape, seed=9, dtype=dtype), 128**-0.5, heads // kv_heads
    interpret(monkeypatch, attention_hopper_backward, seed=heads)
    ref, _ = gradients(q, k, v, dy, ends, scale)
    truth, delta = gradients(*(x.double() for x in (q, k, v, dy)), ends, scale)
    lse = lse_ref(q, k.repeat_interleave(group, 1), ends, scale).float()
    dq = torch.zeros(q.shape) if add_dq else None
    cu = fenced(torch.tensor(ends, dtype=torch.int32))
    dk, dv = attention_hopper_backward.backward(*map(fenced, (q, k, v, dy, lse, delta)), cu, scale, dq)
    got = ([dq.to(dtype)] if add_dq else []) + [dk, dv]
    for triple in list(zip(got[::-1], ref[::-1], truth[::-1], strict=False)):
        assert_as_good_as(*triple)


@pytest.mark.parametrize("seed", range(8))
def test_backward_in_any_order_of_events(monkeypatch, seed):
    q, k, v, ends = inputs(2, 1, 128, torch.float16, (260, 3, 2, 140))
    dy, scale = randn(*q.shape, seed=9, dtype=torch.float16), 0.09
    interpret(monkeypatch, attention_hopper_backward, seed)
    ref, _ = gradients(q, k, v, dy, ends, scale)
    truth, delta = gradients(*(x.double() for x in (q, k, v, dy)), ends, scale)
    lse, dq = lse_ref(q, k.repeat_interleave(2, 1), ends, scale).float(), torch.zeros(q.shape)
    dk, dv = attention_hopper_backward.backward(
        q, k, v, dy, lse, delta, torch.tensor(ends, dtype=torch.int32), scale, dq
    )
    for triple in zip((dq.half(), dk, dv), ref, truth, strict=True):
        assert_as_good_as(*triple)


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_packed_takes_them_where_they_are_asked_for(monkeypatch, deterministic):
    q, k, v, ends = inputs(2, 1, 128, torch.float16, (140, 1, 30))
    dy, cu = randn(*q.shape, seed=9, dtype=torch.float16), torch.tensor(ends, dtype=torch.int32)
    modules = attention_hopper, attention_hopper_backward
    kernels = [kernel for module in modules for kernel in interpret(monkeypatch, module, seed=3).values()]
    monkeypatch.setattr(hopper, "capability", lambda x: 90)
    for asked, launches in (("", 0), ("hopper", 1)):
        monkeypatch.setenv("ISHEEP_KERNELS", asked)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention_packed(*leaves, cu, 0.1, deterministic)
        got = y.detach(), *torch.autograd.grad(y, leaves, dy)
        assert [kernel.launches for kernel in kernels] == [launches, launches]
        ref = attention_packed_ref(q, k, v, ends, 0.1), *gradients(q, k, v, dy, ends, 0.1)[0]
        wide = [x.double() for x in (q, k, v)]
        truth = attention_packed_ref(*wide, ends, 0.1), *gradients(*wide, dy.double(), ends, 0.1)[0]
        for triple in zip(got, ref, truth, strict=True):
            assert_as_good_as(*triple)
