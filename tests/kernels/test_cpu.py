"""Which tensors the C++ kernels take."""

import pytest
import torch

from isheep.model import ops
from isheep_kernels import cpu


def test_the_definitions_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISHEEP_KERNELS", "torch")
    cpu.library.cache_clear()
    try:
        assert [ops.backend(torch.zeros(1, dtype=dtype)) for dtype in cpu.SUFFIX] == ["torch", "torch"]
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()


def test_what_has_no_kernel_is_left_to_torch() -> None:
    assert not any(map(cpu.serves, (torch.zeros(1).double(), torch.zeros(1).half(), torch.zeros(1, device="meta"))))
