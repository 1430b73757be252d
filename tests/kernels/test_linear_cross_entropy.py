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


def assert_kernels_are_right(dtype, vocabulary=331):
    """On shapes that no block divides, two chunks where a chunk is of 128 rows, the second without a counted one."""
    hidden, weight, targets = sizes(150, 70, vocabulary, dtype, masked=0.3)
    grad = torch.rand(150, generator=torch.Generator().manual_seed(4))
    frozen = {"weight": weight, "targets": targets}
    assert_kernel_is_as_good_as(fused_linear_cross_entropy, reference, {"hidden": hidden}, frozen, [grad])


@INTERPRETED
@pytest.mark.parametrize("extra", [10**9, 1], ids=["at once", "a block at a time"])
def test_the_triton_kernels(extra, dtype, monkeypatch):
    monkeypatch.setattr(module, "EXTRA_BYTES", extra)
    assert_kernels_are_right(dtype)


@INTERPRETED
@pytest.mark.parametrize("splits", [1, 2, 3, 40])
@pytest.mark.parametrize("vocabulary", [331, 320])
def test_programs_that_share_the_vocabulary(vocabulary, splits, dtype, monkeypatch):
    """Forty are more than there are steps to share; the steps of 320 columns are whole, their shares uneven."""
    monkeypatch.setattr(module, "_shares", lambda *_: (128, splits))
    assert_kernels_are_right(dtype, vocabulary)


@INTERPRETED
def test_the_shares_that_a_chip_would_choose(dtype, monkeypatch):
    chosen, shares = [], module._shares
    monkeypatch.setattr(module, "_multiprocessors", lambda _: 10)
    monkeypatch.setattr(module, "SPLIT_COST", 1)
    monkeypatch.setattr(module, "_shares", lambda *args: chosen.append(shares(*args)) or chosen[-1])
    assert_kernels_are_right(dtype)
    assert [splits > 1 for _, splits in chosen] == [True]


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


CHIPS = {80: 108, 90: 132}  # multiprocessors


def shares(num_tokens, width, vocabulary, chip, gradient=True):
    """By arithmetic, in bf16: rows a chunk, splits, the bytes they take beside the result, and the tiles of dh."""
    tile, dh_tile = (module._tile(n, torch.bfloat16, chip) for n in (vocabulary, width))
    rows, splits = module._shares(num_tokens, width, vocabulary, 2, tile, dh_tile, CHIPS[chip], gradient)
    assert rows % tile["BLOCK_M"] == 0
    row_bytes = 8 * -(-vocabulary // tile["BLOCK_N"]) + (2 * vocabulary if gradient else 0)
    tiles = rows // dh_tile["BLOCK_M"] * -(-width // dh_tile["BLOCK_N"]) * splits
    return rows, splits, rows * (row_bytes + (4 * splits * width if splits > 1 else 0)), tiles


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 128, 700, 8192, 10**7])
def test_extra_memory_at_the_largest_vocabulary(num_tokens, gradient, chip):
    for width in (64, 576, 1024, 3584, 5120, 8192, 16384):
        rows, splits, extra, _ = shares(num_tokens, width, 152_064, chip, gradient)
        assert extra <= 256_000_000 and splits <= (32 if gradient else 1)
        assert rows >= min(num_tokens, 384)  # the weight is read twice a chunk


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("width", [576, 896, 1024, 1536, 2048, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize("vocabulary", [49_152, 128_256, 152_064])
def test_dh_fills_the_chip(vocabulary, width, chip):
    _, _, _, tiles = shares(8192, width, vocabulary, chip)
    waves = -(-tiles // CHIPS[chip])
    assert tiles >= 0.9 * waves * CHIPS[chip]


def test_a_vocabulary_is_not_split_where_nothing_is_gained():
    assert shares(8192, 8192, 152_064, 90)[1] == 1  # 4 blocks of rows by 32 of columns: 128 tiles
    assert shares(8192, 4096, 152_064, 90)[1] == 2
    tile = module._tile(100, torch.float32, 80)
    assert module._shares(8192, 100, 100, 4, tile, tile, 1, True)[1] == 1  # one program at a time
