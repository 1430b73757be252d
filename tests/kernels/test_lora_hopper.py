"""The Hopper form of `lora_matmul`'s product, in an interpreter of our own: Triton has none for Gluon."""

import pytest
import torch

from isheep_kernels import hopper, lora_hopper, lora_matmul
from isheep_kernels.lora_matmul import lora_matmul_ref, lora_matmuls
from tests.kernels.fence import assert_kernel_is_as_good_as
from tests.kernels.gluon_interpreter import interpret
from tests.kernels.yardstick import randn

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
SHAPES = [(130, 72, 264, 8), (65, 264, 40, 80), (300, 128, 512, 16)]  # T, K, N, R: no tile divides the first two


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setenv("ISHEEP_KERNELS", "hopper")
    monkeypatch.setattr(hopper, "capability", lambda x: 90)


def inputs(T, K, N, R, dtype):
    names = {"x": (T, K), "a": (R, K), "b": (N, R)}
    tensors = {
        name: randn(*shape, seed=i, dtype=dtype) / shape[-1] ** 0.5 for i, (name, shape) in enumerate(names.items())
    }
    return tensors, {"w": randn(N, K, seed=7, dtype=dtype) / K**0.5}, randn(N, seed=8, dtype=dtype)


@HALVES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_value_and_gradients(on_hopper, monkeypatch, shape, bias, dtype):
    """Forward by rows of w, backward by its columns."""
    trained, frozen, more = inputs(*shape, dtype)
    frozen |= {"bias": more} if bias else {}
    kernels = interpret(monkeypatch, lora_hopper, seed=shape[0])
    # what surrounds the product runs in Triton's interpreter, for which bf16 is not there
    monkeypatch.setattr(lora_matmul, "_down", lambda x, a, dropout=None: (x.float() @ a.float().t())[None])
    monkeypatch.setattr(lora_matmul, "_outer", lambda low, x, s, dropout=None: s * low.sum(0).t() @ x.float())

    def kernel(x, a, b, w, bias=None):
        return lora_matmul.lora_matmul(x, w, bias, a, b, 2.0)

    def reference(x, a, b, w, bias=None):
        return lora_matmul_ref(x, w, bias, a, b, 2.0)

    grads = [randn(shape[0], shape[2], seed=9, dtype=dtype)]
    assert_kernel_is_as_good_as(kernel, reference, trained, frozen, grads)
    assert [kernel.launches for kernel in kernels.values()] == [2]


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_events(on_hopper, monkeypatch, seed):
    """More tiles than programs; a second projection's gradient of x is added to the first's."""
    trained, frozen, _ = inputs(390, 200, 264, 8, torch.float16)
    interpret(monkeypatch, lora_hopper, seed)

    def both(function):
        def sum_of_two(x, a, b, w):
            return sum(function(x, w, a, b))

        return sum_of_two

    two = both(lambda x, w, a, b: lora_matmuls(x, [lora_matmul.Projection(w, None, p, b, 1.0) for p in (a, 2 * a)]))
    ref = both(lambda x, w, a, b: [lora_matmul_ref(x, w, None, p, b, 1.0) for p in (a, 2 * a)])
    assert_kernel_is_as_good_as(two, ref, trained, frozen, [randn(390, 264, seed=9, dtype=torch.float16)])


def test_what_they_do_not_take(on_hopper, monkeypatch):
    x, w = torch.zeros(128, 64).half(), torch.zeros(64, 64).half()
    assert lora_hopper.serves(x, w, 16) and lora_hopper.serves(x, w.t(), 16)
    assert not lora_hopper.serves(x, w, 12)  # rows of 24 bytes
    assert not lora_hopper.serves(x[:, :60], w[:, :60].contiguous(), 16)
    assert not lora_hopper.serves(x.float(), w.float(), 16)
    assert not lora_hopper.serves(x[:0], w, 16) and not lora_hopper.serves(x, w, 0)
    assert not lora_hopper.serves(x[:1].expand(128, 64), w, 16)
    assert not lora_hopper.serves(x, torch.zeros(64 * 64 + 1).half()[1:].view(64, 64), 16)  # where it begins
    with monkeypatch.context() as ampere:
        ampere.setattr(hopper, "capability", lambda x: 80)
        assert not lora_hopper.serves(x, w, 16)
    monkeypatch.setenv("ISHEEP_KERNELS", "")
    assert not lora_hopper.serves(x, w, 16)
