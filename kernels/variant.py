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
    maxnreg: int | None = None  # registers of a thread when it begins, where the kernel hands them on

    @classmethod
    def of(cls, name: str, kernel: Any, types: dict[str, str], launch: dict[str, Any]) -> "Variant":
        """From the keywords that a launch passes and the types of a module's arguments, of which this kernel has some.

        Pointers count as multiples of 16, which torch's allocations are.
        """
        signature = {arg: types[arg] for arg in kernel.arg_names if arg not in launch}
        constants = {arg: value for arg, value in launch.items() if arg in kernel.arg_names}
        pointers = tuple(arg for arg, kind in signature.items() if kind.startswith("*"))
        warps, stages, registers = launch["num_warps"], launch.get("num_stages", 1), launch.get("maxnreg")
        return cls(name, kernel, signature, constants, warps, stages, pointers, registers)
