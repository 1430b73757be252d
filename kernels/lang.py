"""Triton, its language and Gluon or, where they cannot be installed, stand-ins with which kernels are defined and never
run. What differs between versions (3.6 to 3.9) is settled here.
"""

from typing import Any


class _Absent:
    """Every name of a package that is not there: a decorator that changes nothing, and anything else."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


try:
    import triton
    import triton.language as tl
except ImportError:  # such as on macOS, where torch's definitions and C++ serve
    triton = tl = _Absent()  # type: ignore[assignment]
try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # an older Triton, whose other kernels serve
    gluon = gl = hopper = TensorDescriptor = _Absent()  # type: ignore[assignment]

mbarrier, fence_async_shared = hopper.mbarrier, hopper.fence_async_shared
warpgroup_mma, warpgroup_mma_wait = hopper.warpgroup_mma, hopper.warpgroup_mma_wait
# From a tensor in memory to shared memory by TMA: (descriptor, [row, column], barrier, shared memory).
copy_in = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared


def in_gluon(function: Any) -> Any:
    """A Triton function, of scalars, to be called by Gluon kernels."""
    return gluon.jit(getattr(function, "fn", function))


__all__ = [
    "TensorDescriptor",
    "copy_in",
    "fence_async_shared",
    "gl",
    "gluon",
    "in_gluon",
    "mbarrier",
    "tl",
    "triton",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
