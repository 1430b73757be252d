import pytest
import torch

from isheep_kernels import cpu_ops
from isheep_kernels.rope import rope, rope_, rope_ref
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as, fenced
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn


def angles(num_tokens: int, head_dim: int):
    positions = torch.arange(num_tokens, dtype=torch.float64) * 37
    turns = positions[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    return turns.cos().float(), turns.sin().float()


def cpp_rope(x, cos, sin):
    return cpu_ops.rope(x, x, cos, sin)[0]


@needs_compiler
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2), (13, 3, 16), (71, 5, 64), (41, 9, 80), (7, 2, 128)], ids=str)
def test_value_and_gradient(shape, dtype):
    x, dy = randn(*shape, seed=0, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    cos, sin = angles(shape[0], shape[2])
    got = value_and_gradient(cpp_rope, x, cos, sin, dy)
    ref = value_and_gradient(rope_ref, x, cos, sin, dy)
    truth = value_and_gradient(rope_ref, x.double(), cos.double(), sin.double(), dy.double())
    assert_as_good_as(got[0], ref[0], truth[0])
    assert_as_good_as(got[1], ref[1], truth[1])


@needs_compiler
def test_the_input_and_the_incoming_gradient_are_left_alone():
    x, dy, (cos, sin) = randn(6, 2, 16, seed=0), randn(6, 2, 16, seed=1), angles(6, 16)
    kept_x, kept_dy = x.clone(), dy.clone()
    value_and_gradient(cpp_rope, x, cos, sin, dy)
    assert torch.equal(x, kept_x) and torch.equal(dy, kept_dy)


def test_lengths_are_kept():
    x = randn(30, 4, 32, seed=0).double()
    cos, sin = (a.double() for a in angles(30, 32))
    cos, sin = cos / (cos**2 + sin**2).sqrt(), sin / (cos**2 + sin**2).sqrt()
    assert torch.allclose(rope_ref(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def value_and_gradient(function, x, cos, sin, dy):
    x = x.clone().requires_grad_()
    y = function(x, cos, sin)
    y.backward(dy)
    return y.detach(), x.grad


@INTERPRETED
@pytest.mark.parametrize(("T", "H", "G", "D"), [(1, 1, 1, 2), (5, 9, 3, 16), (7, 17, 8, 80), (3, 8, 8, 64)], ids=str)
def test_the_triton_kernel(T, H, G, D, dtype):
    q, k, dq, dk = (randn(T, h, D, seed=i, dtype=dtype) for i, h in enumerate([H, G, H, G]))
    cos, sin = angles(T, D)

    def reference(q, k, cos, sin):
        return rope_ref(q, cos, sin), rope_ref(k, cos, sin)

    frozen = {"cos": cos, "sin": sin}
    assert_kernel_is_as_good_as(rope, reference, {"q": q, "k": k}, frozen, [dq, dk])


def test_the_triton_kernel_in_place_on_slices_of_one_product():
    """q, k and v may be slices of one projection: v, between and beside them, is left alone."""
    qkv, (cos, sin) = fenced(randn(6, 8, 16, seed=0)), angles(6, 16)
    q, k, v = qkv.split([3, 2, 3], dim=1)
    kept = qkv.clone()
    rope_(q, k, cos, sin)
    assert torch.allclose(q, rope_ref(kept[:, :3], cos, sin), atol=1e-6)
    assert torch.allclose(k, rope_ref(kept[:, 3:5], cos, sin), atol=1e-6)
    assert torch.equal(v, kept[:, 5:])


def test_the_triton_kernel_refuses_what_does_not_fit():
    q, (cos, sin) = torch.zeros(3, 2, 8), angles(3, 8)
    with pytest.raises(ValueError, match="gradient"):
        rope_(q.clone().requires_grad_(), q, cos, sin)
    with pytest.raises(ValueError, match=r"cos \(3, 3\)"):
        rope(q, q, cos[:, :3], sin)
