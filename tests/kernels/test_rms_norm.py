import pytest
import torch

from isheep.model import ops
from isheep_kernels.rms_norm import rms_norm, rms_norm_add, rms_norm_ref
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn

EPS = 1e-5


@needs_compiler
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (37, 5, 16), (29, 80), (131, 577)], ids=str)
def test_value_and_gradient(shape, dtype):
    x, w, dy = (
        randn(*shape, seed=0, dtype=dtype),
        randn(shape[-1], seed=1, dtype=dtype),
        randn(*shape, seed=2, dtype=dtype),
    )
    y, dx = value_and_gradient(ops.rms_norm, x, w, dy)
    ref = value_and_gradient(rms_norm_ref, x, w, dy)
    truth = value_and_gradient(rms_norm_ref, x.double(), w.double(), dy.double())
    assert_as_good_as(y, ref[0], truth[0])
    assert_as_good_as(dx, ref[1], truth[1])


@needs_compiler
def test_rows_that_are_not_contiguous():
    x, w = randn(10, 12, seed=0).t(), randn(10, seed=1)
    assert torch.allclose(ops.rms_norm(x, w, EPS), rms_norm_ref(x, w, EPS), atol=1e-6)


def value_and_gradient(function, x, w, dy):
    x = x.clone().requires_grad_()
    y = function(x, w, EPS)
    y.backward(dy)
    return y.detach(), x.grad


SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 3, 80), (2, 1023), (130, 5)], ids=str)


@INTERPRETED
@SHAPES
def test_the_triton_kernel(shape, dtype):
    x, w, dy = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([shape, shape[-1:], shape]))
    inputs, frozen = {"x": x}, {"weight": w}
    assert_kernel_is_as_good_as(*(_with_eps(f) for f in (rms_norm, rms_norm_ref)), inputs, frozen, [dy])


@INTERPRETED
@SHAPES
def test_the_triton_kernel_adds_the_residual(shape, dtype):
    x, residual, dy, dtotal = (randn(*shape, seed=i, dtype=dtype) for i in range(4))
    frozen = {"weight": randn(shape[-1], seed=4, dtype=dtype)}

    def reference(x, residual, weight, eps):
        return rms_norm_ref(x + residual, weight, eps), x + residual

    both = [_with_eps(f) for f in (rms_norm_add, reference)]
    assert_kernel_is_as_good_as(*both, {"x": x, "residual": residual}, frozen, [dy, dtotal])


def test_the_triton_kernel_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"weight \(4,\)"):
        rms_norm(torch.zeros(2, 3), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.zeros(2, 3).double(), torch.ones(3), EPS)


def _with_eps(function):
    return lambda **tensors: function(**tensors, eps=EPS)
