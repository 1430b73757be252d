import pytest
import torch
from torch.utils.checkpoint import checkpoint

from isheep.model import ops
from isheep_kernels import cpu_ops
from isheep_kernels import lora_matmul as lora
from isheep_kernels.lora_matmul import (
    FUSED_UP_TO,
    Dropout,
    Projection,
    dropout_mask,
    lora_matmul,
    lora_matmul_ref,
    lora_matmuls,
)
from tests.kernels.fence import INTERPRETED, assert_kernel_is_as_good_as, fenced, poisoned
from tests.kernels.yardstick import DTYPES, assert_as_good_as, needs_compiler, randn

SCALE = 2.0


def names(*rows):
    """[T] int64 for rows of (index, number of tokens)."""
    return torch.cat([torch.arange(n) + (row << 32) for row, n in rows])


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
    got = value_and_gradients(lambda x, w, c, a, b: ops.lora_linear_train(x, w, c, a, b, SCALE), *args, dy)
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
    """Ranks in and out of steps of eight; a column count that no vector divides; big numbers for key and rows."""
    (x, w, bias, a, b), dy = problem(dtype, T=T, r=r)
    tokens = names((2**31 - 1, T // 3), (7, T - T // 3 - T // 5), (0, T // 5))
    dropout = Dropout(0.25, 2**63 - 11, tokens)

    def both(function, *args):
        return value_and_gradients(lambda x, w, c, a, b: function(x, w, c, a, b, SCALE, dropout), *args)

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
    ops.lora_linear_train(x, w, bias, a, b, SCALE, Dropout(0.5, 3, names((1, len(x))))).backward(dy)
    assert x.grad is None and a.grad.any() and b.grad.any()


def test_training_with_dropout():
    """The same mask in forward and backward, on the adapter's input alone, survivors scaled by 1 / (1 − p)."""
    (x, w, bias, a, b), dy = problem(torch.float64)
    dropout = Dropout(0.25, 11, names((3, 20), (2, 17)))
    keep = dropout_mask(x, *dropout).double() / 0.75

    def reference(x, w, bias, a, b):
        return x @ w.t() + bias + SCALE * ((x * keep) @ a.t()) @ b.t()

    a, b = a.double(), b.double()
    got = value_and_gradients(
        lambda x, w, c, a, b: ops.lora_linear_train(x, w, c, a, b, SCALE, dropout), x, w, bias, a, b, dy
    )
    expected = value_and_gradients(reference, x, w, bias, a, b, dy)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5)


KEY = (5 << 40) + 11


@needs_compiler
@pytest.mark.parametrize("key", [0, 1, KEY, 2**63 - 1])
def test_cpp_draws_the_same_numbers(key):
    """Bit for bit: an identity for `a` lets `lora_down` hand the mask out, and ones for `low` those of the way back."""
    tokens = names((0, 5), (1, 3), (2**31 - 1, 4), (123_456, 7))
    dropout, eye = Dropout(0.4, key, tokens), torch.eye(35)
    ones = torch.ones(len(tokens), 35)
    expected = dropout_mask(ones, *dropout)
    assert torch.equal(cpu_ops.lora_down(ones, eye, dropout), expected.float())
    back = torch.zeros(len(tokens), 35)
    cpu_ops.lora_add(back, ones, eye, dropout)
    assert torch.equal(back, expected.float())
    assert torch.equal(cpu_ops.lora_outer(torch.eye(len(tokens)), ones, dropout), expected.float())


def test_a_row_draws_the_same_wherever_it_is_packed():
    """Alone, first, last, in another order: its part of the mask does not change, forward and in each gradient."""
    (x, w, bias, a, b), dy = problem(torch.float32, T=12)
    alone = dropout_mask(x, 0.5, KEY, names((4, 12)))
    for rows in ([(9, 5), (4, 12), (3, 1)], [(4, 12), (3, 7)], [(3, 7), (9, 5), (4, 12)]):
        tokens = names(*rows)
        start = (tokens >> 32 == 4).nonzero()[0].item()
        packed = dropout_mask(torch.empty(len(tokens), 50), 0.5, KEY, tokens)
        assert torch.equal(packed[start : start + 12], alone)
        around = torch.zeros(len(tokens), 50), torch.zeros(len(tokens), 71)
        for whole, part in zip(around, (x, dy), strict=True):
            whole[start : start + 12] = part
        one = value_and_gradients(_train(Dropout(0.5, KEY, names((4, 12)))), x, w, bias, a, b, dy)
        more = value_and_gradients(_train(Dropout(0.5, KEY, tokens)), around[0], w, bias, a, b, around[1])
        for ours, theirs in zip(more, one, strict=True):
            ours = ours[start : start + 12] if len(ours) == len(tokens) else ours
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def _train(dropout):
    return lambda x, w, c, a, b: ops.lora_linear_train(x, w, c, a, b, SCALE, dropout)


def test_dropout_mask_keeps_its_share_everywhere():
    """Five standard deviations over all, each token and each column."""
    p, like = 0.05, torch.empty(1001, 999)
    kept = dropout_mask(like, p, 7, names((0, 400), (1, 400), (50, 201))).float()
    assert kept.shape == like.shape
    for share, n in ((kept.mean(), like.numel()), (kept.mean(0), 1001), (kept.mean(1), 999)):
        assert (share - (1 - p)).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


def test_dropout_mask_is_a_function_of_its_names():
    like = torch.empty(64, 65, dtype=torch.bfloat16)
    first = dropout_mask(like, 0.5, 1, names((6, 64)))
    torch.rand(10)  # other random numbers in between change nothing
    assert torch.equal(first, dropout_mask(like, 0.5, 1, names((6, 64))))


OTHERS = {  # (key, row, first position); the masks of (KEY, 6, 0) are what they are compared with
    "row": (KEY, 7, 0),
    "far row": (KEY, 6 + 2**20, 0),
    "position": (KEY, 6, 256),
    "layer": (KEY + 1, 6, 0),
    "far layer": (KEY + 209, 6, 0),
    "layer and row": (KEY + 1, 5, 0),
    "step": (KEY + (1 << 32), 6, 0),
}


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize(("key", "row", "start"), OTHERS.values(), ids=OTHERS)
def test_other_names_draw_independently(p, key, row, start):
    """The next row, positions, layer and step: as many elements dropped in both as chance has it (five deviations)."""
    like = torch.empty(256, 512)
    one = ~dropout_mask(like, p, KEY, names((6, 256)))
    other = ~dropout_mask(like, p, key, names((row, 256)) + start)
    for shift in (0, 1, 3):  # also against neighbours along either dimension
        for moved in (other.roll(shift, 0), other.roll(shift, 1)):
            deviation = (p * p * (1 - p * p) / like.numel()) ** 0.5
            assert abs((one & moved).float().mean().item() - p * p) < 5 * deviation


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_dropout_mask_of_a_few_elements(n):
    assert dropout_mask(torch.empty(1, n), 0.5, 3, names((0, 1))).shape == (1, n)
    assert dropout_mask(torch.empty(1, n), 0.0, 3, names((0, 1))).all()


# ---- the Triton kernels, in the interpreter --------------------------------------------------------------------------


def tensors(dtype, T, K, N, r, bias=True):
    """What is trained, what is frozen, and the output's gradient."""
    (x, w, c, a, b), dy = problem(dtype, T, K, N, r, bias)
    return {"x": x, "a": a, "b": b}, {"w": w} | ({"bias": c} if bias else {}), [dy]


def both(dropout=None):
    """(the kernel, the definition) as functions of named tensors."""

    def of(function):
        return lambda x, w, a, b, bias=None: function(x, w, bias, a, b, SCALE, dropout)

    return of(lora_matmul), of(lora_matmul_ref)


@pytest.fixture(params=["fused", "beside a library product"])
def fused(request, monkeypatch):
    """Both of what `FUSED_UP_TO` chooses from."""
    if request.param != "fused":
        monkeypatch.setitem(FUSED_UP_TO, 80, 0)


ODD = [(1, 1, 1, 1), (1, 50, 71, 3), (77, 150, 141, 19)]  # T, K, N, r: one row; nothing divides by a block


@INTERPRETED
@pytest.mark.parametrize(("T", "K", "N", "r"), ODD, ids=str)
def test_the_triton_kernels(T, K, N, r, dtype, fused):
    trained, frozen, grads = tensors(dtype, T, K, N, r)
    assert_kernel_is_as_good_as(*both(), trained, frozen, grads)


@INTERPRETED
def test_the_triton_kernels_with_dropout(dtype, fused):
    trained, frozen, grads = tensors(dtype, 77, 150, 141, 3, bias=False)
    dropout = Dropout(0.25, 2**63 - 11, names((2**31 - 1, 30), (7, 47)))
    assert_kernel_is_as_good_as(*both(dropout), trained, frozen, grads)


@INTERPRETED
@pytest.mark.parametrize(("T", "r"), [(1, 3), (13, 16), (40, 40), (70, 16)], ids=str)
def test_the_triton_kernels_without_gradients(T, r, dtype):
    """Few rows: x meets a on its way past w, or first where the rank is too wide for that. Many: first."""
    trained, frozen, _ = tensors(dtype, T, 150, 71, r)
    inputs = trained | frozen
    kernel, reference = both()
    with poisoned(), torch.no_grad():
        got = kernel(**{name: fenced(t) for name, t in inputs.items()})
    wide = {name: t.double() for name, t in inputs.items()}
    assert_as_good_as(got, reference(**inputs), reference(**wide))


def test_every_tile_is_made_once():
    """Eleven rows of tiles: a whole group of those walked side by side, and a part of one."""
    trained, frozen, grads = tensors(torch.float32, 700, 17, 130, 2)
    assert_kernel_is_as_good_as(*both(), trained, frozen, grads)


@pytest.mark.parametrize("dropped", [False, True], ids=["one pass", "a mask each"])
def test_projections_of_the_same_input(dropped):
    """As one at a time, ranks of their own included; the input's gradients are added."""
    x, shapes = randn(70, 50, seed=0), [(71, 3), (20, 5), (33, 16)]
    dropouts = [Dropout(0.5, KEY + i, names((4, 70))) if dropped else None for i in range(3)]
    frozen = [randn(N, 50, seed=i) for i, (N, r) in enumerate(shapes)]
    trained = [(randn(r, 50, seed=i), randn(N, r, seed=i + 9)) for i, (N, r) in enumerate(shapes)]
    grads = [randn(70, N, seed=i + 20) for i, (N, _) in enumerate(shapes)]

    def run(together):
        leaves = [t.clone().requires_grad_() for t in (x, *(t for pair in trained for t in pair))]
        pairs = list(zip(leaves[1::2], leaves[2::2]))
        projections = [Projection(w, None, *pair, SCALE, d) for w, pair, d in zip(frozen, pairs, dropouts)]
        ys = lora_matmuls(leaves[0], projections) if together else [lora_matmul(leaves[0], *p) for p in projections]
        torch.autograd.backward(list(ys), grads)
        return [*ys, *(t.grad for t in leaves)]

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=2e-4)


