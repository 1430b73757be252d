"""One compiled form of a kernel: what a user's launch fixes, written down so that it can be compiled without a GPU.

Each kernel module lists its own in `variants(capability)`; `compiled.py` compiles them all ahead of time.
"""

from typing import Any, NamedTuple

import torch

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # Triton's words


class Variant(NamedTuple):
    """Arguments as the launcher's JIT would see them: every argument is in `signature` or in `constants`."""

    name: str  # attention_packed forward bf16 D128
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # run-time argument -> Triton's type: "*bf16" a pointer, "i32", "fp32"
    constants: dict[str, Any]  # tl.constexpr argument -> value
    num_warps: int
    num_stages: int
    divisible_by_16: tuple[str, ...] = ()  # pointers and integers that the launcher may assume are multiples of 16
