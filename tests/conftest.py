"""One thread a test process: tiny tensors gain nothing from two, and `make test` runs as many processes as cores."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # after the thread count, which it reads

if not torch.cuda.is_available():  # read when a kernel is decorated: Triton's kernels then run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A job in the background starts with Ctrl-C ignored and hands that down to the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
