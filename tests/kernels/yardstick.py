"""How good a kernel must be: no further from the truth than twice what torch's definition in the same dtype is."""

import pytest
import torch
from torch import Tensor

from isheep_kernels import cpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here: torch's definitions serve")


def assert_as_good_as(got: Tensor, ref: Tensor, truth: Tensor) -> None:
    """max|got − truth| ≤ 2 · max|ref − truth|. `truth` is the definition computed in fp64 from the same inputs.

    Where the definition happens to hit the truth, half a unit in the last place of the largest value is allowed.
    """
    assert truth.dtype == torch.float64 and got.dtype == ref.dtype and got.shape == ref.shape == truth.shape
    assert not got.isnan().any()
    allowed = 2 * (ref.double() - truth).abs().max().item()
    floor = torch.finfo(got.dtype).eps / 2 * truth.abs().max().item()
    assert (got.double() - truth).abs().max().item() <= max(allowed, floor)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
