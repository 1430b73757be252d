import pytest
import torch

from isheep.model import ops
from isheep_kernels.swiglu import swiglu, swiglu_ref
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn


@needs_compiler
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (67, 331)], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "saturated"])
def test_value_and_gradients(shape, size, dtype):
    gate = (randn(*shape, seed=0) * size).to(dtype)
    up, dy = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    got = value_and_gradients(ops.swiglu, gate, up, dy)
    ref = value_and_gradients(swiglu_ref, gate, up, dy)
    truth = value_and_gradients(swiglu_ref, *(x.double() for x in (gate, up, dy)))
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)


@needs_compiler
def test_extremes_neither_overflow_nor_become_nan():
    y = ops.swiglu(torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]), torch.ones(7))
    assert y[:4].abs().max() < 1e-33 and torch.equal(y[4:], torch.tensor([88.0, 200.0, 1e30]))


def value_and_gradients(function, gate, up, dy):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = function(gate, up)
    y.backward(dy)
    return y.detach(), gate.grad, up.grad


@INTERPRETED
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (67, 331)], ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "saturated"])
def test_the_triton_kernel(shape, size, dtype):
    gate = (randn(*shape, seed=0) * size).to(dtype)
    up, dy = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    assert_kernel_is_as_good_as(swiglu, swiglu_ref, {"gate": gate, "up": up}, {}, [dy])


def test_the_triton_kernel_at_extremes():
    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
    y = swiglu(gate, torch.ones(7))
    assert y[:4].abs().max() < 1e-33 and torch.equal(y[4:], gate[4:])
