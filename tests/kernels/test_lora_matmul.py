import pytest
import torch

from isheep.model import ops
from isheep_kernels.lora_matmul import lora_matmul_ref
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn

SCALE = 2.0


def problem(dtype, T=37, K=50, N=71, r=3, bias=True):
    x, w, dy = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(T, K), (N, K), (T, N)]))
    a, b = randn(r, K, seed=5), randn(N, r, seed=6)
    return (x, w, randn(N, seed=7, dtype=dtype) if bias else None, a, b), dy


def value_and_gradients(function, x, w, bias, a, b, dy):
    x, a, b = (t.clone().requires_grad_() for t in (x, a, b))
    y = function(x, w, bias, a, b)
    y.backward(dy)
    return y.detach(), x.grad, a.grad, b.grad


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_training_without_dropout(bias, dtype):
    args, dy = problem(dtype, bias=bias)
    got = value_and_gradients(lambda x, w, c, a, b: ops.lora_linear_train(x, w, c, a, b, SCALE, 0.0, 0), *args, dy)
    ref = value_and_gradients(lambda x, w, c, a, b: lora_matmul_ref(x, w, c, a, b, SCALE), *args, dy)
    wide = [t if t is None else t.double() for t in args]
    truth = value_and_gradients(lambda x, w, c, a, b: lora_matmul_ref(x, w, c, a, b, SCALE), *wide, dy.double())
    assert got[2].dtype == got[3].dtype == torch.float32  # the adapter's own
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("T", "r"), [(37, 3), (40, 8), (1, 11), (300, 16)], ids=str)
def test_training_with_dropout_in_cpp(T, r, dtype):
    """Ranks in and out of steps of eight; a column count that no vector divides; the key's high half counts too."""
    (x, w, bias, a, b), dy = problem(dtype, T=T, r=r)
    p, key = 0.25, (5 << 40) + 11

    def both(function, *args):
        return value_and_gradients(lambda x, w, c, a, b: function(x, w, c, a, b, SCALE, p, key), *args)

    got = both(ops.lora_linear_train, x, w, bias, a, b, dy)
    ref = both(lora_matmul_ref, x, w, bias, a, b, dy)
    truth = both(lora_matmul_ref, *(t.double() for t in (x, w, bias, a, b, dy)))
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)


@needs_compiler
@DTYPES
def test_the_gradient_of_an_input_that_needs_none_is_not_made(dtype):
    (x, w, bias, a, b), dy = problem(dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    ops.lora_linear_train(x, w, bias, a, b, SCALE, 0.5, 3).backward(dy)
    assert x.grad is None and a.grad.any() and b.grad.any()


def test_training_with_dropout():
    """The same mask in forward and backward, on the adapter's input alone, survivors scaled by 1 / (1 − p)."""
    (x, w, bias, a, b), dy = problem(torch.float64)
    p, key = 0.25, 11
    keep = ops.dropout_mask(x, p, key).double() / (1 - p)

    def reference(x, w, bias, a, b):
        return x @ w.t() + bias + SCALE * ((x * keep) @ a.t()) @ b.t()

    a, b = a.double(), b.double()
    got = value_and_gradients(
        lambda x, w, c, a, b: ops.lora_linear_train(x, w, c, a, b, SCALE, p, key), x, w, bias, a, b, dy
    )
    expected = value_and_gradients(reference, x, w, bias, a, b, dy)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_dropout_mask_keeps_its_share_everywhere():
    """Five standard deviations over all, each row and each column."""
    p, like = 0.05, torch.empty(1001, 999)
    kept = ops.dropout_mask(like, p, 7).float()
    assert kept.shape == like.shape
    for share, n in ((kept.mean(), like.numel()), (kept.mean(0), 1001), (kept.mean(1), 999)):
        assert (share - (1 - p)).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


def test_dropout_mask_is_a_function_of_its_key():
    like = torch.empty(64, 65, dtype=torch.bfloat16)
    first = ops.dropout_mask(like, 0.5, 1)
    torch.rand(10)  # other random numbers in between change nothing
    assert torch.equal(first, ops.dropout_mask(like, 0.5, 1))
    agree = (first == ops.dropout_mask(like, 0.5, 2)).float().mean()
    assert 0.45 < agree < 0.55


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_dropout_mask_of_a_few_elements(n):
    assert ops.dropout_mask(torch.empty(n), 0.5, 3).shape == (n,)
    assert ops.dropout_mask(torch.empty(n), 0.0, 3).all()