def test_a_checkpoint_does_not_make_its_last_product_again(monkeypatch):
    """Two layers: the product of the first is made again, that of the second is not; gradients are as without."""
    (x, w, bias, a, b), dy = problem(torch.float32, N=50)
    made = []
    count = lora._products
    monkeypatch.setattr(lora, "_products", lambda *args: made.append(args) or count(*args))

    def layers(x, w, bias, a, b):
        return lora_matmul(lora_matmul(x, w, bias, a, b, SCALE), w, bias, a, b, SCALE)

    def checkpointed(*args):
        return checkpoint(layers, *args, use_reentrant=False)

    plain = value_and_gradients(layers, x, w, bias, a, b, dy[:, :50])
    assert len(made) == 2
    again = value_and_gradients(checkpointed, x, w, bias, a, b, dy[:, :50])
    assert len(made) == 2 + 3
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("key", [0, 1, KEY, 2**32 - 1, 2**63 - 1])
@pytest.mark.parametrize("p", [0.05, 0.9])
def test_the_triton_kernels_draw_the_same_mask(p, key):
    """With a and b unit matrices and w = 0, an output is nothing but a kept element of x: forward, and dx backward."""
    tokens = names((2**31 - 1, 9), (0, 8)) + 3
    x = torch.ones(17, 40, requires_grad=True)
    args = torch.zeros(40, 40), None, torch.eye(40), torch.eye(40), 1 - p, Dropout(p, key, tokens)
    y = lora_matmul(x, *args)
    y.backward(torch.ones(17, 40))
    mask = dropout_mask(x, p, key, tokens).float()
    assert torch.equal(y.detach().round(), mask) and torch.equal(x.grad.round(), mask)


def test_stacked_adapters_are_one_of_the_summed_rank():
    (x, w, bias, a, b), _ = problem(torch.float32, r=12)
    y = lora_matmul(x, w, bias, a, b, SCALE)
    first = lora_matmul(x, w, bias, a[:5], b[:, :5], SCALE)
    second = lora_matmul(x, torch.zeros_like(w), None, a[5:], b[:, 5:], SCALE)
    assert torch.allclose(y, first + second, rtol=1e-5, atol=2e-4)


def test_the_triton_kernels_refuse_what_does_not_fit():
    (x, w, bias, a, b), _ = problem(torch.float32)
    with pytest.raises(ValueError, match=r"a \(2, 50\)"):
        lora_matmul(x, w, bias, a[:2], b, SCALE)
    with pytest.raises(ValueError, match="float64"):
        lora_matmul(x.double(), w, bias, a, b, SCALE)
    with pytest.raises(ValueError, match="37 rows"):
        lora_matmul(x, w, bias, a, b, SCALE, Dropout(0.5, 1, torch.arange(36)))
