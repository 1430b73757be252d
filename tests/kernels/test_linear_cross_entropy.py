import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from isheep.model import ops
from isheep_kernels.linear_cross_entropy import IGNORE, linear_cross_entropy_ref
from tests.kernels.yardstick import DTYPES, assert_as_good_as, randn

T, C, V = 53, 24, 331


def problem(dtype=torch.float32, masked=0.3):
    hidden, weight = randn(T, C, seed=0, dtype=dtype), randn(V, C, seed=1, dtype=dtype)
    targets = torch.randint(V, (T,), generator=torch.Generator().manual_seed(2))
    targets[torch.rand(T, generator=torch.Generator().manual_seed(3)) < masked] = IGNORE
    return hidden, weight, targets, torch.rand(T, generator=torch.Generator().manual_seed(4))


def value_and_gradient(function, hidden, grad):
    hidden = hidden.clone().requires_grad_()
    nll = function(hidden)
    nll.backward(grad.to(nll.dtype))
    return nll.detach(), hidden.grad


@DTYPES
@pytest.mark.parametrize("chunk", [1, 7, 53, 1000])
def test_value_and_gradient(chunk, dtype):
    hidden, weight, targets, grad = problem(dtype)
    got = value_and_gradient(lambda h: ops.linear_cross_entropy(h, weight, targets, chunk), hidden, grad)
    ref = value_and_gradient(lambda h: linear_cross_entropy_ref(h, weight, targets), hidden, grad)
    wide = [x.double() for x in (hidden, weight)]
    truth = value_and_gradient(
        lambda h: F.cross_entropy(h @ wide[1].t(), targets, ignore_index=IGNORE, reduction="none"),
        wide[0],
        grad.double(),
    )
    assert got[0].dtype == torch.float32
    assert_as_good_as(got[0], ref[0], truth[0])
    assert_as_good_as(got[1], ref[1], truth[1])


def test_nothing_to_learn_from_is_zero():
    hidden, weight, _, grad = problem()
    nothing = torch.full((T,), IGNORE)
    nll, by_hidden = value_and_gradient(lambda h: ops.linear_cross_entropy(h, weight, nothing, 8), hidden, grad)
    assert not nll.any() and not by_hidden.any()


def test_a_target_outside_the_vocabulary_is_an_error():
    hidden, weight, targets, _ = problem()
    targets[5] = V
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        ops.linear_cross_entropy(hidden, weight, targets, 8)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_all_logits_are_never_held():
    hidden, weight, targets, grad = problem(masked=0)
    with Largest() as chunked:
        value_and_gradient(lambda h: ops.linear_cross_entropy(h, weight, targets, 8), hidden, grad)
    assert chunked.numel == max(8 * V, weight.numel())  # the transposed view of the weight counts too
    with Largest() as whole:
        value_and_gradient(lambda h: linear_cross_entropy_ref(h, weight, targets), hidden, grad)
    assert whole.numel == T * V  # what the mode would have seen
