"""The CPU's kernels: `cpu.cpp` and `cpu_train.cpp`, compiled once per machine and called through raw pointers.

Triton has no CPU backend, and eager torch pays some ten microseconds an operator, which is most of a decode step of a
small model. So the CPU gets its few hot loops in C++. No compiler: `library()` is None and torch's definitions serve.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from isheep_kernels.choice import asked_for

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.cpp", "cpu_train.cpp", "lanes.h")]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

_p, _i, _l, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "rms_norm": [_p, _p, _p, _l, _l, _f],
    "rms_norm_backward": [_p, _p, _p, _p, _l, _l, _f],
    "swiglu": [_p, _p, _p, _l],
    "swiglu_backward": [_p, _p, _p, _p, _p, _l],
    "rope": [_p, _p, _p, _p, _l, _i, _i, _f],
    "write_kv": [_p, _p, _p, _p, _p, _l, _i, _i, _i],
    "attention_paged": [_p, _p, _p, _p, _p, _p, _p, _l, _i, _i, _i, _i, _i, _f],
    "cross_entropy": [_p, _p, _p, _l, _l, _i],
    "lora_down": [_p, _p, _p, _l, _l, _l, _l, _l, _p],
    "lora_up": [_p, _p, _p, _p, _l, _l, _l, _f, _i, _l, _l, _p],
    "lora_outer": [_p, _p, _p, _l, _l, _l, _l, _l, _p],
    "attention_packed": [_p, _p, _p, _p, _p, _i, _i, _i, _i, _f],
    "attention_packed_backward": [_p, _p, _p, _p, _p, _p, _p, _p, _i, _i, _i, _i, _f],
    "sample": [_p, _l, _l, _p, _p, _p, _p, _p, _p, _p],
}


def _processor() -> str:
    """What -march=native depends on: a cached library must not meet another processor."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    return platform.machine() + flags


def _keep_freed_memory() -> None:
    """Tell glibc not to give freed activations back to the kernel: faulting the pages in again cost a prefill 8 %."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 1 << 30)
    mallopt(m_trim_threshold, (1 << 31) - 1)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None on a machine without g++ or where compiling failed."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if asked_for("torch") or compiler is None or not shutil.which(compiler):
        return None
    made_from = [*(source.read_text() for source in SOURCES), *FLAGS, compiler, _processor()]
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isheep"
    built = folder / f"cpu-{key}.so"
    try:
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: two processes may build
                part = Path(scratch) / "cpu.so"
                files = [str(source) for source in SOURCES if source.suffix == ".cpp"]
                subprocess.run([compiler, *FLAGS, *files, "-o", str(part)], check=True, capture_output=True)
                part.rename(built)
        lib = ctypes.CDLL(str(built))
    except (OSError, subprocess.CalledProcessError):
        return None
    _keep_freed_memory()
    for name, argtypes in SIGNATURES.items():
        for suffix in SUFFIX.values():
            function = getattr(lib, f"{name}_{suffix}")
            function.argtypes, function.restype = argtypes, None
    return lib


@functools.cache
def kernel(name: str, dtype: torch.dtype):
    """The C function `name` for elements of `dtype`."""
    return getattr(library(), f"{name}_{SUFFIX[dtype]}")


def serves(x: Tensor) -> bool:
    """Whether these kernels can take `x`: on the CPU, fp32 or bf16, with bytes of its own, and compiled."""
    plain = type(x) in (Tensor, Parameter)  # another kind of tensor, such as a fake one, need not have an address
    return plain and x.device.type == "cpu" and x.dtype in SUFFIX and library() is not None
