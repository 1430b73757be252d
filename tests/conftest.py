"""One thread a test process: tiny tensors gain nothing from two, and `make test` runs as many processes as cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
