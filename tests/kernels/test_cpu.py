"""Which tensors the C++ kernels take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isheep.model import ops
from isheep_kernels import cpu
from isheep_kernels.choice import asked_for


def test_the_definitions_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISHEEP_KERNELS", "torch")
    cpu.library.cache_clear()
    try:
        assert [ops.backend(torch.zeros(1, dtype=dtype)) for dtype in cpu.SUFFIX] == ["torch", "torch"]
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()


def test_an_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISHEEP_KERNELS", "triton")
    with pytest.raises(ValueError, match='ISHEEP_KERNELS is "triton" and can be torch, hopper, or be left out'):
        asked_for("")


def test_what_has_no_kernel_is_left_to_torch() -> None:
    assert not any(map(cpu.serves, (torch.zeros(1).double(), torch.zeros(1).half(), torch.zeros(1, device="meta"))))


def test_without_triton_the_model_still_runs() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from tests.tiny import tiny_model
from isheep.model.batch import PackedBatch
from isheep.model.ops import backend
print(tiny_model()(PackedBatch.pack([[1, 2, 3]], "cpu")).shape, backend(torch.zeros(1).half()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["torch.Size([3,", "48])", "torch"], done.stderr
