"""Triton and its language or, where it cannot be installed, stand-ins with which kernels are defined and never run."""

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

__all__ = ["tl", "triton"]
