import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from isheep.model import ops
from isheep_kernels import linear_cross_entropy as module
from isheep_kernels.linear_cross_entropy import IGNORE, fused_linear_cross_entropy, linear_cross_entropy_ref
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as, fenced, poisoned
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


# ---- the Triton kernels, in the interpreter --------------------------------------------------------------------------


def sizes(num_tokens, width, vocabulary, dtype, masked):
    hidden, weight = randn(num_tokens, width, seed=0, dtype=dtype), randn(vocabulary, width, seed=1, dtype=dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=torch.Generator().manual_seed(2))
    targets[torch.rand(num_tokens, generator=torch.Generator().manual_seed(3)) < masked] = IGNORE
    return hidden, weight, targets


def reference(hidden, weight, targets):
    if hidden.dtype == torch.float64:  # the definition's loss is fp32
        return F.cross_entropy(hidden @ weight.t(), targets, ignore_index=IGNORE, reduction="none")
    return linear_cross_entropy_ref(hidden, weight, targets)


@INTERPRETED
@pytest.mark.parametrize("extra", [10**9, 1], ids=["at once", "a block at a time"])
def test_the_triton_kernels(extra, dtype, monkeypatch):
    monkeypatch.setattr(module, "EXTRA_BYTES", extra)
    hidden, weight, targets = sizes(150, 70, 331, dtype, masked=0.3)
    grad = torch.rand(150, generator=torch.Generator().manual_seed(4))
    frozen = {"weight": weight, "targets": targets}
    assert_kernel_is_as_good_as(fused_linear_cross_entropy, reference, {"hidden": hidden}, frozen, [grad])


@INTERPRETED
def test_the_triton_kernels_on_single_rows(dtype):
    """Forty of them, since the error of one is luck."""
    hidden, weight, targets = sizes(40, 70, 90, dtype, masked=0.3)
    grad = torch.rand(40, generator=torch.Generator().manual_seed(4))

    def kernel(hidden, weight, targets):
        rows = zip(hidden.split(1), targets.split(1), strict=True)
        return torch.cat([fused_linear_cross_entropy(h, weight, t) for h, t in rows])

    frozen = {"weight": weight, "targets": targets}
    assert_kernel_is_as_good_as(kernel, reference, {"hidden": hidden}, frozen, [grad])


@INTERPRETED
def test_the_triton_kernels_without_gradient(dtype):
    inputs = dict(zip(("hidden", "weight", "targets"), sizes(150, 70, 331, dtype, masked=0.3)))
    with poisoned(), torch.no_grad():
        got = fused_linear_cross_entropy(**{name: fenced(x) for name, x in inputs.items()})
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    assert_as_good_as(got, reference(**inputs), reference(**wide))


def test_the_triton_kernels_with_nothing_to_learn_from():
    hidden, weight, targets = sizes(70, 10, 20, torch.float32, masked=2)
    nll, by_hidden = value_and_gradient(
        lambda h: fused_linear_cross_entropy(h, weight, targets), hidden, torch.ones(70)
    )
    assert not nll.any() and not by_hidden.any()
    assert fused_linear_cross_entropy(hidden[:0], weight, targets[:0]).shape == (0,)


def test_a_target_outside_the_vocabulary_is_nan_in_triton():
    hidden, weight, targets = sizes(70, 10, 20, torch.float32, masked=0)
    targets[3], targets[7], targets[11] = 20, -1, 1 << 40
    nll, by_hidden = value_and_gradient(
        lambda h: fused_linear_cross_entropy(h, weight, targets), hidden, torch.ones(70)
    )
    bad = torch.isin(torch.arange(70), torch.tensor([3, 7, 11]))
    assert torch.equal(nll.isnan(), bad) and torch.equal(by_hidden.isnan().all(1), bad)
    assert torch.equal(by_hidden.isnan().any(1), bad)


def test_the_triton_kernels_hold_a_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(module, "EXTRA_BYTES", 1)  # one block of 64 rows
    hidden, weight, targets = sizes(260, 7, 131, torch.float32, masked=0)
    with Largest() as fused:
        value_and_gradient(lambda h: fused_linear_cross_entropy(h, weight, targets), hidden, torch.ones(260))
    assert fused.numel == 64 * 131 * 4  # the interpreter looks at the logits as bytes
    assert fused.numel < 260 * 131


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 8192, 10**7])
def test_extra_memory_at_the_largest_vocabulary(num_tokens, gradient):
    """By arithmetic: logits in bf16, and a largest and a sum for each tile of each row in a chunk."""
    for chip in (80, 90):
        tile = module._tile(torch.bfloat16, chip)
        tiles = -(-152_064 // tile["BLOCK_N"])
        rows = module._chunk_rows(num_tokens, 152_064, tiles, torch.bfloat16, tile["BLOCK_M"], gradient)
        assert rows % tile["BLOCK_M"] == 0 and rows >= min(num_tokens, 640)
        assert rows * (8 * tiles + (2 * 152_064 if gradient else 0)) <= 256_000_000
