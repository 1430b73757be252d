"""What a forgotten mask cannot hide from: NaN around each input, and NaN in each output before it is written."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.yardstick import assert_as_good_as

INTERPRETED = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])  # bf16 is wrong

Inputs = dict[str, Tensor]


def fenced(x: Tensor) -> Tensor:
    """x, contiguous, in the middle of a buffer of NaN (of huge numbers, where the dtype has no NaN)."""
    fill = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    buffer = torch.full((x.numel() + 128,), fill, dtype=x.dtype, device=x.device)
    return buffer[64 : 64 + x.numel()].view(x.shape).copy_(x)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what torch.empty and its kin make is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def with_gradients(function: Callable, inputs: Inputs, frozen: Inputs, grads: list[Tensor]) -> list[Tensor]:
    """The outputs of function(**inputs, **frozen), then the gradients of `inputs` for outputs' gradients `grads`."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = function(**inputs, **frozen)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    return [y.detach() for y in outputs] + [x.grad for x in inputs.values()]


def assert_kernel_is_as_good_as(
    kernel: Callable, reference: Callable, inputs: Inputs, frozen: Inputs, grads: list[Tensor]
) -> None:
    """The yardstick, on every output and every gradient of `inputs`, between fences and over poison."""

    def wide(tensors: Inputs) -> Inputs:
        return {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}

    with poisoned():
        around = ({name: fenced(x) for name, x in tensors.items()} for tensors in (inputs, frozen))
        got = with_gradients(kernel, *around, [fenced(g) for g in grads])
    ref = with_gradients(reference, inputs, frozen, grads)
    truth = with_gradients(reference, wide(inputs), wide(frozen), [g.double() for g in grads])
    for triple in zip(got, ref, truth, strict=True):
        assert_as_good_as(*triple)
