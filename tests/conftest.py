"""One thread a test process: tiny tensors gain nothing from two, and `make test` runs as many processes as cores.

The suite is the same on every machine: a GPU is hidden, and Triton's kernels run in its interpreter. `make test-gpu`,
which sets TRITON_INTERPRET=0, is for the others.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.setdefault("TRITON_INTERPRET", "1") != "0":  # read when a kernel is decorated
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# A job in the background starts with Ctrl-C ignored and hands that down to the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
