"""One thread a test process: tiny tensors gain nothing from two, and `make test` runs as many processes as cores.

The suite is the same on every machine: a GPU is hidden, and Triton's kernels run in its interpreter. `make test-gpu`,
which sets TRITON_INTERPRET=0, is for the others.
"""

import os
import signal
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.setdefault("TRITON_INTERPRET", "1") != "0":  # read when a kernel is decorated
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A job in the background starts with Ctrl-C ignored and hands that down to the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """A test marked `alone` runs in a process of its own."""
    if pyfuncitem.get_closest_marker("alone") is None or "ISHEEP_ALONE" in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    environment = os.environ | {"ISHEEP_ALONE": "1"}
    done = subprocess.run(command, cwd=pyfuncitem.config.rootpath, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True
